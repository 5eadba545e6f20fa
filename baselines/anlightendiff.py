"""AnlightenDiff: a diffusion of the residual picture that ends around a predicted picture.

Chan et al., AnlightenDiff: Anchoring Diffusion Probabilistic Model on Low Light Image Enhancement,
IEEE TIP 2024. Written anew from its description. Data, training, evaluation and command line are
model_script's.

    python -m baselines.anlightendiff --mode train --config baselines/anlightendiff.json

Words used throughout, besides the script's low and high
    residual   x0 = 2 (high - low) - 1, the picture that is diffused
    centre     a guess at `high`, in [0, 1]; the diffusion ends at 2 centre - 1 plus noise, where an
               ordinary one ends at noise alone
    noisy      x_t, the residual after t + 1 of T steps, t in 0 .. T - 1
    alpha_bar  what is left of the residual's variance at step t, in (0, 1)

All of the paper's formulas say one thing: y = x - (2 centre - 1) undergoes the ordinary diffusion
of Ho et al.

Where its description is silent or this file differs
    - The centre has a loss of its own, |centre - high|, and the denoiser does not train it.
    - Filters are standardised (Qiao et al. 2019) where the paper speaks of weight normalisation.
    - The best weights are those of the best validation PSNR, as for every system here, not of the
      paper's mixed score.
    - The schedule of the rate is the script's.
    - Lion and LPIPS are optional packages. AdamW and SSIM are the defaults.
    - At temperature 0 the published sampler adds the noise of the config's seed, and `start_step`
      can shorten the sampling (see `enhance`).
    - The parts of an accumulated or distributed batch all draw the same steps and noise.

References
    - Ho et al., Denoising Diffusion Probabilistic Models (DDPM), NeurIPS 2020: posterior, noise
      loss
    - Meng et al., SDEdit, ICLR 2022: sampling from a guess with noise, some way back
    - Nichol & Dhariwal, Improved DDPM, ICML 2021: cosine schedule
    - Li et al., SRDiff, Neurocomputing 2022: diffusion of a residual picture under an encoder's
      features
    - Wang et al., LLFlow, AAAI 2022: equalised input, colour map and gradient map
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import model_script as ms
from baselines import equalise
from support.processes import progress_style
from support.settings import UserError, knob


@dataclass
class AnlightenConfig(ms.Config):
    """The script's settings and those of this system.

    Defaults are the published ones, except for AdamW and SSIM.
    """

    checkpoint_dir: str = knob("checkpoints/anlightendiff", "where weights go")
    width: int = knob(
        64, "channels of both U-Nets at full resolution, even", low=8, high=1024, architecture=True
    )
    multipliers: list[int] = knob(
        [1, 2, 2, 4, 4, 8],
        "width of each level over `width`, full resolution first",
        low=1,
        high=64,
        architecture=True,
    )
    timesteps: int = knob(100, "steps T of the diffusion", low=2, high=10_000, architecture=True)
    start_step: int = knob(
        0,
        "timesteps to go back through, from the centre under their noise; 0: all, from 2"
        " centre - 1",
        low=0,
        high=10_000,
    )
    sampling_steps: int = knob(
        0, "reverse steps, evenly spaced among those; 0: all of them", low=0, high=10_000
    )
    sampling_bar: bool = knob(
        False, "progress bar of the sampling also where standard error is no terminal"
    )
    noise_weight: float = knob(
        1.0, "weight of the squared error of the predicted noise", low=0.0, high=1e6
    )
    dfpl_weight: float = knob(
        1.0, "weight of the diffusion feature perceptual loss", low=0.0, high=1e6
    )
    dfpl_image_loss: str = knob(
        "ssim",
        "what DFPL compares pictures by; the paper's lpips needs a package",
        choices=("ssim", "l1", "lpips"),
    )
    centre_weight: float = knob(1.0, "weight of |predicted centre - high|", low=0.0, high=1e6)
    optimizer: str = knob(
        "adamw",
        "who updates the weights; the paper's lion needs a package",
        choices=("adamw", "lion"),
    )
    learning_rate: float = knob(4e-4, "peak learning rate", low=1e-8, high=1.0)
    batch_size: int = knob(
        24, "pictures or crops per step, of all processes together", low=1, high=4096
    )
    crop_size: int = knob(
        160, "side of the native-resolution crops, a multiple of 8; 0: image_size", low=0, high=4096
    )

    def __post_init__(self) -> None:
        """Rules that no single key can state.

        They are here, so that a mistake is found before any picture is read.
        """
        super().__post_init__()
        if self.width % 2:
            raise UserError(f"width must be even, got {self.width}")
        # every level halves the picture, which is padded to a multiple of its last
        if len(self.multipliers) > 8:
            raise UserError(f"multipliers: at most 8 levels, got {len(self.multipliers)}")
        if self.noise_weight == self.dfpl_weight == self.centre_weight == 0:
            raise UserError("one of noise_weight, dfpl_weight and centre_weight must be above 0")


# --------------------------------------------------------------------------------------------------
# Diffusion: pure functions of alpha_bar; tensors (B, 3, H, W) with alpha_bar (B, 1, 1, 1) or a
# scalar
# --------------------------------------------------------------------------------------------------


def cosine_alpha_bars(timesteps: int, offset: float = 0.008, largest_beta: float = 0.999) -> Tensor:
    """(T,) float64, falling from nearly 1 to nearly 0, betas clipped.

    Nichol & Dhariwal, equation 17.
    """
    share = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
    wanted = ((share + offset) / (1 + offset) * math.pi / 2).cos() ** 2
    betas = (1 - wanted[1:] / wanted[:-1]).clamp(max=largest_beta)
    return (1 - betas).cumprod(0)


def to_residual(high: Tensor, low: Tensor) -> Tensor:
    """x0 in [-1, 1] where `high` is nowhere darker than `low`, down to -3 where it is."""
    return 2 * (high - low) - 1


def to_picture(residual: Tensor, low: Tensor) -> Tensor:
    """Inverse of `to_residual`; not clamped."""
    return (residual + 1) / 2 + low


def noise_shift(centre: Tensor, alpha_bar: Tensor) -> Tensor:
    """DRDA's shift of the noise, c1_t (2 centre - 1).

    c1_t = (1 - sqrt(abar_t)) / sqrt(1 - abar_t)
    """
    return (1 - alpha_bar.sqrt()) / (1 - alpha_bar).sqrt() * (2 * centre - 1)


def diffuse(residual: Tensor, noise: Tensor, centre: Tensor, alpha_bar: Tensor) -> Tensor:
    """DRDA, x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) (noise + c1_t (2 centre - 1))."""
    return alpha_bar.sqrt() * residual + (1 - alpha_bar).sqrt() * (
        noise + noise_shift(centre, alpha_bar)
    )


def undiffuse(noisy: Tensor, noise: Tensor, centre: Tensor, alpha_bar: Tensor) -> Tensor:
    """The x0 that `diffuse` takes to `noisy` under `noise`."""
    return (
        noisy - (1 - alpha_bar).sqrt() * (noise + noise_shift(centre, alpha_bar))
    ) / alpha_bar.sqrt()


class ReverseStep(NamedTuple):
    """One step of DRDS.

    x_{t-1} ~ N(residual x0 + noisy x_t + centre (2 centre - 1), deviation^2 I)
    """

    residual: float
    noisy: float
    centre: float
    deviation: float


def reverse_step(alpha_bar: float, previous: float) -> ReverseStep:
    """Coefficients of the step from abar_t = `alpha_bar` to abar_{t-1} = `previous`.

    `previous` is 1 for the last step. c2_t is spelled as in the paper. It equals 1 minus the two
    others, so that x0 = x_t = 2 centre - 1 stays where it is.

    `previous` may be any earlier step's: alpha_t is then the product of those skipped, and x_t's
    marginal stays DRDA's. The paper's clip of the variance only guards a logarithm that is not
    taken here; the last step has no variance.
    """
    alpha, gone = alpha_bar / previous, 1 - alpha_bar
    drift = (1 - math.sqrt(previous)) * (1 - alpha) - math.sqrt(alpha) * (1 - math.sqrt(alpha)) * (
        1 - previous
    )
    return ReverseStep(
        residual=math.sqrt(previous) * (1 - alpha) / gone,
        noisy=math.sqrt(alpha) * (1 - previous) / gone,
        centre=drift / gone,
        deviation=math.sqrt((1 - alpha) * (1 - previous) / gone),
    )


def sampling_times(timesteps: int, steps: int) -> list[int]:
    """`steps` values of t, evenly spaced from T - 1 down to 0; all T of them for 0."""
    return (
        torch.linspace(timesteps - 1, 0, steps or timesteps, dtype=torch.float64)
        .round()
        .int()
        .tolist()
    )


# --------------------------------------------------------------------------------------------------
# What the condition U-Net sees
# --------------------------------------------------------------------------------------------------


def colour_map(low: Tensor) -> Tensor:
    """Each channel's share of its pixel, low / mean_c(low) / 3.

    Sums to 1 over the channels; 0 for a black pixel.
    """
    return low / low.sum(1, keepdim=True).clamp(min=1e-4)


def gradient_map(image: Tensor) -> Tensor:
    """max(|dx|, |dy|) by forward differences, 0 in the last column and row: the same shape."""
    dx = F.pad(image.diff(dim=-1).abs(), (0, 1))
    dy = F.pad(image.diff(dim=-2).abs(), (0, 0, 0, 1))
    return torch.maximum(dx, dy)


# --------------------------------------------------------------------------------------------------
# Networks
# --------------------------------------------------------------------------------------------------


def padded(image: Tensor, step: int) -> Tensor:
    """Repeat the last row and column until both sides are multiples of `step`.

    They become at least two of them, because the instance normalisation of the deepest level would
    turn a single pixel into nothing.
    """
    bottom, right = (
        max(2 * step, math.ceil(side / step) * step) - side for side in image.shape[-2:]
    )
    return F.pad(image, (0, right, 0, bottom), mode="replicate")


def time_waves(t: Tensor, width: int) -> Tensor:
    """(B, width) of steps t (B,): sines and cosines of wavelengths from 2 pi to 20000 pi steps.

    Vaswani et al. 2017.
    """
    rates = torch.exp(
        -math.log(10_000) * torch.arange(width // 2, device=t.device) / (width // 2 - 1)
    )
    return torch.cat([(t[:, None] * rates).sin(), (t[:, None] * rates).cos()], dim=1)


class StandardisedConv(nn.Conv2d):
    """3x3 convolution whose filters have mean 0 and variance 1. Qiao et al. 2019."""

    def __init__(self, inputs: int, outputs: int) -> None:
        # a normalisation follows, with a bias of its own
        super().__init__(inputs, outputs, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        deviation, mean = torch.std_mean(self.weight, dim=(1, 2, 3), keepdim=True, correction=0)
        return self._conv_forward(x, (self.weight - mean) / (deviation + 1e-5), None)


class Block(nn.Module):
    """Two standardised convolutions with instance normalisation, and a skip connection around them.

    `time` shifts the channels.
    """

    def __init__(self, inputs: int, outputs: int, time_width: int) -> None:
        super().__init__()
        self.first, self.second = (
            StandardisedConv(inputs, outputs),
            StandardisedConv(outputs, outputs),
        )
        self.norms = nn.ModuleList(nn.InstanceNorm2d(outputs, affine=True) for _ in range(2))
        self.time = nn.Linear(time_width, outputs) if time_width else None
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, time: Tensor | None) -> Tensor:
        hidden = self.norms[0](self.first(x))
        if self.time is not None:
            hidden = hidden + self.time(time)[:, :, None, None]
        return self.skip(x) + F.silu(self.norms[1](self.second(F.silu(hidden))))


class UNet(nn.Module):
    """(B, inputs, H, W) of any size -> (3 channels of that size, the encoder's features).

    There is one padded feature map for each level. `condition`, another U-Net's features, is added
    level by level. `t` (B,) is given where the net is `timed`.
    """

    def __init__(self, inputs: int, config: AnlightenConfig, timed: bool) -> None:
        super().__init__()
        widths = [config.width * multiplier for multiplier in config.multipliers]
        time_width = 4 * config.width if timed else 0
        self.waves, self.step = config.width, 2 ** (len(widths) - 1)
        if timed:
            layers = (
                nn.Linear(config.width, time_width),
                nn.SiLU(),
                nn.Linear(time_width, time_width),
                nn.SiLU(),
            )
            self.time = nn.Sequential(*layers)
        self.stem = ms.conv3(inputs, widths[0])
        pairs = zip([widths[0], *widths[:-1]], widths, strict=True)
        self.encoder = nn.ModuleList(Block(above, here, time_width) for above, here in pairs)
        self.middle = Block(widths[-1], widths[-1], time_width)
        pairs = zip(widths[:0:-1], widths[-2::-1], strict=True)
        self.decoder = nn.ModuleList(Block(below + here, here, time_width) for below, here in pairs)
        self.out = ms.zero_init(ms.conv3(widths[0], 3))

    def forward(
        self, x: Tensor, t: Tensor | None = None, condition: Sequence[Tensor] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        height, width = x.shape[-2:]
        time = None if t is None else self.time(time_waves(t, self.waves))
        x, features = self.stem(padded(x, self.step)), []
        for level, block in enumerate(self.encoder):
            x = block(F.avg_pool2d(x, 2) if level else x, time)
            if condition:
                x = x + condition[level]
            features.append(x)
        x = self.middle(x, time)
        for block, skip in zip(self.decoder, features[-2::-1], strict=True):
            x = block(torch.cat([F.interpolate(x, scale_factor=2), skip], dim=1), time)
        return self.out(x)[..., :height, :width].float(), features


# --------------------------------------------------------------------------------------------------
# Losses
# --------------------------------------------------------------------------------------------------


@functools.cache
def lpips_vgg() -> Callable[[Tensor, Tensor], Tensor]:
    """LPIPS-VGG of pictures in [0, 1], as (B, 1, 1, 1).

    Raises UserError when the package or its weights are missing.
    """
    instead = "or use --set dfpl_image_loss=ssim"
    try:
        import lpips

        network = lpips.LPIPS(net="vgg", verbose=False).eval().requires_grad_(False)
    except ImportError:
        raise UserError(
            f"dfpl_image_loss: lpips is not installed; run pip install lpips, {instead}"
        ) from None
    except Exception as error:  # its backbone's weights are downloaded, which fails in many ways
        kind = type(error).__name__
        raise UserError(
            f"dfpl_image_loss: lpips could not load its weights ({kind}); go online once, {instead}"
        ) from None
    return lambda a, b: network.to(a.device)(2 * a - 1, 2 * b - 1)


def image_loss(kind: str, a: Tensor, b: Tensor) -> Tensor:
    """A scalar, 0 for equal pictures (B, 3, H, W).

    Pictures are nominally in [0, 1], though the noise in DFPL's leaves that range.
    """
    if kind == "lpips":
        return lpips_vgg()(a, b).mean()
    return F.l1_loss(a, b) if kind == "l1" else 1 - ms.ssim(a, b).mean()


# --------------------------------------------------------------------------------------------------
# The system
# --------------------------------------------------------------------------------------------------


class AnlightenDiff(ms.System):
    """A condition U-Net that predicts the centre, and a denoising U-Net that its features steer."""

    config_class = AnlightenConfig
    method = "AnlightenDiff"
    program = "-m baselines.anlightendiff"
    recipe = "baselines/anlightendiff.json"
    unused = ms.FLOW_KEYS + ms.LOSS_KEYS + ms.TILE_KEYS
    config: AnlightenConfig
    alpha_bars: Tensor

    def __init__(self, config: AnlightenConfig) -> None:
        super().__init__(config)
        for key, above in (
            ("start_step", "timesteps"),
            ("sampling_steps", "start_step" if config.start_step else "timesteps"),
        ):
            if (value := getattr(config, key)) > (most := getattr(config, above)):
                raise UserError(f"{key} must be at most {above} ({most}), got {value}")
        self.predictor = UNet(12, config, timed=False)
        self.denoiser = UNet(6, config, timed=True)
        self.register_buffer(
            "alpha_bars", cosine_alpha_bars(config.timesteps).float(), persistent=False
        )

    def make_optimizer(self) -> torch.optim.Optimizer:
        """The config's choice.

        Raises UserError, before the first step, for a package that the training will need.
        """
        config = self.config
        if config.dfpl_weight and config.dfpl_image_loss == "lpips":
            lpips_vgg()
        if config.optimizer == "adamw":
            return ms.adamw(self.parameters(), config)
        try:
            from lion_pytorch import Lion
        except ImportError:
            raise UserError(
                "optimizer: lion is not installed; run pip install lion-pytorch, or use --set"
                " optimizer=adamw"
            ) from None
        return Lion(
            self.parameters(),
            lr=config.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=config.weight_decay,
        )

    def predict_centre(self, low: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(centre, features for the denoiser): equalised `low` plus what the U-Net adds to it.

        The centre is not yet clamped to [0, 1].
        """
        equalised, colours = equalise(low), colour_map(low)
        added, features = self.predictor(
            torch.cat([low, equalised, colours, gradient_map(colours)], dim=1)
        )
        return equalised + added, features

    def predict_noise(
        self, noisy: Tensor, low: Tensor, t: Tensor, features: Sequence[Tensor]
    ) -> Tensor:
        """The noise in `noisy` at steps t (B,)."""
        return self.denoiser(torch.cat([noisy, low], dim=1), t, features)[0]

    def losses(self, batch: ms.Sample) -> dict[str, Tensor]:
        """Named, weighted terms of the training loss, scalars; terms of weight 0 are not computed.

        centre  |centre - high|. It is ours: the paper's description names no loss of the centre. It
                alone trains the centre. The denoiser gets the centre detached, as it would drift to
                wherever noise is easily told. It is not clamped, so every pixel has a gradient.
        noise   DDPM, equation 14
        dfpl    see `_denoising_losses`
        """
        config, (centre, features) = self.config, self.predict_centre(batch.low)
        terms = (
            {"centre": config.centre_weight * F.l1_loss(centre, batch.high)}
            if config.centre_weight
            else {}
        )
        if config.noise_weight or config.dfpl_weight:
            terms |= self._denoising_losses(batch, centre.detach().clamp(0, 1), features)
        return terms

    def _denoising_losses(
        self, batch: ms.Sample, predicted: Tensor, features: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """The terms noise and dfpl.

        The centre is the prediction or the reference, half and half, so the denoiser knows both.
        DFPL compares the pictures that the true and the predicted noise make of the same residual.
        They are not clamped: at most steps noise leaves [0, 1], and a clamped pixel would have no
        gradient.
        """
        config, low, high = self.config, batch.low, batch.high
        from_reference = torch.rand(len(low), 1, 1, 1, device=low.device) < 0.5
        centre = torch.where(from_reference, high, predicted)
        t = torch.randint(config.timesteps, (len(low),), device=low.device)
        alpha_bar = self.alpha_bars[t][:, None, None, None]
        noise, residual = torch.randn_like(high), to_residual(high, low)
        noisy = diffuse(residual, noise, centre, alpha_bar)
        guess = self.predict_noise(noisy, low, t, features)
        terms = (
            {"noise": config.noise_weight * F.mse_loss(guess, noise)} if config.noise_weight else {}
        )
        if config.dfpl_weight:
            ours = to_picture(diffuse(residual, guess, centre, alpha_bar), low)
            terms["dfpl"] = config.dfpl_weight * image_loss(
                config.dfpl_image_loss, ours, to_picture(noisy, low)
            )
        return terms

    def enhance(self, low: Tensor, temperature: float = 0.0) -> Tensor:
        """Enhanced pictures (B, 3, H, W) in [0, 1] of `low`, any sides of at least 16.

        DRDS, from 2 centre - 1 itself. `temperature` 0 gives one picture: the paper's process under
        the noise of the config's seed. Without any noise the denoiser sees what it was never
        trained on; that cost about 1 dB and 0.1 of SSIM in a small trial. Above 0 the noise follows
        the global random state, `temperature` times the posterior's deviation; 1 is the paper's.

        `start_step` is ours. The paper's start says nothing about the noise. While abar_t is small,
        `undiffuse` multiplies what the guess misses by sqrt((1 - abar_t) / abar_t): the first
        residuals are saturated, and their colours stay. A start from the centre's own residual,
        under the noise of a step where abar_t is large, leaves these steps out.
        """
        config, schedule = self.config, cosine_alpha_bars(self.config.timesteps).tolist()
        generator, spread = self._generator(temperature), temperature or 1.0

        def noise() -> Tensor:
            return spread * torch.randn(low.shape, generator=generator).to(low.device)

        centre, features = self.predict_centre(low)
        centre = centre.clamp(0, 1)
        noisy = anchor = 2 * centre - 1
        times = sampling_times(config.start_step or config.timesteps, config.sampling_steps)
        if config.start_step:
            noisy = diffuse(
                to_residual(centre, low), noise(), centre, low.new_tensor(schedule[times[0]])
            )
        style = progress_style()
        style["disable"] |= not (config.sampling_bar or sys.stderr.isatty())
        bar = tqdm(times, desc="sampling", unit="step", leave=False, **style)
        for t, earlier in zip(bar, [*times[1:], None], strict=True):
            step = reverse_step(schedule[t], 1.0 if earlier is None else schedule[earlier])
            guess = self.predict_noise(
                noisy, low, torch.full((len(low),), t, device=low.device), features
            )
            residual = undiffuse(noisy, guess, centre, low.new_tensor(schedule[t])).clamp(-1, 1)
            noisy = (
                step.residual * residual
                + step.noisy * noisy
                + step.centre * anchor
                + step.deviation * noise()
            )
        return to_picture(noisy, low).clamp(0, 1)

    def _generator(self, temperature: float) -> torch.Generator:
        """Source of the reverse process's noise, on the CPU, so that every device draws the same.

        At temperature 0 it starts from the config's seed and leaves the global random state alone,
        so that a validation never changes the training around it. Above 0 it starts from a number
        drawn from the global state.
        """
        seed = int(torch.randint(2**31, ())) if temperature else self.config.seed
        return torch.Generator().manual_seed(seed)

    def pictures(self, low: Tensor) -> dict[str, Tensor]:
        """The predicted centre, in [0, 1], for TensorBoard and the results."""
        return {"centre": self.predict_centre(low)[0].clamp(0, 1)}


if __name__ == "__main__":
    sys.exit(ms.main(system=AnlightenDiff))
