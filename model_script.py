"""Dark photographs made well-exposed and colour-true by a conditional normalizing flow.

One script, in the order of a paper: configuration, data, flow, model, losses, training, from pixels
to pixels, triptychs, evaluation, enhancement, demo, command line. The rest is in support/.

Words used throughout
    low        dark photograph, float RGB in [0, 1], shape (B, 3, H, W)
    high       its well-exposed target, same shape and range
    enhanced   our estimate of `high`
    condition  everything the flow may know: features of `low` and the prior mean
    latent     z = flow(high | condition), as many numbers as `high` has

Model: p(high | low) by an exact bijection high <-> z under the prior N(mu(low), sigma^2 I).
Enhancement decodes z = mu(low); sampling around mu gives alternatives.

References
    Dinh et al., Density estimation using Real NVP, ICLR 2017
        affine couplings, squeezes, the logit mapping
    Kingma & Dhariwal, Glow, NeurIPS 2018
        invertible 1x1 convolutions with an LU factorisation
    Wang et al., Low-Light Image Enhancement with Normalizing Flow (LLFlow), AAAI 2022
        the conditional prior mean
    Tian, Wang et al., Enhancing Low-Light Images Using Infrared Encoded Images (ELIEI), ICIP 2023
        the data, the colour loss
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from support import (
    cameras,
    checkpoints,
    commands,
    files,
    known,
    metrics,
    notices,
    pictures,
    processes,
    resumes,
    settings,
    simulated,
)
from support.convolutions import Conv3
from support.curves import curves_in, evaluation_curves
from support.decoding import SUFFIXES, read_image, read_picture
from support.extra_metrics import ExtraMetric, extra_scores, load_extra
from support.folders import enhance_row, find_jobs, means_many, tell_row, work_off
from support.loaded import Loaded
from support.outputs import check_outputs, read_output, with_outputs
from support.pairs import PairStore, evaluation_pairs, training_data
from support.pictures import resize, to_tensor, to_uint8, to_uint16
from support.plans import Draw, batch_plan, epoch_steps, source_plan, spread, unaltered
from support.processes import progress_style, rank
from support.runtime import Runtime, choose_runtime, commits, compiled, git_commit
from support.scenes import training_twins
from support.scored import Scored, overview, score_levels
from support.settings import RunError, UserError, knob
from support.tiles import NO_RIM, RIM, latent_noise, plan_tiles, with_rim

# --------------------------------------------------------------------------------------------------
# Configuration. Each key states its meaning and range once; --help, errors and tests read it here.
# --------------------------------------------------------------------------------------------------

RELEASED = Path(__file__).resolve().parent / "checkpoints" / "released.pth"
ARCHIVE_TRAIN = "train-20241116T084056Z-001/train-20241116T084056Z-001/train"
ARCHIVE_EVAL = "eval-20241116T084057Z-001/eval-20241116T084057Z-001/eval"
WHICH_CAMERA = ("auto", *cameras.CAMERAS)
KERNELS = ("triangle", "inverse_quadratic")


@dataclasses.dataclass
class Config:
    """What shapes a model and its training; it is stored with the weights."""

    use_amp: bool = knob(False, "mixed precision, where the processor is good at bf16 or fp16")
    seed: int = knob(0, "seed of split, weights, augmentation and samples", 0, 2**31 - 1)
    # data
    train_low_dir: str = knob(f"{ARCHIVE_TRAIN}/low", "dark training photographs")
    train_high_dir: str = knob(f"{ARCHIVE_TRAIN}/high", "their targets, paired by file stem")
    val_low_dir: str = knob("", "dark validation photographs; empty: split off by scene")
    val_high_dir: str = knob("", "their targets")
    sources: list[dict] = knob([], "several sets of pairs in place of these; see docs/training.md")
    epoch_samples: int = knob(0, "sources: an epoch has this / batch_size steps; 0: all", 0, 10**9)
    val_pairs: int = knob(0, "with sources: validation pairs of each; 0: all", 0, 10**9)
    val_fraction: float = knob(0.1, "share of the pairs to split off, whole scenes", 0.0, 0.9)
    scene_similarity: float = knob(0.85, "correlation of targets that show one scene", 0.0, 1.0)
    image_size: list[int] = knob([128, 128], "height,width of resized whole pictures", 16, 8192)
    crop_size: int = knob(0, "side of training crops, a multiple of 8; 0: resize pictures", 0, 4096)
    crop_scales: list[float] = knob([1.0, 0.5, 0.0], "drawn evenly; 0: the whole picture", 0.0, 1.0)
    whole_share: float = knob(0.0, "with crops: share of batches of whole pictures", 0.0, 1.0)
    whole_batch: int = knob(0, "with sources: size of whole batches; 0: batch_size", 0, 4096)
    window_min: float = knob(0.45, "augmentation: least side of what is taken as whole", 0.1, 1.0)
    flips: bool = knob(True, "augmentation: mirror, and transpose square inputs")
    exposure_gain: float = knob(0.3, "augmentation: gain on low, in stops either way", 0.0, 4.0)
    channel_gain: float = knob(0.05, "augmentation: gain per channel of low, relative", 0.0, 0.9)
    identity_share: float = knob(0.0, "share of samples whose low is high: no change", 0.0, 1.0)
    paste_share: float = knob(0.0, "share of samples with parts of high pasted into low", 0.0, 1.0)
    jpeg_share: float = knob(0.0, "share of samples whose low has been a JPEG file", 0.0, 1.0)
    mixup_share: float = knob(0.0, "share of samples mixed with another in linear light", 0.0, 1.0)
    # model
    flow_channels: int = knob(96, "width of couplings; branches half", 8, 1024, architecture=True)
    global_channels: int = knob(0, "of the global branch; 0: the same", 0, 1024, architecture=True)
    num_flow_blocks: int = knob(2, "flow steps at each of two scales", 1, 64, architecture=True)
    thumbnail_size: int = knob(128, "side of the global branch's view", 32, 512, architecture=True)
    global_dropout: float = knob(0.1, "channel dropout inside the global branch", 0.0, 0.9)
    # losses
    nll_weight: float = knob(0.5, "weight of the NLL, in bits per dimension", 0.0, 1e6)
    l1_weight: float = knob(10.0, "weight of |enhanced - high|", 0.0, 1e6)
    ssim_weight: float = knob(1.0, "weight of 1 - SSIM(enhanced, high)", 0.0, 1e6)
    gt_mean_spread: float = knob(0.0, "GT-mean loss: relative spread of the means; 0: off", 0, 10)
    nll_every: int = knob(1, "steps between two that compute the likelihood", 1, 1000)
    colour_weight: float = knob(2.0, "weight of the colour histograms' distance", 0.0, 1e6)
    histogram_bins: int = knob(64, "bins of the colour histograms", 2, 1024)
    histogram_kernel: str = knob("triangle", "assignment of values to bins", choices=KERNELS)
    histogram_sigma: float = knob(0.002, "width of the inverse_quadratic kernel", 1e-6, 100.0)
    histogram_size: int = knob(40, "side to which pictures are averaged before that", 1, 4096)
    teacher: str = knob("", "checkpoint whose pictures are learned, too")
    teacher_share: float = knob(0.5, "their share of l1, ssim and colour", 0.0, 1.0)
    # training
    batch_size: int = knob(1, "pictures or crops per step, of all processes together", 1, 4096)
    accumulate: int = knob(1, "parts of a batch, one after another, to save memory", 1, 4096)
    num_epochs: int = knob(30, "passes over the training pairs", 1, 1_000_000)
    max_minutes: float = knob(0.0, "stop after so many minutes; 0: no limit", 0.0, 1e6)
    learning_rate: float = knob(2e-4, "peak learning rate of AdamW", 1e-8, 1.0)
    global_rate: float = knob(1.0, "the global branch's learning rate, relative", 0.0, 100.0)
    warmup_steps: int = knob(100, "linear warm-up, then cosine decay to 1 %", 0, 10_000_000)
    weight_decay: float = knob(1e-4, "decoupled weight decay of AdamW", 0.0, 1.0)
    gradient_clip: float = knob(1.0, "largest norm of the gradient", 1e-6, 1e6)
    ema_decay: float = knob(0.997, "decay of the averaged weights; 0: off", 0.0, 0.999999)
    val_freq: int = knob(1, "epochs between validations", 1, 1_000_000)
    save_freq: int = knob(1, "epochs between checkpoints", 1, 1_000_000)
    keep_checkpoints: int = knob(3, "newest epoch checkpoints kept", 1, 1_000_000)
    init_from: str = knob("", "checkpoint to start from; of two networks the ordinary one")
    checkpoint_dir: str = knob("checkpoints", "where a training's weights go")
    log_dir: str = knob("logs", "where its TensorBoard logs go")

    def __post_init__(self) -> None:
        """Rules that no single key can state. Raises UserError."""
        if len(self.image_size) != 2:
            raise UserError(f"image_size must be height,width in [16, 8192], got {self.image_size}")
        if self.crop_size % 8 or 0 < self.crop_size < 32:
            allowed = "0 or a multiple of 8 in [32, 4096]"
            raise UserError(f"crop_size must be {allowed}, got {self.crop_size}")
        for key, step in (("thumbnail_size", 16), ("flow_channels", 8), ("global_channels", 8)):
            if getattr(self, key) % step:
                raise UserError(f"{key} must be a multiple of {step}, got {getattr(self, key)}")
        if bool(self.val_low_dir) != bool(self.val_high_dir):
            raise UserError("val_low_dir and val_high_dir must be given together")
        if not self.val_low_dir and not self.sources and self.val_fraction == 0:
            raise UserError("val_fraction must be above 0 where no val_low_dir is named")
        if self.identity_share + self.paste_share > 1:
            raise UserError("identity_share and paste_share must sum to at most 1")
        nll = self.nll_weight if self.nll_every == 1 else 0.0  # else most steps are without it
        if not any((nll, self.l1_weight, self.ssim_weight, self.colour_weight)):
            hint = "raise l1_weight, ssim_weight or colour_weight, or nll_weight with nll_every=1"
            raise UserError(f"a step has no loss: {hint}")


@dataclasses.dataclass
class Use:
    """How a model is used: where to compute, what to score, what to write; never stored."""

    device: str = knob("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    camera: str = knob("auto", "which released network; auto: by the picture", choices=WHICH_CAMERA)
    compile: bool = knob(False, "train: by torch.compile; needs a C++ compiler")
    num_workers: int = knob(0, "train: data loading processes; 0 loads in the main one", 0, 64)
    pin_memory: bool = knob(False, "train: page-locked batches, for faster copies to CUDA")
    cache_megabytes: int = knob(1024, "memory for decoded pictures", 0, 1_000_000)
    on_bad_file: str = knob("error", "bad files: stop, or leave out", choices=("error", "skip"))
    eval_low_dir: str = knob(f"{ARCHIVE_EVAL}/low", "dark evaluation photographs")
    eval_high_dir: str = knob(f"{ARCHIVE_EVAL}/high", "their targets; empty: score without any")
    outputs_dir: str = knob("", "evaluate: score this folder's pictures, which another method made")
    extra_metrics: str = knob("", "evaluate: further scores, by pyiqa, such as niqe,musiq,lpips")
    scenes: str = knob("", "evaluate: only these file stems, separated by commas; empty: all")
    eval_size: str = knob("auto", "native, or height,width; auto: as the model was trained")
    results_dir: str = knob("results", "where evaluations go")
    temperature: float = knob(0.0, "in prior deviations; 0: the mean, and samples at 1", 0.0, 10.0)
    samples: int = knob(0, "enhance: alternatives to draw beside the best answer", 0, 64)
    uncertainty: bool = knob(False, "enhance: also the deviation over samples (16 if below 2)")
    exposure: float = knob(0.0, "enhance: brighten (or darken, below 0), in stops", -6.0, 6.0)
    strength: float = knob(1.0, "enhance: 1: all of it; 0: the input; between: mixed", 0.0, 1.0)
    denoise: float = knob(0.0, "0: as it is; 1: less noise where the picture is flat", 0.0, 1.0)
    reference: str = knob("", "enhance: a picture whose mean brightness the result takes")
    overwrite: bool = knob(False, "enhance, folders: do again all that is there")
    quality: int = knob(95, "enhance: quality of JPEG and WebP files", 1, 100)
    tile_size: int = knob(0, "side of a large picture's tiles, a multiple of 8; 0: auto", 0, 65536)
    memory_megabytes: int = knob(600, "memory for the work on one tile", 64, 1_000_000)

    def __post_init__(self) -> None:
        """Rules that no single key can state. Raises UserError."""
        if self.tile_size % 8 or 0 < self.tile_size < 64:
            hint = "0 or a multiple of 8 in [64, 65536]"
            raise UserError(f"tile_size must be {hint}, got {self.tile_size}")
        self.size_to_score(None)  # raises what is wrong with eval_size

    @property
    def drawn(self) -> int:
        """How many samples are drawn of a picture; the uncertainty alone takes 16."""
        return self.samples if self.samples > 1 or not self.uncertainty else 16

    def size_to_score(self, config: Config | None) -> tuple[int, int] | None:
        """(height, width) that pictures are scored at; None for their own. Raises UserError."""
        as_trained = self.eval_size == "auto" and not self.outputs_dir
        if as_trained and config and not config.crop_size:
            return config.image_size[0], config.image_size[1]
        return settings.read_size("eval_size", self.eval_size)


# keys that another system may have no use for, and names in its `unused`
OWN_KEYS = ("global_channels", "global_dropout", "thumbnail_size", "teacher", "teacher_share")
FLOW_KEYS = ("flow_channels", "num_flow_blocks", *OWN_KEYS)
HISTOGRAM_KEYS = ("histogram_bins", "histogram_kernel", "histogram_sigma", "histogram_size")
LOSS_KEYS = ("nll_weight", "l1_weight", "ssim_weight", "colour_weight", *HISTOGRAM_KEYS)
TILE_KEYS = ("tile_size", "memory_megabytes")


# --------------------------------------------------------------------------------------------------
# Data: pairs by stem, split by scene, cached as uint8, served resized or as native-resolution crops
# --------------------------------------------------------------------------------------------------


class Sample(NamedTuple):
    """A batch, or one item of it before collation. Values in [0, 1] but `box`.

    low, high: (B, 3, h, w), the pixels the local branch sees; thumbnail: (B, 3, t, t), the whole
    picture, low; box: (B, 4), left, top, right, bottom of `low` in the whole picture, in [0, 1].
    """

    low: Tensor
    high: Tensor
    thumbnail: Tensor
    box: Tensor


WHOLE_BOX = (0.0, 0.0, 1.0, 1.0)


class TrainingSamples(Dataset):
    """Augmented samples; the item of a Draw is a pure function of the seed, so it repeats."""

    def __init__(self, store: PairStore, indices: Sequence[int], config: Config) -> None:
        self.store, self.indices, self.config = store, indices, config
        self.members = store.by_source(indices)
        self.darken = {item["name"]: item["darken"] for item in config.sources}

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, draw: Draw | tuple[int, int]) -> Sample:
        epoch, index, whole, turn = Draw(*draw)
        key = (self.config.seed, epoch, index, *([turn] if turn else []))
        rng = np.random.default_rng(key)
        low, high = self.store[self.indices[index]]
        top, left, height, width = self._window(low.shape, rng)
        window = (slice(top, top + height), slice(left, left + width))
        own = np.random.default_rng((*key, 2**31))  # crops and gains have the other
        low, high, well_exposed = self._alter(low, high, window, index, own)
        pair = torch.stack([to_tensor(low), to_tensor(high)])
        if self.config.crop_size and not whole:
            pixels, box = self._crop(pair, rng)
        else:
            pixels, box = resize(pair, self.config.image_size, quantise=True), WHOLE_BOX
        thumbnail = resize(pair[:1], [self.config.thumbnail_size] * 2)[0]
        sample = Sample(pixels[0], pixels[1], thumbnail, torch.tensor(box))
        return self._augment(sample, rng, keep_exposure=well_exposed)

    def _alter(
        self,
        low: np.ndarray,
        high: np.ndarray,
        window: tuple[slice, slice],
        index: int,
        rng: np.random.Generator,
    ) -> tuple[np.ndarray, np.ndarray, bool]:
        """The window of low and of high, made anew as the config's shares say, and whether low's
        exposure must stay: what is well exposed is to be left alone."""
        config, shape = self.config, low.shape
        source = self.store.pairs[self.indices[index]].source
        low, high = low[window], high[window]
        if self.darken.get(source) and rng.random() < self.darken[source]:
            low, high = simulated.darkened(high, rng)
        elif config.jpeg_share and rng.random() < config.jpeg_share:
            low = simulated.as_jpeg(low, rng)
        if config.mixup_share and rng.random() < config.mixup_share:
            other = self.store[self.indices[int(rng.choice(self.members[source]))]]
            if other[0].shape == shape:
                weight = rng.beta(1.2, 1.2)
                low = simulated.mix_light(low, other[0][window], weight)
                high = simulated.mix_light(high, other[1][window], weight)
        chance = rng.random()
        if chance < config.identity_share:
            return high, high, True
        if chance < config.identity_share + config.paste_share:
            return simulated.paste_bright(low, high, rng), high, True
        return low, high, False

    def _window(
        self, shape: tuple[int, ...], rng: np.random.Generator
    ) -> tuple[int, int, int, int]:
        """Top, left, height, width of a part that is taken for a whole picture, thumbnail and all:
        the global branch sees more different pictures than there are."""
        least, (height, width) = self.config.window_min, shape[:2]
        tall, wide = (max(16, round(side * rng.uniform(least, 1))) for side in (height, width))
        top, left = int(rng.integers(0, height - tall + 1)), int(rng.integers(0, width - wide + 1))
        return top, left, tall, wide

    def _crop(self, pair: Tensor, rng: np.random.Generator) -> tuple[Tensor, tuple[float, ...]]:
        """A crop_size square of a (2, 3, H, W) pair at one of crop_scales, and its box."""
        crop, (height, width) = self.config.crop_size, pair.shape[-2:]
        scale = float(rng.choice(self.config.crop_scales))
        if scale == 0:
            return resize(pair, (crop, crop), quantise=True), WHOLE_BOX
        side = min(round(crop / scale), height, width)
        top, left = int(rng.integers(0, height - side + 1)), int(rng.integers(0, width - side + 1))
        cut = pair[..., top : top + side, left : left + side]
        box = (left / width, top / height, (left + side) / width, (top + side) / height)
        return resize(cut, (crop, crop), quantise=True), box

    def _augment(self, sample: Sample, rng: np.random.Generator, keep_exposure: bool) -> Sample:
        """Gains on low and thumbnail; mirrored and transposed with the box."""
        config, (low, high, thumbnail) = self.config, sample[:3]
        flip_x, flip_y, swap = (bool(x) for x in rng.integers(0, 2, 3))
        gain = 2.0 ** (config.exposure_gain * rng.uniform(-1, 1))
        gains = torch.tensor(
            gain * (1 + config.channel_gain * rng.uniform(-1, 1, 3)), dtype=torch.float32
        )[:, None, None]
        if not keep_exposure:
            low, thumbnail = (low * gains).clamp(0, 1), (thumbnail * gains).clamp(0, 1)
        left, top, right, bottom = sample.box.tolist()
        images = [low, high, thumbnail]
        if config.flips and flip_x:
            images, (left, right) = [image.flip(-1) for image in images], (1 - right, 1 - left)
        if config.flips and flip_y:
            images, (top, bottom) = [image.flip(-2) for image in images], (1 - bottom, 1 - top)
        if config.flips and swap and low.shape[-1] == low.shape[-2]:
            images = [image.mT for image in images]
            left, top, right, bottom = top, left, bottom, right
        low, high, thumbnail = (image.contiguous() for image in images)
        return Sample(low, high, thumbnail, torch.tensor([left, top, right, bottom]))


# --------------------------------------------------------------------------------------------------
# Flow. Every layer: forward(x, condition) -> (y, log_det of shape (B,)), inverse(y, condition) -> x
# --------------------------------------------------------------------------------------------------

SCALE_BOUND = 0.5


class LogitMap(nn.Module):
    """[0, 1] <-> the flow's space: v = logit(a + (1 - 2a) y), Dinh et al. 2017, section 4.1.

    `a` = 0.05 keeps v within +-2.95, so that black and white are near, not at infinity.
    """

    def __init__(self, alpha: float = 0.05) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, y: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        p = self.alpha + (1 - 2 * self.alpha) * y
        log_det = math.log(1 - 2 * self.alpha) - p.log() - (1 - p).log()
        return p.logit(), log_det.flatten(1).sum(1)

    def inverse(self, v: Tensor, condition: Tensor | None = None) -> Tensor:
        return (v.sigmoid() - self.alpha) / (1 - 2 * self.alpha)


class Squeeze(nn.Module):
    """(B, C, H, W) <-> (B, 4C, H/2, W/2): space to depth, volume-preserving."""

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return F.pixel_unshuffle(x, 2), x.new_zeros(len(x))

    def inverse(self, y: Tensor, condition: Tensor | None = None) -> Tensor:
        return F.pixel_shuffle(y, 2)


class InvertibleConv(nn.Module):
    """1x1 convolution with W = L (U + diag(exp(d))), Kingma & Dhariwal 2018, eq. 10 without its
    fixed permutation.

    It starts as the identity: the latent starts in the layout of the squeezed picture, so that the
    branches can predict the prior mean as they would predict a picture.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.lower = nn.Parameter(torch.zeros(channels, channels))
        self.upper = nn.Parameter(torch.zeros(channels, channels))
        self.log_diagonal = nn.Parameter(torch.zeros(channels))

    def weight(self) -> Tensor:
        lower = self.lower.tril(-1) + torch.ones_like(self.log_diagonal).diag()
        return lower @ (self.upper.triu(1) + self.log_diagonal.exp().diag())

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_det = self.log_diagonal.sum() * x.shape[2] * x.shape[3]
        # bf16 here would cost the bijection its exactness
        with torch.autocast(x.device.type, enabled=False):
            return F.conv2d(x, self.weight()[:, :, None, None]), log_det.expand(len(x))

    def inverse(self, y: Tensor, condition: Tensor | None = None) -> Tensor:
        with torch.autocast(y.device.type, enabled=False):
            return F.conv2d(y, torch.linalg.inv(self.weight())[:, :, None, None])


