"""RetinexNet: splits a photograph into reflectance and illumination, and brightens the latter.

    python -m baselines.retinexnet --mode train --config baselines/retinexnet.json

Words used throughout, besides those of model_script
    reflectance    R, the colours of things, (B, 3, H, W) in [0, 1], the same for low and high
    illumination   I, the light that falls on them, (B, 1, H, W) in [0, 1]; a picture is R * I
    relit          I_new, the illumination that Enhance-Net proposes, (B, 1, H, W), about [0, 1];
                   enhanced = R_low * I_new

References
    - Wei et al., Deep Retinex Decomposition for Low-Light Enhancement, BMVC 2018 ("the paper"):
      networks, L_recon, L_ir, L_is
    - its public code: the weights of the losses, the 9x9 layer, the channel maximum
    - a student project in PyTorch (UPC School, 2022): join, ignore_ienhance and transposed
      convolutions. It found white relit illuminations in joint training, and noise in plain colours
      without transposed convolutions.

Where they are silent or this file differs
    - The gradient at the last row and column is zero, so that a picture's border is no edge. A
      gradient is averaged over those of its 3x3 neighbours that exist. (The public code pads with
      black before the gradient.)
    - The loss sees R_low * I_new unbounded, as the last layer has no activation. Only the finished
      picture is clamped.
    - The last row and column are repeated up to a multiple of 8 and cropped afterwards, so that
      both kinds of up-sampling take any size.
    - The rates are halved after each quarter of a stage. (The paper's code: a tenth after a fifth
      of the epochs.)
    - A stage of `split` is half of the run. (The student project trains either network for all
      epochs.)
    - Gradients are clipped at norm 1 and Adam's second beta is 0.99, both the script's.
    - There is no BM3D denoising of the reflectance, an optional step outside the network, so that
      the networks are compared.

With weight_decay 0 the optimizer is Adam, as in the public code. With ema_decay above 0 the weights
that are saved as best are an average that follows the trained ones, also for a Decom-Net that is
already frozen. With 0 the trained ones themselves are saved.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import model_script as ms
from support.settings import knob
from support.tiles import pad_to_multiple


@dataclass
class RetinexConfig(ms.Config):
    """The shared settings and those of RetinexNet.

    `training` counts as architecture: it says what the weights mean.
    """

    checkpoint_dir: str = knob("checkpoints/retinexnet", "where weights go")
    training: str = knob(
        "split",
        "split: Decom-Net for half of the run, then Enhance-Net; join: both at once; "
        "ignore_ienhance: Decom-Net alone, whose reflectance is the enhanced picture",
        choices=("split", "join", "ignore_ienhance"),
        architecture=True,
    )
    transposed: bool = knob(
        False,
        "Enhance-Net grows by transposed convolutions, not by nearest neighbours and a convolution",
        architecture=True,
    )
    channels: int = knob(
        64, "width of both networks (published: 64)", low=1, high=1024, architecture=True
    )
    decom_lr: float = knob(1e-3, "first learning rate of Decom-Net", low=1e-8, high=1.0)
    relight_lr: float = knob(1e-3, "first learning rate of Enhance-Net", low=1e-8, high=1.0)
    decay_every: float = knob(
        0.25,
        "share of a stage of training after which both rates fall, again and again",
        low=0.01,
        high=1.0,
    )
    decay_factor: float = knob(
        0.5, "what they are multiplied by each time; 1: constant rates", low=1e-6, high=1.0
    )
    num_epochs: int = knob(20, "passes over the training set", low=1, high=1_000_000)
    save_freq: int = knob(10, "epochs between checkpoints", low=1, high=1_000_000)
    weight_decay: float = knob(0.0, "decoupled weight decay of AdamW; 0: Adam", low=0.0, high=1.0)
    ema_decay: float = knob(0.0, "decay of averaged weights; 0: off", low=0.0, high=0.999999)


# --------------------------------------------------------------------------------------------------
# Networks: Decom-Net and Enhance-Net of the paper
# --------------------------------------------------------------------------------------------------


class Decomposition(NamedTuple):
    """A picture as reflectance (B, 3, H, W) times illumination (B, 1, H, W), both in [0, 1]."""

    reflectance: Tensor
    illumination: Tensor


class DecomNet(nn.Module):
    """A picture (B, 3, H, W) in [0, 1] to its Decomposition; the same weights see low and high."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shallow = nn.Conv2d(4, channels, 9, padding=4)
        self.body = nn.Sequential(
            *(layer for _ in range(5) for layer in (ms.conv3(channels, channels), nn.ReLU()))
        )
        self.last = ms.conv3(channels, 4)

    def forward(self, image: Tensor) -> Decomposition:
        brightest = image.amax(1, keepdim=True)  # a first guess of the illumination
        maps = self.last(self.body(self.shallow(torch.cat([brightest, image], 1))))
        maps = maps.to(image.dtype).sigmoid()
        return Decomposition(maps[:, :3], maps[:, 3:])


