"""UPT-Flow: a conditional flow guided by a transformer that is told where colour was lost.

Xu et al., UPT-Flow: Multi-scale transformer-guided normalizing flow for low-light image
enhancement, Pattern Recognition 2025.

    python -m baselines.upt_flow --mode train --config baselines/upt_flow.json

Every other mode and flag is the script's. The defaults below are the published size. The JSON file
is cut to two processor cores.

    low -> unbalanced point map -> MSFormer(low, map) -> features at 1/2, 1/4, 1/8
    high <-> latent by a flow of three levels, conditioned on these features; prior N(0, I)

The prior has no mean of its own: the flow ends with affine maps whose shift and scale are functions
of the features, which is what a predicted mean and deviation would be. Enhancement decodes z = 0,
as the published tests do.

The public code cannot train, and its reverse pass miscounts the log-determinant.

Where it is silent, this file's choice
    - The decoder is 4, 4 and 2 base widths wide, with (global, local) heads (4, 8), (2, 4), (2, 2),
      and refines by the global branch alone.
    - The map's embedding is the map, repeated, after the features' own down- and up-sampling.
    - The rate is halved at four milestones. Warm-up, clipped gradients, averaged weights and Adam's
      betas are the script's.

References
    - Zamir et al., Restormer, CVPR 2022: attention across channels, gated depthwise feed-forward
    - Liu et al., Swin Transformer, ICCV 2021: shifted windows with a relative position bias
    - Wang et al., Uformer, CVPR 2022: the locally enhanced feed-forward
    - Wang et al., ECA-Net, CVPR 2020: its attention
    - Woo et al., CBAM, ECCV 2018: channel and spatial attention
    - Wang et al., LLFlow, AAAI 2022: the flow's levels, the image in [0, 1] used as it is
    - Kingma & Dhariwal, Glow, NeurIPS 2018: the steps of the flow
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import model_script as ms
from baselines import equalise
from support.processes import all_reduce, world_size
from support.settings import UserError, knob
from support.tiles import pad_to_multiple


@dataclass
class UPTFlowConfig(ms.Config):
    """The script's keys with the published recipe's defaults, and this model's own."""

    checkpoint_dir: str = knob("checkpoints/upt_flow", "where weights go")
    encoder_width: int = knob(
        48, "channels of the encoder's first level, even", low=2, high=512, architecture=True
    )
    encoder_blocks: int = knob(
        2, "blocks of either branch at each level", low=1, high=16, architecture=True
    )
    refinement_blocks: int = knob(
        2, "blocks that refine the full-resolution features", low=0, high=16, architecture=True
    )
    window_size: int = knob(
        5, "side of the local attention's windows", low=2, high=32, architecture=True
    )
    flow_steps: int = knob(
        8, "flow steps with coupling at each of the three levels", low=1, high=64, architecture=True
    )
    flow_channels: int = knob(
        64, "hidden width of the couplings", low=8, high=1024, architecture=True
    )
    log_input: bool = knob(False, "the encoder sees log(low) in place of low", architecture=True)
    histogram_input: bool = knob(
        True, "the encoder also sees low with its histogram equalised", architecture=True
    )
    crop_size: int = knob(
        160, "side of the native-resolution crops, a multiple of 8; 0: image_size", low=0, high=4096
    )
    batch_size: int = knob(8, "pictures or crops per step", low=1, high=4096)
    nll_weight: float = knob(
        1.0, "weight of the negative log-likelihood, in bits per dimension", low=0.0, high=1e6
    )
    l1_weight: float = knob(
        0.0, "weight of |enhanced - high|; the paper has none", low=0.0, high=1e6
    )
    ssim_weight: float = knob(
        0.0, "weight of 1 - SSIM(enhanced, high); the paper has none", low=0.0, high=1e6
    )
    colour_weight: float = knob(
        0.0, "weight of the distance of colour histograms; the paper has none", low=0.0, high=1e6
    )
    weight_decay: float = knob(0.0, "decoupled weight decay of AdamW; 0: Adam", low=0.0, high=1.0)
    warmup_steps: int = knob(
        100,
        "steps of linear warm-up; the rate halves at 40, 60, 80 and 90 %",
        low=0,
        high=10_000_000,
    )

    def __post_init__(self) -> None:
        """A rule that no single key can state."""
        super().__post_init__()
        if self.encoder_width % 2:
            raise UserError(f"encoder_width must be even, got {self.encoder_width}")