class Coupling(nn.Module):
    """Affine coupling y_b = x_b exp(s) + t with (s, t) = net(x_a, condition), s = 0.5 tanh(.)
    (bounded: stable inverse).

    `first` says which half is changed; blocks alternate, so that two of them change every channel.
    """

    def __init__(self, channels: int, condition_channels: int, hidden: int, first: bool) -> None:
        super().__init__()
        half = channels // 2
        self.first = first
        self.from_half = conv3(half, hidden)
        self.from_condition = nn.Conv2d(condition_channels, hidden, 1)
        self.mix = nn.Conv2d(hidden, hidden, 1)
        self.out = zero_init(conv3(hidden, 2 * half))

    def scale_and_shift(self, kept: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """log-scale in [-0.5, 0.5] and shift, each of the shape and type of the kept half."""
        hidden = silu(self.from_half(kept) + self.from_condition(condition))
        scale, shift = self.out(silu(self.mix(hidden))).to(kept.dtype).chunk(2, dim=1)
        return SCALE_BOUND * torch.tanh(scale), shift

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.chunk(2, dim=1)
        return (b, a) if self.first else (a, b)

    def _join(self, kept: Tensor, changed: Tensor) -> Tensor:
        return torch.cat((changed, kept) if self.first else (kept, changed), dim=1)

    def forward(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        kept, changed = self._split(x)
        scale, shift = self.scale_and_shift(kept, condition)
        return self._join(kept, changed * scale.exp() + shift), scale.flatten(1).sum(1)

    def inverse(self, y: Tensor, condition: Tensor) -> Tensor:
        kept, changed = self._split(y)
        scale, shift = self.scale_and_shift(kept, condition)
        return self._join(kept, (changed - shift) * (-scale).exp())


class Flow(nn.Module):
    """picture in [0, 1] (B, 3, H, W) <-> latent (B, 48, H/4, W/4); H and W multiples of 4.

    Logit map, squeeze, flow steps at 1/2, squeeze, flow steps at 1/4; a step is a 1x1 convolution
    and a coupling. `condition` is a pair: features at 1/2 and at 1/4.
    """

    def __init__(self, blocks: int, hidden: int, half_channels: int, quarter_channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [LogitMap()]
        self.levels = [0]  # which of the two conditions each layer gets
        widths = (12, half_channels), (48, quarter_channels)
        for level, (channels, condition) in enumerate(widths):
            layers.append(Squeeze())
            for block in range(blocks):
                coupling = Coupling(channels, condition, hidden, first=block % 2 == 1)
                layers += [InvertibleConv(channels), coupling]
            self.levels += [level] * (1 + 2 * blocks)
        self.layers = nn.ModuleList(layers)

    def forward(self, y: Tensor, condition: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        total = y.new_zeros(len(y))
        for layer, level in zip(self.layers, self.levels, strict=True):
            y, log_det = layer(y, condition[level])
            total = total + log_det
        return y, total

    def inverse(self, z: Tensor, condition: Sequence[Tensor]) -> Tensor:
        layers: Iterable[Any] = reversed(self.layers)
        for layer, level in zip(layers, reversed(self.levels), strict=True):
            z = layer.inverse(z, condition[level])
        return z


# --------------------------------------------------------------------------------------------------
# Model: the global branch knows the colour, the local branch the detail, the flow the rest
# --------------------------------------------------------------------------------------------------


def conv3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """3x3 convolution that keeps the size (or halves it with stride 2)."""
    return Conv3(inputs, outputs, stride)


def zero_init(layer: nn.Conv2d) -> nn.Conv2d:
    """The layer, starting at zero, so that what it feeds starts as the identity."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class ChannelDropout(nn.Module):
    """Dropout of whole channels, one draw for all of a batch, however that is divided."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and self.rate):
            return x
        return x * F.dropout(x.new_ones(1, x.shape[1], 1, 1), self.rate)


def silu(x: Tensor) -> Tensor:
    """x sigmoid(x); without gradients in the memory of `x`, which must have no other use."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


class ResidualBlock(nn.Module):
    """x + conv(silu(conv(silu(x)))); no norm, so that a crop gives the whole's values."""

    def __init__(self, channels: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.second = conv3(channels, channels), zero_init(conv3(channels, channels))
        self.dropout = ChannelDropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.dropout(silu(self.first(F.silu(x)))))


class SelfAttention(nn.Module):
    """Residual multi-head attention over all positions of (B, C, H, W); GroupNorm before it."""

    def __init__(self, channels: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(heads, channels)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        qkv = self.to_qkv(self.norm(x)).reshape(b, 3, self.heads, c // self.heads, h * w).mT
        mixed = F.scaled_dot_product_attention(*qkv.unbind(1))  # (B, heads, HW, C / heads)
        return x + self.out(mixed.mT.reshape(b, c, h, w))


def low_features(low: Tensor, brightness: Tensor, *further: Tensor) -> Tensor:
    """(B, 3C + ..., H, W): low (B, C, H, W), its logarithm, its ratio to `brightness` (B, 1, 1, 1),
    and what else is known of its pixels.

    The logarithm, in [0, 1], opens up a dark sensor's few counts. The ratio is the same whatever
    the exposure; beyond 16 times the mean it says no more.
    """
    logarithm, ratio = (low * 255 + 1).log2() / 8, (low / (4 * brightness)).clamp(max=4)
    return torch.cat([low, logarithm, ratio, *further], dim=1)


def shares_of_cells(start: Tensor, end: Tensor, count: int, cells: int) -> Tensor:
    """(B, count, cells): how much each cell counts at each pixel; a pixel's shares sum to 1.

    `count` pixels lie evenly from start to end (B,), where the cells fill [0, 1]. Linear between
    the cells' centres; beyond the outermost ones their values hold.
    """
    pixels, centres = (
        torch.arange(n, dtype=start.dtype, device=start.device) for n in (count, cells)
    )
    place = start[:, None] + (end - start)[:, None] * (pixels + 0.5) / count
    place = (place * cells - 0.5).clamp(0, cells - 1)
    return (1 - (place[..., None] - centres).abs()).clamp(min=0)


def sample_grid(grid: Tensor, box: Tensor, size: Sequence[int]) -> Tensor:
    """(B, C, h, w) of a grid (B, C, g, g), at the pixel centres of `box` (B, 4) in [0, 1].

    F.grid_sample, bilinear, with align_corners=False and padding_mode="border", as two matrix
    products: the pixels form a grid, too. Faster, and in channels_last.
    """
    left, top, right, bottom = box.to(grid.dtype).unbind(1)
    rows = shares_of_cells(top, bottom, size[0], grid.shape[-2])
    columns = shares_of_cells(left, right, size[1], grid.shape[-1])
    with torch.autocast(grid.device.type, enabled=False):
        narrow = columns[:, None] @ grid.permute(0, 2, 3, 1)  # (B, g, w, C)
        return (rows @ narrow.flatten(2)).unflatten(2, (size[1], -1)).permute(0, 3, 1, 2)


class GlobalBranch(nn.Module):
    """Thumbnail (B, 3, t, t) -> (features (B, local_width, t/4, t/4), colour (B, 3, t/4, t/4) in
    the flow's space).

    Illumination, white balance and exposure are questions about the whole picture; a U-Net with
    self-attention at t/8 and t/16.
    """

    def __init__(self, width: int, local_width: int, dropout: float) -> None:
        super().__init__()
        w1, w2, w3, w4 = width // 3 * 2, width // 3 * 4, width // 3 * 8, width * 4
        self.stem = nn.Sequential(conv3(4 * 9, w1), ResidualBlock(w1))  # t/2
        block = partial(ResidualBlock, dropout=dropout)
        self.down2 = nn.Sequential(conv3(w1, w2, 2), block(w2), block(w2))  # t/4
        self.down3 = nn.Sequential(conv3(w2, w3, 2), block(w3), SelfAttention(w3), block(w3))  # t/8
        # t/16
        self.down4 = nn.Sequential(conv3(w3, w4, 2), block(w4), SelfAttention(w4), block(w4))
        self.up3 = nn.Sequential(conv3(w4, w3), nn.Upsample(scale_factor=2, mode="nearest"))
        self.mix3 = nn.Sequential(block(w3), SelfAttention(w3))
        self.up2 = nn.Sequential(conv3(w3, w2), nn.Upsample(scale_factor=2, mode="nearest"))
        self.mix2 = block(w2)
        self.features = nn.Conv2d(w2, local_width, 1)
        self.colour = zero_init(conv3(w2, 3))

    def forward(self, thumbnail: Tensor, brightness: Tensor) -> tuple[Tensor, Tensor]:
        x1 = self.stem(F.pixel_unshuffle(low_features(thumbnail, brightness), 2))
        x2 = self.down2(x1)
        x3 = self.down3(x2)
        x3 = self.mix3(x3 + self.up3(self.down4(x3)))
        x2 = self.mix2(x2 + self.up2(x3))
        return self.features(x2), self.colour(x2)


class LocalBranch(nn.Module):
    """Squeezed pixels (B, 12, H/2, W/2), and what the global branch says at their place, features
    (B, width, H/4, W/4) and squeezed colour (B, 12, H/2, W/2) -> features at 1/2 and 1/4, residual
    (B, 12, H/2, W/2).

    Fully convolutional with a bounded receptive field: a crop, a tile and the whole picture agree
    away from their rims.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        w1, w2, w3 = width, 2 * width, 4 * width
        self.stem = nn.Sequential(conv3(4 * 9 + 12, w1), ResidualBlock(w1))  # 1/2
        self.down2 = conv3(w1, w2, 2)  # 1/4
        self.from_grid = nn.Conv2d(width, w2, 1)
        self.mix2 = ResidualBlock(w2)
        self.down3 = nn.Sequential(conv3(w2, w3, 2), ResidualBlock(w3), ResidualBlock(w3))  # 1/8
        self.up2 = nn.Sequential(conv3(w3, w2), nn.Upsample(scale_factor=2, mode="nearest"))
        self.out2 = ResidualBlock(w2)
        self.up1 = nn.Sequential(nn.Conv2d(w2, w1, 1), nn.Upsample(scale_factor=2, mode="nearest"))
        self.out1 = nn.Sequential(ResidualBlock(w1), ResidualBlock(w1))
        self.residual = zero_init(conv3(w1, 12))

    def forward(
        self, low: Tensor, brightness: Tensor, grid: Tensor, colour: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        x1 = self.stem(low_features(low, brightness, colour))
        x2 = self.mix2(self.down2(x1) + self.from_grid(grid))
        x2 = self.out2(x2 + self.up2(self.down3(x2)))
        x1 = self.out1(x1 + self.up1(x2))
        return x1, x2, self.residual(F.silu(x1))


class Survey(NamedTuple):
    """What the global branch says of a whole picture, from its thumbnail (B, 3, t, t).

    brightness: (B, 1, 1, 1), its mean; grid: (B, C, t/4, t/4), features; colour: (B, 3, t/4, t/4),
    in the flow's space.
    """

    brightness: Tensor
    grid: Tensor
    colour: Tensor


class Condition(NamedTuple):
    """All that the flow knows of `low` (B, 3, H, W), which was padded to multiples of 8 and may
    have a rim of mirrored pixels.

    prior_mean: (B, 48, H/4, W/4), in the latent's layout; features: at 1/2 and at 1/4; size: (H, W)
    before the padding; corner: (top, left) of `low` within its rim.
    """

    prior_mean: Tensor
    features: tuple[Tensor, Tensor]
    size: tuple[int, int]
    corner: tuple[int, int] = (0, 0)


def dequantise(image: Tensor, noise: Tensor) -> Tensor:
    """8-bit levels x in [0, 1], uniform noise u in [0, 1) -> y = (255 x + u) / 256 in [0, 1)."""
    return (image * 255 + noise) / 256


def requantise(y: Tensor) -> Tensor:
    """The level in [0, 1] whose bin has `y` as its centre: `dequantise` at u = 1/2, inverted."""
    return ((y * 256 - 0.5) / 255).clamp(0, 1)


class System(nn.Module):
    """What training, evaluation and enhancement ask of a model.

    A subclass is built from its config alone. It must have `losses` and `enhance`; the rest is
    there to be overridden.
    """

    config_class: ClassVar[type[Config]] = Config
    system = ""  # the name that its checkpoints carry; empty: the class's
    # for --help: what it is, how it is called, its recipe, the shared keys that do nothing here
    method = "a conditional normalizing flow"
    program = "model_script.py"
    recipe = "cpu_train_config.json"
    unused: ClassVar[tuple[str, ...]] = ()
    released: ClassVar[Path | None] = None  # its shipped weights

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def name(cls) -> str:
        """The name that its checkpoints carry, so that no other system reads them."""
        return cls.system or cls.__name__

    def losses(self, batch: Sample) -> dict[str, Tensor]:
        """Named scalars, means over the batch, whose sum is minimised."""
        raise NotImplementedError

    def enhance(self, low: Tensor, temperature: float = 0.0) -> Tensor:
        """Enhanced whole pictures (B, 3, H, W) in [0, 1] of `low`, any sides of at least 16."""
        raise NotImplementedError

    def bits_per_dim(self, high: Tensor, low: Tensor) -> tuple[Tensor, Tensor] | None:
        """(bits per dimension (B,), standardised latent) of whole pictures `high` given `low`, each
        (B, 3, H, W) in [0, 1]; None for a model that has no likelihood."""
        return None

    def pictures(self, low: Tensor) -> dict[str, Tensor]:
        """Further pictures (B, 3, h, w) in [0, 1] by name, for TensorBoard and results."""
        return {}

    def make_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of all stages; a group's `lr_scale` multiplies the scheduled rate."""
        return adamw(self.parameters(), self.config)

    def learning_rate_at(self, progress: float, step: int) -> float:
        """The rate of a step; `progress` in [0, 1] is the share of the run that is done."""
        return learning_rate_at(progress, step, self.config)

    def begin_step(self, progress: float, step: int = 0) -> None:
        """Told before every step, for training in stages; it must follow from these two alone."""


class ConditionalFlow(System):
    """p(high | low): an exact flow under N(mu(low), sigma^2 I); two branches give mu."""

    system = "ConditionalFlow"
    released = RELEASED

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        width, wide = config.flow_channels // 2, config.global_channels // 2
        self.global_branch = GlobalBranch(wide or width, width, config.global_dropout)
        self.local_branch = LocalBranch(width)
        self.flow = Flow(config.num_flow_blocks, config.flow_channels, width, 2 * width)
        self.log_sigma = nn.Parameter(torch.tensor(math.log(0.5)))
        self.with_likelihood = True
        self.teacher: Callable[[Sample], Tensor] | None = None

    def make_optimizer(self) -> torch.optim.Optimizer:
        """AdamW, the global branch at global_rate times the rate."""
        if self.config.global_rate == 1:
            return super().make_optimizer()
        slow = list(self.global_branch.parameters())
        known = {id(parameter) for parameter in slow}
        others = [parameter for parameter in self.parameters() if id(parameter) not in known]
        slow_group = {"params": slow, "lr_scale": self.config.global_rate}
        return adamw([{"params": others}, slow_group], self.config)

    def begin_step(self, progress: float, step: int = 0) -> None:
        """The likelihood is computed every nll_every steps."""
        self.with_likelihood = step % self.config.nll_every == 0

    @property
    def receptive_field(self) -> int:
        """Pixels beyond which nothing of `low` but its survey can change an output, a multiple of
        8.

        A 3x3 convolution at 1/n adds n pixels; 7 more for tiles that start within a block of 8.
        """
        flow = 2 * (2 + 4) * self.config.num_flow_blocks  # two convolutions in each coupling
        half = 2 * (1 + 2 + 1 + 4 + 1)  # stem, its block, down2, out1, residual
        quarter, eighth = 4 * (2 + 1 + 2), 8 * (4 + 1)  # mix2, down3's first, out2; its blocks, up2
        return math.ceil((flow + half + quarter + eighth + 7) / 8) * 8

    @property
    def rim(self) -> int:
        """Mirrored pixels around a picture; none for what learned of whole ones how they end."""
        return RIM if self.config.crop_size else 0

    def survey(self, thumbnail: Tensor) -> Survey:
        """The global branch's view of whole pictures, from their thumbnails (B, 3, t, t)."""
        brightness = thumbnail.mean((1, 2, 3), keepdim=True).clamp(min=1 / 255)
        grid, colour = self.global_branch(thumbnail, brightness)
        return Survey(brightness, grid.to(thumbnail.dtype), colour.to(thumbnail.dtype))

    def condition(
        self,
        low: Tensor,
        survey: Survey | None = None,
        box: Tensor | None = None,
        rim: Sequence[int] = NO_RIM,
    ) -> Condition:
        """What the flow is told of `low` (B, 3, H, W), which lies at `box` (B, 4) of the picture
        that was surveyed, and gets a `rim`. Without them `low` is that whole picture."""
        height, width = low.shape[-2:]
        if survey is None:
            survey = self.survey(resize(low, [self.config.thumbnail_size] * 2))
        if box is None:
            box = low.new_tensor([WHOLE_BOX]).expand(len(low), 4)
        low, box = with_rim(low, box, rim)
        colour = F.pixel_unshuffle(sample_grid(survey.colour, box, low.shape[-2:]), 2)
        grid = sample_grid(survey.grid, box, (low.shape[-2] // 4, low.shape[-1] // 4))
        low = F.pixel_unshuffle(low, 2)
        half, quarter, residual = self.local_branch(low, survey.brightness, grid, colour)
        mean = F.pixel_unshuffle(colour + residual.to(low.dtype), 2)
        return Condition(mean, (half, quarter), (height, width), (rim[2], rim[0]))

    def decode(self, condition: Condition, noise: Tensor | None = None) -> Tensor:
        """Picture (B, 3, H, W) in [0, 1] of z = mu(low), or of z = mu(low) + sigma `noise`.

        noise: (B, 48, H/4, W/4) of the padded sides.
        """
        latent, (height, width), (top, left) = condition[0], condition.size, condition.corner
        if noise is not None:
            latent = latent + self.log_sigma.exp() * noise
        found = requantise(self.flow.inverse(latent, condition.features))
        return found[..., top : top + height, left : left + width]

    def code_length(self, high: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """(bits per dimension (B,), standardised latent) of `high` (B, 3, H, W)."""
        height, width = high.shape[-2] // 4 * 4, high.shape[-1] // 4 * 4
        high = high[..., :height, :width]
        mean = condition.prior_mean[..., : height // 4, : width // 4]
        half, quarter = condition.features
        half = half[..., : height // 2, : width // 2]
        quarter = quarter[..., : height // 4, : width // 4]
        # one draw of noise serves all of the batch: as good on average, and the same however the
        # batch is divided
        latent, log_det = self.flow(dequantise(high, torch.rand_like(high[:1])), (half, quarter))
        log_likelihood = gaussian_log_prob(latent, mean, self.log_sigma) + log_det
        standardised = (latent - mean) * (-self.log_sigma).exp()
        return to_bits_per_dim(log_likelihood, high[0].numel()), standardised

    def losses(self, batch: Sample) -> dict[str, Tensor]:
        """Named, weighted terms of the training loss, scalars; those of weight 0 are left out."""
        config = self.config
        condition = self.condition(batch.low, self.survey(batch.thumbnail), batch.box)
        terms: dict[str, Tensor] = {}
        if config.nll_weight and self.with_likelihood:
            terms["nll"] = config.nll_weight * self.code_length(batch.high, condition)[0].mean()
        if config.l1_weight or config.ssim_weight or config.colour_weight:
            enhanced = self.decode(condition)
            terms |= picture_losses(enhanced, batch.high, config)
            if self.teacher is not None:
                for name, taught in picture_losses(enhanced, self.teacher(batch), config).items():
                    terms[name] = terms[name].lerp(taught, config.teacher_share)
        return terms

    @torch.no_grad()
    def answer(self, batch: Sample) -> Tensor:
        """(B, 3, h, w) in [0, 1]: z = mu(low) for each of a training batch, for a pupil."""
        return self.decode(self.condition(batch.low, self.survey(batch.thumbnail), batch.box))

    def bits_per_dim(self, high: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
        """See `System.bits_per_dim`."""
        return self.code_length(high, self.condition(low))

    def enhance(self, low: Tensor, temperature: float = 0.0) -> Tensor:
        """z = mu(low), or a draw from N(mu(low), (temperature sigma)^2 I)."""
        condition = self.condition(low, rim=[self.rim] * 4)
        noise = torch.randn_like(condition.prior_mean) if temperature else None
        return self.decode(condition, None if noise is None else temperature * noise)


# --------------------------------------------------------------------------------------------------
# Losses: small pure functions
# --------------------------------------------------------------------------------------------------


def gaussian_log_prob(z: Tensor, mean: Tensor, log_sigma: Tensor) -> Tensor:
    """log N(z; mean, exp(log_sigma)^2 I), summed over all but the batch: (B,), in nats."""
    deviation = (z - mean) * (-log_sigma).exp()
    return (-0.5 * deviation**2 - log_sigma - 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)


def to_bits_per_dim(log_likelihood: Tensor, dimensions: int) -> Tensor:
    """Code length of 8-bit levels, from log p(y) in nats (Theis et al. 2016, section 3.1)."""
    return -log_likelihood / (dimensions * math.log(2)) + 8


def ssim(a: Tensor, b: Tensor, window: int = 7) -> Tensor:
    """Structural similarity (B,) of (B, C, H, W) images in [0, 1], Wang et al. 2004.

    The uniform 7x7 window and the sample covariance are scikit-image's: the loss is the metric.
    """
    sample = window**2 / (window**2 - 1)
    maps = torch.cat([a, b, a * a, b * b, a * b], 1).contiguous(memory_format=torch.channels_last)
    # a box is separable: 2.5x faster so
    means = F.avg_pool2d(F.avg_pool2d(maps, (window, 1), 1), (1, window), 1)
    mean_a, mean_b, aa, bb, ab = means.chunk(5, dim=1)
    var_a, var_b = sample * (aa - mean_a**2), sample * (bb - mean_b**2)
    cov = sample * (ab - mean_a * mean_b)
    c1, c2 = 0.01**2, 0.03**2
    above = (2 * mean_a * mean_b + c1) * (2 * cov + c2)
    below = (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    return (above / below).mean((1, 2, 3))


def soft_histogram(
    values: Tensor, bins: int, kernel: str = "triangle", sigma: float = 0.002
) -> Tensor:
    """(..., bins), summing to 1, of values (..., N) in [0, 1]; bin centres at k / (bins - 1).

    triangle: linear interpolation between the two nearest bins. inverse_quadratic: ELIEI's 1 / (1 +
    (d / sigma)^2).
    """
    if kernel == "triangle":
        # only two bins get a share: scattered, 10x faster than all (..., N, bins) distances
        place = values * (bins - 1)
        left = place.detach().nan_to_num().floor().clamp(0, bins - 2)  # a bin even for NaN
        share, left = place - left, left.long()
        counts = values.new_zeros(*values.shape[:-1], bins)
        counts = counts.scatter_add(-1, left, 1 - share).scatter_add(-1, left + 1, share)
    else:
        centres = torch.linspace(0, 1, bins, device=values.device, dtype=values.dtype)
        counts = (1 / (1 + ((values[..., None] - centres) / sigma) ** 2)).sum(-2)
    return counts / counts.sum(-1, keepdim=True)


def histogram_wasserstein(p: Tensor, q: Tensor) -> Tensor:
    """1-Wasserstein distance (...,) of histograms (..., bins): the area between their CDFs."""
    return (p - q).cumsum(-1).abs().sum(-1) / (p.shape[-1] - 1)


def colour_loss(a: Tensor, b: Tensor, config: Config) -> Tensor:
    """Mean Wasserstein distance of the channels' histograms, (B, 3, H, W) in [0, 1]."""
    size = (min(config.histogram_size, a.shape[-2]), min(config.histogram_size, a.shape[-1]))
    kernel = (config.histogram_bins, config.histogram_kernel, config.histogram_sigma)
    p, q = (
        soft_histogram(F.adaptive_avg_pool2d(image, size).flatten(2), *kernel) for image in (a, b)
    )
    return histogram_wasserstein(p, q).mean()


def mean_distance(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference (B,) of (B, C, H, W) images."""
    return (a - b).abs().mean((1, 2, 3))


def gt_mean_weight(enhanced: Tensor, high: Tensor, spread: float) -> Tensor:
    """(B,) in [0, 1], detached: how far the means a and b of (B, 3, H, W) pictures differ.

    The Bhattacharyya distance of N(a, (s a)^2) and N(b, (s b)^2), s = spread, at most 1:
    (a - b)^2 / (4 s^2 (a^2 + b^2)) + log((a^2 + b^2) / (2 a b)) / 2. Liao et al., ICCV 2025.
    """
    ours, theirs = (image.detach().mean((1, 2, 3)).clamp(min=1e-3) for image in (enhanced, high))
    total = ours**2 + theirs**2
    distance = (ours - theirs) ** 2 / (4 * spread**2 * total)
    return (distance + 0.5 * (total / (2 * ours * theirs)).log()).clamp(max=1.0)


def gt_mean(
    compare: Callable[[Tensor, Tensor], Tensor], enhanced: Tensor, high: Tensor, spread: float
) -> Tensor:
    """(B,) W f(x, y) + (1 - W) f(lambda x, y), for a distance or a similarity f, where lambda x has
    the mean of y: about the right brightness is enough. Liao et al., GT-mean loss, ICCV 2025;
    spread 0: f(x, y).
    """
    plain = compare(enhanced, high)
    if not spread:
        return plain
    weight = gt_mean_weight(enhanced, high, spread)
    means = [image.mean((1, 2, 3), keepdim=True) for image in (enhanced, high)]
    scale = means[1] / means[0].clamp(min=1e-3)
    return weight * plain + (1 - weight) * compare(enhanced * scale, high)


def picture_losses(enhanced: Tensor, high: Tensor, config: Config) -> dict[str, Tensor]:
    """The weighted terms that compare (B, 3, H, W) pictures; none of weight 0."""
    terms: dict[str, Tensor] = {}
    if config.l1_weight:
        distance = gt_mean(mean_distance, enhanced, high, config.gt_mean_spread)
        terms["l1"] = config.l1_weight * distance.mean()
    if config.ssim_weight:
        similarity = gt_mean(ssim, enhanced, high, config.gt_mean_spread)
        terms["ssim"] = config.ssim_weight * (1 - similarity.mean())
    if config.colour_weight:
        terms["colour"] = config.colour_weight * colour_loss(enhanced, high, config)
    return terms


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


def learning_rate_at(progress: float, step: int, config: Any) -> float:
    """Linear warm-up, then half a cosine to 1 % of the peak; `progress` in [0, 1]."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    cosine = (1 + math.cos(math.pi * min(progress, 1.0))) / 2
    return config.learning_rate * warm * (0.01 + 0.99 * cosine)


def adamw(parameters: Iterable[Any], config: Any) -> torch.optim.Optimizer:
    """AdamW; `lr_scale` of a group of parameters multiplies the scheduled rate."""
    rate, decay = config.learning_rate, config.weight_decay
    return torch.optim.AdamW(parameters, rate, betas=(0.9, 0.99), weight_decay=decay, fused=True)


def averaged_model(model: nn.Module, decay: float) -> torch.optim.swa_utils.AveragedModel:
    """Exponential moving average; its decay warms up, so that it forgets the start."""

    def average(averages: Any, current: Any, count: Tensor | int) -> None:  # lists of tensors
        now = min(decay, (1 + int(count)) / (10 + int(count)))
        torch._foreach_lerp_(averages, current, 1 - now)

    return torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=average)


class LossModule(nn.Module):
    """A model's losses as a forward pass, which is what DistributedDataParallel wraps."""

    def __init__(self, model: System) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Sample) -> dict[str, Tensor]:
        return self.model.losses(batch)


class Trainer:
    """One training run. `step` is its only clock: data order, augmentation, noise and learning rate
    follow from it.

    Under torchrun every process does its share of each batch, and the steps are those of one
    process (but for rounding).
    """

    def __init__(
        self, config: Any, use: Use, system: type[System], resume: str | None = None
    ) -> None:
        self.config, self.use = config, use
        self.runtime = choose_runtime(use.device, config.use_amp)
        state = checkpoints.load_checkpoint(resume) if resume else None
        if state is not None and "training" not in state:
            hint = f"resume from a checkpoint_epoch_N.pth, or start with --set init_from={resume}"
            raise UserError(f"{resume}: holds weights only; {hint}")
        if state is not None:
            checkpoints.build_model(system, config, state, str(resume))  # before any data is read
        self.folder = Path(config.checkpoint_dir)
        here = resume is not None and Path(resume).parent.resolve() == self.folder.resolve()
        if not processes.restarted() and not here:
            checkpoints.refuse_other_run(self.folder)
        self.store, self.training, self.held_out, self.validation = training_data(config, use)
        if state is not None:
            chosen_by = self.held_out.thumbnails[self.validation]
            resumes.refuse_other_pictures(state, str(resume), self.store, chosen_by)
        random.seed(config.seed)
        torch.manual_seed(config.seed)
        model = system(config)
        if config.init_from and not resume:
            weights = checkpoints.starting_weights(config.init_from, use.camera, config.teacher)
            checkpoints.load_weights(model, weights, config.init_from)
        self.model = self.runtime.place(model)
        self.ema = averaged_model(self.model, config.ema_decay)
        self.averaged = cast(System, self.ema.module)
        if config.teacher:
            teacher = checkpoints.load_teacher(config, use.camera, system)
            self.model.teacher = self.averaged.teacher = self.runtime.place(teacher).answer
        self.optimizer = self.model.make_optimizer()
        scaled = self.runtime.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(self.runtime.device.type, enabled=scaled)
        self.step, self.minutes, self.best = 0, 0.0, -math.inf
        self.nll: dict[str, float] = {}  # the latest: nll_every leaves it out of most steps
        self.run_id = processes.broadcast(datetime.now().strftime("%Y%m%d_%H%M%S"))
        if state is not None:
            self._restore(state, str(resume))
        self.steps_per_epoch = epoch_steps(len(self.training), config)
        self.total_steps = self.steps_per_epoch * config.num_epochs
        self.parallel: nn.Module = LossModule(self.model)
        if processes.world_size() > 1:
            # a term of weight 0, or training in stages, leaves parameters without gradient
            ddp = nn.parallel.DistributedDataParallel
            self.parallel = ddp(self.parallel, find_unused_parameters=True)
        if use.compile:
            self.parallel = compiled(self.parallel, self.runtime.device)

    # the loop -------------------------------------------------------------------------------------

    def fit(self) -> int:
        """Train to the end, to max_minutes or to Ctrl-C; returns the exit status."""
        config, log_dir = self.config, Path(self.config.log_dir) / self.run_id
        if self.step >= self.total_steps:
            done = f"{self.step // self.steps_per_epoch} epochs are trained"
            print(f"nothing to do: {done}, num_epochs is {config.num_epochs}; raise it to go on")
            return 0
        counts = len(self.training), len(self.validation)
        notices.announce(config, counts, self.model, str(self.runtime))
        print(f"steps {self.step} to {self.total_steps} in {config.num_epochs} epochs")
        print(f"weights to {self.folder}, curves to {log_dir}")
        notices.of_training(config, self.use, self.store, self.held_out)
        if rank() == 0:
            checkpoints.claim_folder(self.folder)
        first, total, style = self.step // self.steps_per_epoch, self.total_steps, progress_style()
        bar = tqdm(total=total, initial=self.step, desc="training", unit="step", **style)
        with processes.polite_signals() as interrupted, bar, curves_in(log_dir) as self.curves:
            self.curves.text("commit", git_commit(), self.step)
            if config.init_from and self.step == 0:
                self._validate(0)  # the best weights are never worse than those of the start
            for epoch in range(first, config.num_epochs):
                stop = self._train_epoch(epoch, bar, interrupted)
                whole = self.step == (epoch + 1) * self.steps_per_epoch
                last = epoch + 1 == config.num_epochs or self._out_of_time()
                if whole or not stop:  # a signal at an epoch's last step costs it nothing
                    if last or (epoch + 1) % config.val_freq == 0:
                        self._validate(epoch + 1)
                    if last or (epoch + 1) % config.save_freq == 0:
                        self.save(f"checkpoint_epoch_{epoch + 1}.pth")
                    if last:
                        break
                if any(processes.all_gather(bool(interrupted))):
                    path = self.save("checkpoint_interrupted.pth")
                    hint = f"go on with --mode train --resume {path}"
                    tqdm.write(f"stopped at step {self.step}; {hint}")
                    return 130
            found = {"hparam/best_validation_score": self.best, "hparam/minutes": self.minutes}
            self.curves.conclude(dataclasses.asdict(config), found)
        print(f"best weights: {self.folder}/best_model.pth (validation score {self.best:.2f})")
        print(f"newest checkpoint: {checkpoints.newest_checkpoint(self.folder)}")
        print(f"curves: tensorboard --logdir {config.log_dir}")
        return 0

    def _train_epoch(self, epoch: int, bar: tqdm, interrupted: list[int]) -> bool:
        """What is left of an epoch; returns early, and True, on a signal to any process."""
        self.model.train()
        bar.set_description(f"epoch {epoch + 1}/{self.config.num_epochs}")
        batches = self._plan(epoch)[self.step % self.steps_per_epoch :]
        place, of = rank(), processes.world_size()
        plans = [processes.divide(batch, place, of, self.config.accumulate) for batch in batches]
        parts = iter(self._loader([part for plan in plans for part, _ in plan]))
        started = time.monotonic()
        for batch, plan in zip(batches, plans, strict=True):
            terms, norm, rate = self._train_step([(next(parts), weight) for _, weight in plan])
            seconds, started = time.monotonic() - started + 1e-9, time.monotonic()
            # the first process's clock and anybody's signal count for all
            clock = torch.tensor([0.0 if rank() else seconds, float(bool(interrupted))])
            seconds, stop = processes.all_reduce(clock.to(self.runtime.device)).tolist()
            self.minutes += seconds / 60
            self.nll = {"nll": terms["nll"]} if "nll" in terms else self.nll
            terms = self.nll | terms
            if self.step % 20 == 0 or self.step % self.steps_per_epoch == 0:
                scalars = {f"loss/{name}": value for name, value in terms.items()}
                scalars |= {"loss/total": sum(terms.values()), "train/learning_rate": rate}
                speed = {"train/images_per_second": len(batch) / seconds}
                self.curves.scalars(scalars | {"train/gradient_norm": norm} | speed, self.step)
            shown = {name: f"{value:.3f}" for name, value in terms.items()}
            if math.isfinite(self.best):
                shown["best"] = f"{self.best:.2f}"
            bar.set_postfix(shown, refresh=False)
            bar.update()
            if stop or self._out_of_time():
                return bool(stop)
        return False

    def _train_step(
        self, parts: Sequence[tuple[Sample, float]]
    ) -> tuple[dict[str, float], float, float]:
        """One update; returns the loss terms, the gradient's norm before clipping and the rate.

        `parts` are this process's share of the batch, each with its weight; all processes' weights
        sum to 1.
        """
        progress = self._progress()
        self.model.begin_step(progress, self.step)
        rate = self.model.learning_rate_at(progress, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        self.optimizer.zero_grad(set_to_none=True)
        values: dict[str, Any] = {}
        of = processes.world_size()
        for place, (batch, weight) in enumerate(parts, 1):
            # dropout and noise repeat: on resume, and in every part of a batch
            torch.manual_seed(self.config.seed * 1_000_003 + self.step)
            alone = of == 1 or place == len(parts)  # gradients are exchanged once, at the end
            with nullcontext() if alone else cast(Any, self.parallel).no_sync():
                with self.runtime.autocast():
                    terms = self.parallel(self.runtime.batch(batch))
                # DistributedDataParallel takes the mean over processes, the weights ask for the sum
                self.scaler.scale(sum(terms.values()) * (weight * of)).backward()
            for name, term in terms.items():
                values[name] = values.get(name, 0.0) + weight * term.detach()
        sums = processes.all_reduce(torch.stack(list(values.values())))
        terms = dict(zip(values, sums.tolist(), strict=True))
        self.scaler.unscale_(self.optimizer)
        clip = self.config.gradient_clip
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), clip))
        self._check_finite(terms, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.ema.update_parameters(self.model)
        self.step += 1
        return terms, norm, rate

    @torch.no_grad()
    def _validate(self, epoch: int) -> None:
        """Score the averaged weights as an evaluation does; keep the best as best_model.pth."""
        model = self.averaged.eval()
        size = None if self.config.crop_size else self.config.image_size
        scores, shown, latents = [], list[Tensor](), list[Tensor]()
        for index in processes.shard(self.validation):
            try:
                scored = score_pair(model, *self.held_out[index], size, Use(), self.runtime, index)
            except NotFinite:
                problem = f"step {self.step}: an enhanced picture is not finite"
                raise RunError(f"{problem}; {self._way_back()}") from None
            scores.append((self.held_out.pairs[index].source, scored.row))
            if len(shown) < 4:
                shown.append(torch.cat([*scored.strip, *scored.extra.values()], dim=-1))
                latents += [] if scored.latent is None else [scored.latent]
        scores = [score for share in processes.all_gather(scores) for score in share]
        means, choice = metrics.validation_means(scores)
        values = means | (self._validation_losses() if rank() == 0 else {})
        self.curves.scalars({f"validation/{k}": v for k, v in values.items()}, self.step)
        self.curves.validation(shown, latents, self.step)
        better = choice > self.best
        self.best = max(self.best, choice)
        if better and rank() == 0:
            content = {**self._deployable(), "validation": means}
            checkpoints.save_checkpoint(self.folder / "best_model.pth", content)
        words = metrics.told(means)
        words += f"  score {choice:.2f}{'  best' if better else ''}"
        tqdm.write(f"epoch {epoch} ({self.minutes:.1f} min): {words}")

    # helpers --------------------------------------------------------------------------------------

    def _validation_losses(self) -> dict[str, float]:
        """The averaged weights' losses on four validation pairs, the same ones each time, sampled
        as for training but without augmentation."""
        samples = TrainingSamples(self.held_out, self.validation, unaltered(self.config))
        chosen = [samples[0, place] for place in spread(len(self.validation), 4)]
        self.averaged.begin_step(self._progress())  # at step 0, which computes every term
        terms = self.runtime.losses_of(self.averaged, chosen, self.config.seed)
        return {f"loss_{name}": value for name, value in terms.items()}

    def _plan(self, epoch: int) -> list[list[Draw]]:
        """The batches of an epoch."""
        if not self.config.sources:
            return batch_plan(len(self.training), self.config, epoch)
        members = self.store.by_source(self.training)
        share = {source["name"]: source["share"] for source in self.config.sources}
        shares = [share[name] for name in members]
        return source_plan(list(members.values()), shares, self.config, epoch)

    def _loader(self, batches: Sequence[list[Draw]]) -> DataLoader:
        samples = TrainingSamples(self.store, self.training, self.config)
        return DataLoader(
            samples,
            batch_sampler=batches,
            num_workers=self.use.num_workers,
            pin_memory=self.use.pin_memory and self.runtime.device.type == "cuda",
            worker_init_fn=processes.ignore_interrupts,
        )

    def _out_of_time(self) -> bool:
        return 0 < self.config.max_minutes <= self.minutes

    def _progress(self) -> float:
        """Share of the run that is done, by steps or by max_minutes, whichever is more."""
        by_time = self.minutes / self.config.max_minutes if self.config.max_minutes else 0.0
        return max(self.step / self.total_steps, by_time)

    def _check_finite(self, terms: dict[str, float], norm: float) -> None:
        bad = [name for name, value in terms.items() if not math.isfinite(value)]
        if not bad and not math.isfinite(norm) and not self.scaler.is_enabled():
            bad = ["gradient"]
        if bad:
            raise RunError(f"step {self.step}: the term {bad[0]} is not finite; {self._way_back()}")

    def _way_back(self) -> str:
        good = checkpoints.newest_checkpoint(self.folder)
        found = f"the last good checkpoint is {good}" if good else "no checkpoint was written yet"
        return f"{found}; try a lower learning_rate"

    # checkpoints ----------------------------------------------------------------------------------

    @cached_property
    def _looks(self) -> dict[str, Any]:
        """What the training pictures look like, see `known`; empty where they are too few."""
        dark = [item["name"] for item in self.config.sources if item["darken"]]
        looks = known.looks_in(self.store, self.config.scene_similarity, dark)
        found = known.fitted(*looks)
        return {} if found is None else {"known": found}

    def _deployable(self) -> dict[str, Any]:
        """What enhancement needs, and thumbnails to know the pictures by: all that the training
        folder holds, and those that choose the best weights."""
        return self._looks | {
            "run_id": self.run_id,
            "system": self.averaged.name(),
            "config": dataclasses.asdict(self.config),
            "model": self.averaged.state_dict(),
            "epoch": self.step // self.steps_per_epoch,
            "step": self.step,
            "commit": git_commit(),
            "training_thumbnails": torch.from_numpy(self.store.thumbnails),
            "validation_thumbnails": torch.from_numpy(self.held_out.thumbnails[self.validation]),
        }

    def save(self, name: str) -> Path:
        """A checkpoint to resume from, under checkpoint_dir; the newest keep_checkpoints stay."""
        path = self.folder / name
        if rank() == 0:
            training = {
                "model": self.model.state_dict(),
                "averaged": self.ema.n_averaged,
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "step": self.step,
                "minutes": self.minutes,
                "best": self.best,
            }
            content = {**self._deployable(), "training": training}
            checkpoints.save_checkpoint(path, content)
            checkpoints.remove_old(self.folder, self.config.keep_checkpoints)
        return path

    def _restore(self, state: dict[str, Any], path: str) -> None:
        checkpoints.load_weights(self.averaged, state, path)
        with checkpoints.damage_is_one_line(path):
            training = state["training"]
            self.model.load_state_dict(training["model"])
            self.ema.n_averaged.copy_(training["averaged"])
            # the groups' rates follow from the config and the step
            own = {"param_groups": self.optimizer.state_dict()["param_groups"]}
            self.optimizer.load_state_dict(training["optimizer"] | own)
            self.scaler.load_state_dict(training["scaler"])
            self.step, self.minutes = int(training["step"]), float(training["minutes"])
            self.best, self.run_id = float(training["best"]), str(state["run_id"])
            run = (self.step, self.minutes, self.best, self.run_id)
            checkpoints.check_training_state(self.optimizer, *run)


def train(arguments: argparse.Namespace, system: type[System]) -> int:
    """--mode train."""
    given = arguments.settings
    config = settings.build(system.config_class, given, "settings")
    there = checkpoints.folder_of(arguments.resume)
    folder = Path(given.get("checkpoint_dir") or there or config.checkpoint_dir)
    resume = processes.broadcast(checkpoints.resume_from(arguments.resume, folder))
    if resume:
        # weights go where they came from, also when that folder was moved
        here = {"checkpoint_dir": str(Path(resume).parent)}
        checkpoint = checkpoints.load_checkpoint(resume, system.name())
        kind, mine = system.config_class, here | given
        config = checkpoints.stored_config(checkpoint, resume, mine, kind)
        resumes.told_changes(checkpoint, resume, mine, kind)
    use = settings.build(Use, given, "settings")
    return Trainer(config, use, system, resume).fit()


# --------------------------------------------------------------------------------------------------
# From pixels to pixels: what a user gets, and what validation and evaluation score
# --------------------------------------------------------------------------------------------------


def load_model(path: str, given: dict[str, Any], system: type[System]) -> Loaded:
    """A checkpoint's model, ready to evaluate and enhance, under the settings `given`."""
    checkpoint = checkpoints.load_checkpoint(path, system.name())
    # they decide the rim and eval_size=auto, and the weights say how they were trained
    mine = {k: v for k, v in given.items() if k not in ("crop_size", "image_size")}
    config = checkpoints.stored_config(checkpoint, path, mine, system.config_class)
    use = settings.build(Use, given, "settings")
    runtime = choose_runtime(use.device, config.use_amp)
    model = runtime.place(checkpoints.build_model(system, config, checkpoint, path)).eval()
    looks = known.known_of(checkpoint)
    if "cameras" not in checkpoint:
        if use.camera != "auto":
            raise UserError(f"camera: {path} holds one network; leave it out")
        return Loaded(model, use, runtime, checkpoint, looks)
    weights, camera_net = checkpoints.camera_parts(checkpoint, path)
    second = runtime.place(checkpoints.build_model(system, config, weights, path)).eval()
    return Loaded(model, use, runtime, checkpoint, looks, second, camera_net)


class NotFinite(UserError):
    """Weights that are so large that what they give is no number."""


def tile_side(model: ConditionalFlow, use: Use) -> int:
    """`tile_size`, or the largest tile whose work, halo included, fits in memory_megabytes."""
    if use.tile_size:
        return use.tile_size
    # measured: 390 to 620 of 630 at 96 channels, bf16 and fp32
    bytes_per_pixel = 150 + 5 * model.config.flow_channels
    whole = math.isqrt(use.memory_megabytes * 2**20 // bytes_per_pixel)
    return max(64, (whole - 2 * model.receptive_field) // 8 * 8)


class Enhanced(NamedTuple):
    """(H, W, 3) uint16 pictures; (H, W) deviation over samples, root mean square of RGB."""

    best: np.ndarray
    samples: list[np.ndarray]
    deviation: np.ndarray | None


@torch.no_grad()
def enhance_pixels(
    model: System,
    pixels: np.ndarray,
    use: Use,
    runtime: Runtime,
    survey: Survey | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Enhanced:
    """Enhance (H, W, 3) uint8 or uint16 pixels of any size and draw the samples that `use` wants.

    Many pixels go through tiles, which overlap by the receptive field and share one survey of the
    whole picture, so that no seam can show. Another system than the flow sees the picture whole.
    `survey` replaces the picture's own. `progress` is told after each tile of each pass, the best
    answer and every sample, how many of them are done, of how many; what it raises ends the work.
    Raises NotFinite.
    """
    height, width = pixels.shape[:2]
    temperature = use.temperature or (1.0 if use.drawn else 0.0)
    best = np.empty((height, width, 3), np.uint16)  # no memory until it is used
    deviation = np.empty((height, width), np.float32)
    samples = [np.empty_like(best) for _ in range(use.samples)]
    halo, side = 0, max(height, width)
    if isinstance(model, ConditionalFlow):
        halo, side = model.receptive_field, tile_side(model, use)
        if survey is None:
            thumbnail = pictures.whole_thumbnail(pixels, model.config.thumbnail_size)
            with runtime.autocast():
                survey = model.survey(thumbnail.to(runtime.device))
    plan, passes = plan_tiles(height, width, side, halo), 1 + use.drawn
    for place, (core, outer) in enumerate(plan):
        top, bottom, left, right = outer
        low = to_tensor(pixels[top:bottom, left:right])[None].to(runtime.device)
        here = (slice(*core[:2]), slice(*core[2:]))
        rows, columns = slice(core[0] - top, core[1] - top), slice(core[2] - left, core[3] - left)
        box = (left / width, top / height, right / width, bottom / height)
        with runtime.autocast():
            draw = decoder(model, low, survey, box, (top, left))
            drawn = list[Tensor]()
            for number in range(passes):
                spread_of = 0.0 if number == 0 and use.drawn else temperature
                drawn.append(draw(number, spread_of)[0, :, rows, columns])
                if progress:
                    progress(place * passes + number + 1, len(plan) * passes)
            answer = drawn.pop(0)
        if not all(bool(picture.isfinite().all()) for picture in (answer, *drawn)):
            raise NotFinite("--checkpoint: its weights give no finite picture; use an earlier one")
        best[here] = to_uint16(answer)
        for sample, picture in zip(samples, drawn, strict=False):
            sample[here] = to_uint16(picture)
        if use.uncertainty:
            deviation[here] = torch.stack(drawn).float().var(0).mean(0).sqrt().cpu().numpy()
    best, *samples = (pictures.calmed(levels, use.denoise) for levels in (best, *samples))
    return Enhanced(best, samples, deviation if use.uncertainty else None)


def decoder(
    model: System,
    low: Tensor,
    survey: Survey | None,
    box: Sequence[float],
    corner: tuple[int, int],
) -> Callable[[int, float], Tensor]:
    """A function of sample number and temperature that gives the enhanced tile (1, 3, h, w).

    `low` lies at `box` of the picture that was surveyed, its top left pixel at `corner`; the flow
    looks at it only once.
    """
    seed = model.config.seed
    if not isinstance(model, ConditionalFlow):

        def draw_whole(number: int, temperature: float) -> Tensor:
            torch.manual_seed(seed + number)
            return model.enhance(low, temperature)

        return draw_whole
    # a rim where the picture ends; within it the tiles overlap
    ends = (box[0] == 0, box[2] == 1, box[1] == 0, box[3] == 1)
    rim = [model.rim * end for end in ends]
    condition = model.condition(low, survey, low.new_tensor([box]), rim)
    down, right = (place + model.rim * (place > 0) for place in corner)  # within the rim, too

    def draw(number: int, temperature: float) -> Tensor:
        if not temperature:
            return model.decode(condition)
        size = condition.prior_mean.shape[-2:]
        noise = latent_noise((seed, number), down // 4, right // 4, *size)
        return model.decode(condition, temperature * noise.to(low.device))

    return draw


# --------------------------------------------------------------------------------------------------
# Pictures for people: triptychs
# --------------------------------------------------------------------------------------------------


def triptych(images: Sequence[Tensor], labels: Sequence[str], scores: str = "") -> Image.Image:
    """(3, H, W) images side by side under their labels; `scores` follows the second."""
    height, width = images[0].shape[-2:]
    shown = max(width, 200)  # captions need room
    points = max(11, shown // 32)
    font, bar = ImageFont.load_default(size=points), int(points * 1.8)
    scale = shown / width
    size = ((shown + 4) * len(images) - 4, round(height * scale) + bar)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for place, (image, label) in enumerate(zip(images, labels, strict=True)):
        left = place * (shown + 4)
        picture = Image.fromarray(to_uint8(image))
        if shown != width:
            picture = picture.resize((shown, round(height * scale)), Image.Resampling.NEAREST)
        canvas.paste(picture, (left, bar))
        text = f"{label}  {scores}" if place == 1 and scores else label
        draw.text((left + 4, bar // 8), text, fill="black", font=font)
    return canvas


def write_scored(scored: Scored, folder: Path) -> None:
    """The enhanced picture, what else the model shows, and the strip."""
    row, name = scored.row, Path(scored.row["filename"]).stem
    files_of = {"": scored.enhanced, **{f"_{key}": image for key, image in scored.extra.items()}}
    for suffix, image in files_of.items():
        pictures.write_image(folder / f"{name}{suffix}.png", image)
    if scored.high is None:
        scores = f"clipped {row['clipped_new']:.2%}  noise {row['noise_flat']:.1f}"
    else:
        scores = f"{row['psnr']:.2f} dB  SSIM {row['ssim']:.3f}  dE {row['ciede2000']:.1f}"
    labels = (f"input {name}", "enhanced", "target")[: len(scored.strip)]
    pictures.write_image(folder / f"{name}_viz.png", triptych(scored.strip, labels, scores))


# --------------------------------------------------------------------------------------------------
# Evaluation
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def score_pair(
    model: System,
    low: np.ndarray,
    high: np.ndarray | None,
    size: Sequence[int] | None,
    use: Use,
    runtime: Runtime,
    index: int = 0,
) -> Scored:
    """Enhance `low` as --mode enhance does and compare with `high`, where there is one; both
    (H, W, 3) uint8, resized to `size` (height, width) first where that is given. `index` seeds the
    dequantisation noise."""
    low = pictures.resize_pixels(low, size)
    high = None if high is None else pictures.resize_pixels(high, size)
    started = time.perf_counter()
    plain = dataclasses.replace(use, samples=0, uncertainty=False)
    found = enhance_pixels(model, low, plain, runtime)
    seconds = time.perf_counter() - started
    scored = score_levels(low, pictures.level_table(0.0, deep=False)[found.best], high)
    given, bits = scored.low[None].to(runtime.device), None
    torch.manual_seed(model.config.seed + index)
    if scored.high is not None:
        with runtime.autocast():
            bits = model.bits_per_dim(scored.high[None].to(runtime.device), given)
    row = scored.row | ({"bits_per_dim": float(bits[0])} if bits else {}) | {"seconds": seconds}
    latent = bits[1].flatten().float().cpu() if bits else None
    extra = {name: image[0].float().cpu() for name, image in model.pictures(given).items()}
    return scored._replace(row=row, extra=extra, latent=latent)


def score_pairs(
    loaded: Loaded,
    store: PairStore,
    twins: Sequence[bool | None],
    extra: Sequence[ExtraMetric] = (),
) -> Iterator[Scored]:
    """Score this process's share of the pairs of `store`, in order; by one process, all."""
    use, size = loaded.use, loaded.use.size_to_score(loaded.model.config)
    indices = processes.shard(range(len(store)))
    for index in tqdm(indices, desc="evaluating", unit="image", **progress_style()):
        pair, (low, high) = store.pairs[index], store[index]
        target = high if pair.has_target else None
        model, camera = loaded.choose(low)
        if pair.output:
            scored = score_levels(low, read_output(pair, low, size), target, size)
        else:
            scored = score_pair(model, low, target, size, use, loaded.runtime, index)
        row = {"filename": pair.low.name, **scored.row}
        seconds = {"seconds": row.pop("seconds")} if "seconds" in row else {}
        row |= {"camera": camera} if camera else {}
        row |= extra_scores(extra, scored.enhanced, scored.high, pair.low.name)
        judged = pair.has_target and not pair.output
        row |= {"twin_in_training": twins[index]} if judged else {}
        yield scored._replace(row=row | seconds)


def to_evaluate(arguments: argparse.Namespace, system: type[System]) -> Loaded:
    """The checkpoint's model; no model at all where `outputs_dir` takes the checkpoint's place."""
    if arguments.checkpoint is not None:
        return load_model(arguments.checkpoint, arguments.settings, system)
    config = settings.build(system.config_class, arguments.settings, "settings")
    use = settings.build(Use, arguments.settings, "settings")
    # nothing will be enhanced: of this model only the config is asked
    return Loaded(System(config), use, choose_runtime(use.device, False), {})


def evaluate(arguments: argparse.Namespace, system: type[System]) -> int:
    """--mode evaluate: a model, or the pictures in `outputs_dir`."""
    loaded = to_evaluate(arguments, system)
    use, config, outputs = loaded.use, loaded.model.config, loaded.use.outputs_dir
    room, skip = use.cache_megabytes * 2**20, use.on_bad_file == "skip"
    extra = load_extra(use.extra_metrics, bool(use.eval_high_dir), loaded.runtime.device)
    pairs = evaluation_pairs(use, need_targets=False)
    store = PairStore(with_outputs(pairs, outputs) if outputs else pairs, room, skip)
    size = use.size_to_score(config)
    check_outputs(store, size)
    twins: Sequence[bool | None] = [None] * len(store)
    if use.eval_high_dir and not outputs:
        twins = training_twins(store.thumbnails, loaded.checkpoint)
    folder = processes.broadcast(files.results_folder(use.results_dir, "eval"))
    protocol = f"resized to {size[1]}x{size[0]}" if size else "native resolution"
    print(f"evaluating {notices.counted(len(store), use)}, {protocol}, on {loaded.runtime}")
    found = notices.of_evaluation(use, loaded.checkpoint, store, twins)
    with processes.atomic_folder(folder) as temporary:
        mine = []
        for scored in score_pairs(loaded, store, twins, extra):
            write_scored(scored, temporary / "images")
            mine.append(scored.row)
        by_name = {row["filename"]: row for share in processes.all_gather(mine) for row in share}
        rows = [by_name[pair.low.name] for pair in store.pairs]
        if rank() == 0:
            pictures.write_image(temporary / "overview.png", overview(rows, temporary / "images"))
            files.write_csv(temporary / "metrics.csv", rows)
            facts: dict[str, Any] = {"protocol": protocol, "device": str(loaded.runtime)}
            facts |= {"use": commands.at_work(use, "evaluate"), "warnings": found}
            facts |= commits(loaded.checkpoint)
            facts |= {"outputs_dir": outputs} if outputs else {"config": dataclasses.asdict(config)}
            lower = [column for one in extra if one.lower_is_better for column in one.columns]
            summary = metrics.evaluation_summary(rows, arguments.checkpoint, facts, lower)
            files.write_json(temporary / "summary.json", summary)
    if rank():
        return 0
    brief = ("psnr", "ssim", "checkpoint", "outputs_dir")
    result: dict[str, Any] = {key: summary[key] for key in brief if key in summary}
    result |= {"num_test_samples": len(rows), "results_dir": str(folder)}
    files.write_json(Path(use.results_dir) / "evaluation_results.json", result)
    metrics.print_summary(summary)
    evaluation_curves(loaded.checkpoint, summary, folder)
    print(f"{folder}: metrics.csv, summary.json, images/, overview.png (worst, median, best)")
    return 0


# --------------------------------------------------------------------------------------------------
# Enhancement
# --------------------------------------------------------------------------------------------------


def enhance_file(
    source: Path,
    target: Path,
    loaded: Loaded,
    brightness: float | None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Enhance one picture and write what `use` asks for; returns its row of enhance.csv.

    `brightness` is the mean that the result takes, None to leave it. The picture itself is written
    last: where it is, all is. Raises UserError.
    """
    started, use = time.perf_counter(), loaded.use
    picture = read_picture(source)
    model, camera = loaded.choose(picture.pixels)
    enhanced = enhance_pixels(model, picture.pixels, use, loaded.runtime, progress=progress)
    suffix = target.suffix.lower()
    deep = picture.pixels.dtype == np.uint16 and suffix in (".png", ".tif", ".tiff")
    stops = use.exposure
    if brightness is not None:
        stops += pictures.stops_to_mean(enhanced.best, brightness)
    table = pictures.level_table(stops, deep)

    def write(levels: np.ndarray, path: Path) -> np.ndarray:
        pixels = pictures.blend(picture.pixels, table[levels], use.strength)
        files.write_bytes(path, pictures.encode_or_explain(pixels, path, picture, use.quality))
        return pixels

    for number, sample in enumerate(enhanced.samples, 1):
        write(sample, target.with_stem(f"{target.stem}_sample{number}"))
    if enhanced.deviation is not None:
        pictures.write_deviation(target, enhanced.deviation)
    after = write(enhanced.best, target)
    facts: dict[str, Any] = {"seconds": time.perf_counter() - started, "note": picture.note}
    facts |= {"camera": camera, "known": loaded.knows(picture.pixels)}
    return enhance_row((source, target), picture.pixels, after, enhanced.deviation, facts)


def enhance(arguments: argparse.Namespace, system: type[System]) -> int:
    """--mode enhance: a picture, a folder or a pattern, each at its own resolution."""
    given, many = arguments.input, means_many(arguments.input)
    jobs, left = find_jobs(given, arguments.output, SUFFIXES)
    loaded = load_model(arguments.checkpoint, arguments.settings, system)
    reference, weights = loaded.use.reference, Path(arguments.checkpoint).name
    brightness = float(read_image(reference).mean()) / 255 if reference else None

    def work(source: Path, target: Path, progress: Any = None) -> dict[str, Any]:
        with commands.scarce_memory(source, "lower memory_megabytes or samples"):
            return enhance_file(source, target, loaded, brightness, progress)

    if many:
        folder, made_with = Path(arguments.output), loaded.made_with(arguments.checkpoint)
        return work_off(jobs, folder, work, loaded.use.overwrite, made_with, left, weights)
    if rank():  # one picture is one process's work
        return 0
    with processes.steps_shown("enhancing", "tile", 2 + loaded.use.drawn) as progress:
        row = work(*jobs[0], progress)
    tell_row(row, str(loaded.runtime), weights)
    return 0


# --------------------------------------------------------------------------------------------------
# Demo: photographs that ship with scikit-image, seen by a simulated infrared-leaking sensor
# --------------------------------------------------------------------------------------------------


def demo(arguments: argparse.Namespace, system: type[System]) -> int:
    """--mode demo: simulate, train a small model, evaluate it on other photographs."""
    kinds, given = (system.config_class, Use), arguments.settings
    weights = given.get("checkpoint_dir", system.config_class().checkpoint_dir)
    folder = files.results_folder(given.get("results_dir", Use().results_dir), "demo")
    small, here = simulated.demo_settings(folder, weights)
    # what the demo fixes wins over the config file's recipe, and --set wins over both
    own = settings.read_settings(kinds, settings.assignments(arguments.set), "--set")
    chosen = given | small | own | here
    config = settings.build(system.config_class, chosen, "demo")
    use = settings.build(Use, chosen, "demo")
    simulated.write_demo_pairs(folder / "data", config.image_size[0], config.seed)
    print(f"demo: simulated dark photographs in {folder / 'data'}")
    if status := Trainer(config, use, system).fit():
        return status
    best = f"{config.checkpoint_dir}/best_model.pth"
    evaluate(argparse.Namespace(checkpoint=best, settings=dataclasses.asdict(use)), system)
    evaluation = next(folder.glob("eval_*"))
    summary = json.loads((evaluation / "summary.json").read_text())
    simulated.demo_table(folder / "data", summary["metrics"], folder / "demo.csv")
    print(f"\npictures: {evaluation / 'overview.png'}")
    return 0


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------

MODES = {"train": train, "evaluate": evaluate, "enhance": enhance, "demo": demo}


def main(argv: Sequence[str] | None = None, system: type[System] = ConditionalFlow) -> int:
    """Run one mode; returns the exit status.

    Another model is a subclass of System with a `config_class` of its own, a subclass of Config;
    the file of that needs `from __future__ import annotations`, as its fields' types are read as
    text.
    """

    kinds = (system.config_class, Use)

    def work() -> int:
        arguments = commands.parse(argv, MODES, kinds, system, system.released)
        device = arguments.settings.get("device", "auto")
        with processes.process_group(arguments.mode, device):
            print(f"{arguments.mode}: {commands.sources_of(arguments)}", flush=True)
            return MODES[arguments.mode](arguments, system)

    return commands.run(work)


if __name__ == "__main__":
    sys.exit(main())