def double(channels: int, transposed: bool) -> nn.Module:
    """(B, channels, h, w) to (B, channels, 2h, 2w)."""
    if transposed:
        return nn.ConvTranspose2d(channels, channels, 3, stride=2, padding=1, output_padding=1)
    return nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), ms.conv3(channels, channels))


class EnhanceNet(nn.Module):
    """A low picture's Decomposition to the relit illumination.

    An encoder-decoder whose three scales are gathered.
    """

    def __init__(self, channels: int, transposed: bool) -> None:
        super().__init__()
        self.first = ms.conv3(4, channels)
        self.downs = nn.ModuleList(ms.conv3(channels, channels, stride=2) for _ in range(3))
        self.ups = nn.ModuleList(double(channels, transposed) for _ in range(3))
        self.fuse = nn.Conv2d(3 * channels, channels, 1)
        self.last = ms.conv3(channels, 1)

    def forward(self, seen: Decomposition) -> Tensor:
        height, width = seen.illumination.shape[-2:]
        x = self.first(pad_to_multiple(torch.cat(seen, 1)))
        skips, decoded = [], []
        for down in self.downs:
            skips.append(x)
            x = down(x).relu()
        for up in self.ups:
            x = up(x).relu() + skips.pop()
            decoded.append(x)
        gathered = torch.cat(
            [F.interpolate(scale, x.shape[-2:], mode="nearest") for scale in decoded], 1
        )
        relit = self.last(self.fuse(gathered))
        return relit[..., :height, :width].to(seen.illumination.dtype)


# --------------------------------------------------------------------------------------------------
# Losses: named, weighted terms
# --------------------------------------------------------------------------------------------------

HORIZONTAL, VERTICAL = 3, 2


def gradient(image: Tensor, axis: int) -> Tensor:
    """|forward difference| along an axis, the shape of `image`; 0 at its last row or column."""
    return image.diff(dim=axis, append=image.narrow(axis, image.shape[axis] - 1, 1)).abs()