# What is read off the dark picture ----------------------------------------------------------------


def balance_map(low: Tensor, threshold: float = 0.1) -> Tensor:
    """(B, 1, H, W) of `low` (B, 3, H, W) in [0, 1].

    1 where each of R, G, B has more than `threshold` of their sum, else 0. The zeros are the
    paper's unbalanced points: a channel has fallen to nothing there, and colour is lost.
    """
    share = low / (low.sum(1, keepdim=True) + 1e-4)
    return (share > threshold).all(1, keepdim=True).to(low.dtype)


# MSFormer: every level adds a global branch (attention across channels) and a local one (attention


def depthwise(channels: int, bias: bool = True) -> nn.Conv2d:
    """3x3 convolution of every channel by itself."""
    return nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=bias)


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the channels of (B, C, H, W), at every position by itself."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class TransposedAttention(nn.Module):
    """Attention of channels to channels, (B, C, H, W) to the same: linear in the pixels.

    Restormer, eq. 1.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.to_qkv = nn.Sequential(
            nn.Conv2d(channels, 3 * channels, 1, bias=False), depthwise(3 * channels, bias=False)
        )
        self.out = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        heads = len(self.temperature)
        # (B, heads, C / heads, HW)
        query, key, value = self.to_qkv(x).reshape(b, 3, heads, c // heads, h * w).unbind(1)
        attention = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).mT * self.temperature
        return self.out((attention.softmax(-1) @ value).reshape(b, c, h, w))


class GatedFeedForward(nn.Module):
    """gelu(a) b of two depthwise-convolved expansions, (B, C, H, W) to the same.

    Restormer, eq. 2.
    """

    def __init__(self, channels: int, expansion: float = 2.66) -> None:
        super().__init__()
        hidden = int(channels * expansion)
        self.expand = nn.Sequential(
            nn.Conv2d(channels, 2 * hidden, 1, bias=False), depthwise(2 * hidden, bias=False)
        )
        self.out = nn.Conv2d(hidden, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.expand(x).chunk(2, dim=1)
        return self.out(F.gelu(gate) * value)


class GlobalBlock(nn.Module):
    """Restormer's block, (B, C, H, W) to the same: what a pixel learns from the whole picture."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.attend = nn.Sequential(ChannelNorm(channels), TransposedAttention(channels, heads))
        self.feed = nn.Sequential(ChannelNorm(channels), GatedFeedForward(channels))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(x)
        return x + self.feed(x)


class WindowAttention(nn.Module):
    """Attention within windows: the map says where to look, the features what is found there.

    features and embedding (B, C, H, W) -> (B, C, H, W). A window starts at pixel `shift`, others
    lie around it. What hangs over the rims is masked, which is Swin's cyclic shift with its mask.
    The paper's depthwise projections are taken of the picture rather than window by window, so that
    no window's rim shows in them.
    """

    relative: Tensor

    def __init__(self, channels: int, heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.heads, self.window, self.lead = heads, window, -shift % window
        self.to_query, self.to_key, self.to_value = (depthwise(channels) for _ in range(3))
        self.out = nn.Conv2d(channels, channels, 1)
        self.position = nn.Parameter(0.02 * torch.randn(heads, (2 * window - 1) ** 2))
        y, x = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
        y, x = ((p.flatten()[:, None] - p.flatten() + window - 1) for p in (y, x))
        # (window^2, window^2)
        self.register_buffer("relative", y * (2 * window - 1) + x, persistent=False)

    def windows(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, windows, heads, window^2, C / heads), zero beyond the rims."""
        n, lead, (h, w) = self.window, self.lead, x.shape[-2:]
        x = F.pad(x, (lead, -(lead + w) % n, lead, -(lead + h) % n))
        b, c, h, w = x.shape
        x = x.reshape(b, self.heads, c // self.heads, h // n, n, w // n, n).permute(
            0, 3, 5, 1, 4, 6, 2
        )
        return x.reshape(b, -1, self.heads, n * n, c // self.heads)

    def picture(self, windows: Tensor, height: int, width: int) -> Tensor:
        """(B, C, height, width) of what `windows` made of it."""
        n, lead = self.window, self.lead
        rows, columns = (-(-(lead + side) // n) for side in (height, width))
        x = windows.reshape(len(windows), rows, columns, self.heads, n, n, -1).permute(
            0, 3, 6, 1, 4, 2, 5
        )
        return x.reshape(len(x), -1, rows * n, columns * n)[
            ..., lead : lead + height, lead : lead + width
        ]

    def forward(self, features: Tensor, embedding: Tensor) -> Tensor:
        height, width = features.shape[-2:]
        query, key = self.windows(self.to_query(embedding)), self.windows(self.to_key(embedding))
        value = self.windows(self.to_value(features))
        # (1, windows, heads, 1, window^2)
        inside = self.windows(features.new_ones(1, self.heads, height, width)).mT > 0
        bias = self.position[:, self.relative].masked_fill(~inside, -torch.inf).to(query.dtype)
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.out(self.picture(found, height, width))


class ChannelGate(nn.Module):
    """x times a weight in [0, 1] per channel, from the averages of it and its two neighbours.

    ECA-Net, eq. 5.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mix(x.mean((2, 3))[:, None]).sigmoid()[:, 0, :, None, None]


class LocalBlock(nn.Module):
    """Window attention and a depthwise feed-forward with channel attention, each residual.

    (B, C, H, W) to the same.
    """

    def __init__(
        self, channels: int, heads: int, window: int, shift: int, expansion: int = 4
    ) -> None:
        super().__init__()
        hidden = expansion * channels
        self.norm, self.attention = (
            ChannelNorm(channels),
            WindowAttention(channels, heads, window, shift),
        )
        enter, leave = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)
        self.feed = nn.Sequential(
            ChannelNorm(channels), enter, depthwise(hidden), nn.GELU(), leave, ChannelGate()
        )

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x), embedding)
        return x + self.feed(x)