def smoothness(illumination: Tensor, reflectance: Tensor) -> Tensor:
    """Structure-aware total variation, a scalar: I may change where R has an edge.

    mean(|grad I| exp(-10 mean_3x3 |grad grey(R)|)), horizontal plus vertical (paper, L_is,
    lambda_g = 10). Grey is that of ITU-R BT.601.
    """
    grey = (reflectance * reflectance.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(
        1, keepdim=True
    )
    total = illumination.new_zeros(())
    for axis in (HORIZONTAL, VERTICAL):
        edges = F.avg_pool2d(gradient(grey, axis), 3, stride=1, padding=1, count_include_pad=False)
        total = total + (gradient(illumination, axis) * (-10 * edges).exp()).mean()
    return total


def decom_losses(
    low: Tensor, high: Tensor, of_low: Decomposition, of_high: Decomposition
) -> dict[str, Tensor]:
    """The terms of Decom-Net for pictures (B, 3, H, W) and their decompositions.

    |R_l I_l - S_l| + |R_h I_h - S_h| + 0.001 (|R_h I_l - S_l| + |R_l I_h - S_h|) + 0.01 |R_l - R_h|
    + 0.1 smoothness(I_l, R_l) + 0.1 smoothness(I_h, R_h), each |.| a mean (paper, L_recon, L_ir,
    L_is).
    """
    r_low, i_low, r_high, i_high = *of_low, *of_high
    return {
        "reconstruction": F.l1_loss(r_low * i_low, low) + F.l1_loss(r_high * i_high, high),
        "exchanged": 0.001 * (F.l1_loss(r_high * i_low, low) + F.l1_loss(r_low * i_high, high)),
        "reflectance": 0.01 * F.l1_loss(r_low, r_high),
        "smoothness": 0.1 * (smoothness(i_low, r_low) + smoothness(i_high, r_high)),
    }


def relight_losses(high: Tensor, reflectance: Tensor, relit: Tensor) -> dict[str, Tensor]:
    """The terms of Enhance-Net (paper, L_recon and L_is).

    |R_l I_new - S_h| + 3 smoothness(I_new, R_l)
    """
    return {
        "relight": F.l1_loss(reflectance * relit, high),
        "relight_smoothness": 3 * smoothness(relit, reflectance),
    }


# --------------------------------------------------------------------------------------------------
# The system
# --------------------------------------------------------------------------------------------------


class RetinexNet(ms.System):
    """Decom-Net and Enhance-Net behind the script's interface."""

    config_class = RetinexConfig
    method = "RetinexNet"
    program = "-m baselines.retinexnet"
    recipe = "baselines/retinexnet.json"
    unused = (
        *(ms.FLOW_KEYS + ms.LOSS_KEYS + ms.TILE_KEYS),
        *("learning_rate", "warmup_steps", "temperature", "samples", "uncertainty"),
    )
    config: RetinexConfig

    def __init__(self, config: RetinexConfig) -> None:
        super().__init__(config)
        self.decom = DecomNet(config.channels)
        self.relight = EnhanceNet(config.channels, config.transposed)
        self.frozen = False  # in the second stage of split training, where Decom-Net rests

    def relit(self, seen: Decomposition) -> Tensor:
        """I_new (B, 1, H, W).

        ignore_ienhance puts 1 in its place, so that the reflectance is the enhanced picture.
        """
        return (
            torch.ones_like(seen.illumination)
            if self.config.training == "ignore_ienhance"
            else self.relight(seen)
        )

    def enhance(self, low: Tensor, temperature: float = 0.0) -> Tensor:
        """Enhanced pictures (B, 3, H, W) in [0, 1] of `low`, any sides.

        There is one answer, whatever the temperature.
        """
        seen = self.decom(low)
        return (seen.reflectance * self.relit(seen)).clamp(0, 1)

    def pictures(self, low: Tensor) -> dict[str, Tensor]:
        """What lies between low and enhanced, each as (B, 3, H, W) in [0, 1]."""
        seen = self.decom(low)
        maps = {**seen._asdict(), "relit": self.relit(seen).clamp(0, 1)}
        return {name: image.expand_as(low) for name, image in maps.items()}

    # training -------------------------------------------------------------------------------------

    def begin_step(self, progress: float, step: int = 0) -> None:
        """Freeze Decom-Net for the second half of a split run.

        Without gradients AdamW leaves it alone, decay included.
        """
        self.frozen = self.config.training == "split" and progress >= 0.5
        self.decom.requires_grad_(not self.frozen)

    def losses(self, batch: ms.Sample) -> dict[str, Tensor]:
        """The terms of the networks that learn at this stage."""
        seen = self.decom(batch.low)
        terms = (
            {} if self.frozen else decom_losses(batch.low, batch.high, seen, self.decom(batch.high))
        )
        if self.frozen or self.config.training != "split":
            terms |= relight_losses(batch.high, seen.reflectance, self.relit(seen))
        return terms

    def make_optimizer(self) -> torch.optim.Optimizer:
        """One optimizer of two groups, which act as two: Adam keeps its averages by parameter."""
        ratio = self.config.relight_lr / self.config.decom_lr
        groups = [
            {"params": self.decom.parameters()},
            {"params": self.relight.parameters(), "lr_scale": ratio},
        ]
        return ms.adamw(groups, self.config)

    def learning_rate_at(self, progress: float, step: int) -> float:
        """Decom-Net's rate, in steps that begin anew with each stage.

        Enhance-Net's is proportional to it.
        """
        config = self.config
        done = 2 * progress - (progress >= 0.5) if config.training == "split" else progress
        return config.decom_lr * config.decay_factor ** int(done / config.decay_every)


if __name__ == "__main__":
    sys.exit(ms.main(system=RetinexNet))