class Stage(nn.Module):
    """One level: the global and the local branch side by side, added.

    features, embedding (B, C, H, W) -> (B, C, H, W)
    """

    def __init__(
        self, channels: int, global_heads: int, local_heads: int, config: UPTFlowConfig
    ) -> None:
        super().__init__()
        window, blocks = config.window_size, range(config.encoder_blocks)
        self.globals = nn.Sequential(*(GlobalBlock(channels, global_heads) for _ in blocks))
        shifts = [window // 2 * (place % 2) for place in blocks]
        self.locals = nn.ModuleList(
            LocalBlock(channels, local_heads, window, shift) for shift in shifts
        )

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        local = x
        for block in self.locals:
            local = block(local, embedding)
        return self.globals(x) + local


class MSFormer(nn.Module):
    """Condition encoder: pixels (B, inputs, H, W) and balance map (B, 1, H, W) -> features.

    Sides are multiples of 8. There are three features, (B, 6 width, H/2, W/2), at 1/4 and at 1/8: a
    level's own 4 width and 2 width of the refined full size. The map goes down and up through the
    same convolutions as the features.
    """

    def __init__(self, inputs: int, config: UPTFlowConfig) -> None:
        super().__init__()
        w, conv = (
            config.encoder_width,
            functools.partial(nn.Conv2d, kernel_size=3, padding=1, bias=False),
        )
        self.embed = conv(inputs, w)
        self.encoders = nn.ModuleList(
            [Stage(w, 2, 1, config), Stage(2 * w, 2, 2, config), Stage(4 * w, 4, 4, config)]
        )
        self.downs = nn.ModuleList(
            nn.Sequential(conv(c, c // 2), nn.PixelUnshuffle(2)) for c in (w, 2 * w, 4 * w)
        )
        self.bottom = Stage(8 * w, 8, 8, config)
        self.eighth = nn.Conv2d(8 * w, 4 * w, 1, bias=False)
        self.ups = nn.ModuleList(
            nn.Sequential(conv(c, 2 * c), nn.PixelShuffle(2)) for c in (8 * w, 4 * w, 4 * w)
        )
        merged = ((8 * w, 4 * w), (4 * w, 4 * w), (3 * w, 2 * w))
        self.merges = nn.ModuleList(
            nn.Conv2d(before, after, 1, bias=False) for before, after in merged
        )
        self.decoders = nn.ModuleList(
            [Stage(4 * w, 4, 8, config), Stage(4 * w, 2, 4, config), Stage(2 * w, 2, 2, config)]
        )
        self.refine = nn.Sequential(
            *(GlobalBlock(2 * w, 2) for _ in range(config.refinement_blocks))
        )

    def forward(self, pixels: Tensor, balance: Tensor) -> list[Tensor]:
        x = self.embed(pixels)
        embedding, skips = balance.expand_as(x), []
        for encode, shrink in zip(self.encoders, self.downs, strict=True):
            skips.append(encode(x, embedding))
            x, embedding = shrink(skips[-1]), shrink(embedding)
        x = self.bottom(x, embedding)
        levels = [self.eighth(x)]
        for grow, merge, decode in zip(self.ups, self.merges, self.decoders, strict=True):
            x, embedding = merge(torch.cat([grow(x), skips.pop()], 1)), grow(embedding)
            # half as wide as x at 1/2
            embedding = embedding.repeat(1, x.shape[1] // embedding.shape[1], 1, 1)
            x = decode(x, embedding)
            levels.append(x)
        refined = self.refine(levels.pop())
        return [
            torch.cat([x, F.interpolate(refined, x.shape[-2:], mode="bilinear")], 1)
            for x in reversed(levels)
        ]


# Flow: the script's contract, forward gives (output, log_det of shape (B,)), inverse the input ----

PLAIN_STEPS = 2  # steps without coupling that open a level
SCALE_FLOOR = 3e-4


class ActNorm(nn.Module):
    """y = exp(s) (x + t) per channel, set by the first training batch to mean 0 and variance 1.

    Glow, section 3.1. `initialised` is a buffer: checkpoints and the averaged weights keep it, so
    that no resumed run sets them anew.
    """

    initialised: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(channels, 1, 1))
        self.log_scale = nn.Parameter(torch.zeros(channels, 1, 1))
        self.register_buffer("initialised", torch.tensor(False))

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Take shift and scale from a batch (B, C, H, W).

        A channel that hardly varies is scaled up by at most 1000.
        """
        mean = all_reduce(x.mean((0, 2, 3), keepdim=True)[0]) / world_size()
        variance = all_reduce(((x - mean) ** 2).mean((0, 2, 3), keepdim=True)[0]) / world_size()
        self.shift.copy_(-mean)
        self.log_scale.copy_(-0.5 * variance.clamp(min=1e-6).log())
        self.initialised.fill_(True)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.training and not self.initialised:
            self.initialise(x)
        return (x + self.shift) * self.log_scale.exp(), (
            self.log_scale.sum() * x.shape[2] * x.shape[3]
        ).expand(len(x))

    def inverse(self, y: Tensor, condition: Tensor | None = None) -> Tensor:
        return y * (-self.log_scale).exp() - self.shift


class CBAM(nn.Module):
    """x + x gated by channel and then by position, (B, C, H, W) to the same.

    CBAM, eq. 2 and 3, with a residual.
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        squeezed = max(1, channels // reduction)
        self.channel = nn.Sequential(
            nn.Linear(channels, squeezed), nn.ReLU(), nn.Linear(squeezed, channels)
        )
        self.position = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.channel(x.mean((2, 3))) + self.channel(x.amax((2, 3)))
        gated = x * gate.sigmoid()[:, :, None, None]
        ends = torch.cat([gated.amax(1, keepdim=True), gated.mean(1, keepdim=True)], 1)
        return x + gated * self.position(ends).sigmoid()


class ConditionalAffine(nn.Module):
    """y = (x + shift) scale, both of net(condition), with scale = sigmoid(s + 2) + 3e-4.

    Actnorm and 1x1 convolution expand. x (B, C, H, W), condition (B, inputs, H, W). The net has the
    public code's kernels, 1, 3 and 1, and starts at zero.
    """

    def __init__(self, channels: int, inputs: int, hidden: int) -> None:
        super().__init__()
        enter, last = nn.Conv2d(inputs, hidden, 1), ms.zero_init(nn.Conv2d(hidden, 2 * channels, 1))
        self.net = nn.Sequential(
            enter, nn.ReLU(), ms.conv3(hidden, hidden), nn.ReLU(), CBAM(hidden), last
        )

    def scale_and_shift(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift of the shape and precision of x."""
        shift, s = self.net(condition).to(x.dtype).chunk(2, dim=1)
        return torch.sigmoid(s + 2) + SCALE_FLOOR, shift

    def forward(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift = self.scale_and_shift(x, condition)
        return (x + shift) * scale, scale.log().flatten(1).sum(1)

    def inverse(self, y: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.scale_and_shift(y, condition)
        return y / scale - shift


class CrossCoupling(ConditionalAffine):
    """One half, with the features, moves the other; then they change places.

    Two in a row move every channel. x (B, C, H, W), condition (B, inputs, H, W).
    """

    def __init__(self, channels: int, inputs: int, hidden: int) -> None:
        super().__init__(channels // 2, channels // 2 + inputs, hidden)

    def forward(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        kept, moved = x.chunk(2, dim=1)
        moved, log_det = super().forward(moved, torch.cat([kept, condition], 1))
        return torch.cat([moved, kept], 1), log_det

    def inverse(self, y: Tensor, condition: Tensor) -> Tensor:
        moved, kept = y.chunk(2, dim=1)
        moved = super().inverse(moved, torch.cat([kept, condition], 1))
        return torch.cat([kept, moved], 1)


class CrossFlow(ms.Flow):
    """picture (B, 3, H, W) <-> latent (B, 192, H/8, W/8), given features at 1/2, 1/4 and 1/8.

    Of the script's flow it takes the fold over `layers`, each with the condition of its level, and
    no layer.
    """

    def __init__(self, steps: int, hidden: int, features: int) -> None:
        nn.Module.__init__(self)
        layers: list[nn.Module] = []
        self.levels: list[int] = []
        for level, channels in enumerate((12, 48, 192)):
            layers.append(ms.Squeeze())
            for step in range(PLAIN_STEPS + steps):
                layers += [ActNorm(channels), ms.InvertibleConv(channels)]
                for kind in (ConditionalAffine, CrossCoupling) * 2 if step >= PLAIN_STEPS else ():
                    layers.append(kind(channels, features, hidden))
            self.levels += [level] * (len(layers) - len(self.levels))
        self.layers = nn.ModuleList(layers)


# The model ----------------------------------------------------------------------------------------

MILESTONES = (0.4, 0.6, 0.8, 0.9)


def whole_blocks(image: Tensor) -> Tensor:
    """(B, C, H, W) cut at its right and bottom to sides that 8 divides.

    Padding would count in a likelihood.
    """
    return image[..., : image.shape[-2] // 8 * 8, : image.shape[-1] // 8 * 8]


class UPTFlow(ms.System):
    """p(high | low) by a flow on dequantised pixels in [0, 1]; its prior is N(0, I).

    As in LLFlow there is no logit map. 23.81 M parameters at the published size, where the paper
    counts 23.45 M: the script's 1x1 convolution keeps its two triangles in two full matrices, 0.39
    M more than one.
    """

    config_class = UPTFlowConfig
    method = "UPT-Flow"
    program = "-m baselines.upt_flow"
    recipe = "baselines/upt_flow.json"
    unused = ("num_flow_blocks", *ms.OWN_KEYS, *ms.TILE_KEYS)
    config: UPTFlowConfig

    def __init__(self, config: UPTFlowConfig) -> None:
        super().__init__(config)
        self.encoder = MSFormer(6 if config.histogram_input else 3, config)
        self.flow = CrossFlow(config.flow_steps, config.flow_channels, 6 * config.encoder_width)

    def learning_rate_at(self, progress: float, step: int) -> float:
        """Linear warm-up over warmup_steps; halved at 40, 60, 80 and 90 % of the run.

        `progress` is in [0, 1].
        """
        warm = min(1.0, (step + 1) / max(1, self.config.warmup_steps))
        return (
            self.config.learning_rate
            * warm
            * 0.5 ** sum(progress >= milestone for milestone in MILESTONES)
        )

    def condition(self, low: Tensor) -> list[Tensor]:
        """Features at 1/2, 1/4 and 1/8 of `low` (B, 3, H, W) in [0, 1], sides multiples of 8."""
        shown = [(low + 1e-3).log() if self.config.log_input else low]
        shown += [equalise(low)] if self.config.histogram_input else []
        return self.encoder(torch.cat(shown, 1), balance_map(low))

    def bits(self, high: Tensor, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(bits per dimension (B,), latent) of `high` (B, 3, H, W), sides multiples of 8."""
        latent, log_det = self.flow(ms.dequantise(high, torch.rand_like(high[:1])), features)
        zero = latent.new_zeros(())
        return (
            ms.to_bits_per_dim(ms.gaussian_log_prob(latent, zero, zero) + log_det, high[0].numel()),
            latent,
        )

    def losses(self, batch: ms.Sample) -> dict[str, Tensor]:
        """Named, weighted terms of the training loss, scalars; terms of weight 0 are left out."""
        config, low, high = self.config, whole_blocks(batch.low), whole_blocks(batch.high)
        features, terms = self.condition(low), {}
        if config.nll_weight:
            terms["nll"] = config.nll_weight * self.bits(high, features)[0].mean()
        if config.l1_weight or config.ssim_weight or config.colour_weight:
            y = self.flow.inverse(self.latent(high), features)
            terms |= ms.picture_losses(ms.requantise(y), high, config)
            # before the clamp, which would give no gradient where the picture is black or white
            if config.l1_weight:
                terms["l1"] = config.l1_weight * F.l1_loss(
                    y, ms.dequantise(high, torch.full_like(high, 0.5))
                )
        return terms

    def latent(self, image: Tensor, temperature: float = 0.0) -> Tensor:
        """(B, 192, H/8, W/8) for pictures like `image`.

        The prior's mean 0, or a draw of deviation `temperature`.
        """
        zeros = image.new_zeros(len(image), 192, image.shape[-2] // 8, image.shape[-1] // 8)
        return temperature * torch.randn_like(zeros) if temperature else zeros

    def bits_per_dim(self, high: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
        """(bits per dimension (B,), latent) of `high` given `low`, (B, 3, H, W) in [0, 1].

        Sides are cut to multiples of 8.
        """
        return self.bits(whole_blocks(high), self.condition(whole_blocks(low)))

    def enhance(self, low: Tensor, temperature: float = 0.0) -> Tensor:
        """Enhanced pictures (B, 3, H, W) in [0, 1] of `low`, any sides of at least 16.

        Above `temperature` 0 they vary.
        """
        padded = pad_to_multiple(low, 8)
        y = self.flow.inverse(self.latent(padded, temperature), self.condition(padded))
        return ms.requantise(y)[..., : low.shape[-2], : low.shape[-1]]

    def pictures(self, low: Tensor) -> dict[str, Tensor]:
        """The balance map of `low`, (B, 3, H, W): black where colour was lost."""
        return {"balance": balance_map(low).expand_as(low)}


if __name__ == "__main__":
    sys.exit(ms.main(system=UPTFlow))
