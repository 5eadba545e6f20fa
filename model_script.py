"""Colour-true enhancement of dark, infrared-tinted photographs with a conditional normalizing flow.

One script: data -> model -> losses -> training -> evaluation -> enhancement -> demo -> command
line.

Words used throughout
    low        dark photograph, float RGB in [0, 1], shape (B, 3, H, W)
    high       its well-exposed target, same shape and range
    enhanced   our estimate of `high`
    condition  everything the flow may know: features of `low` and the prior mean
    latent     z = flow(high | condition), as many numbers as `high` has

Model: p(high | low) by an exact bijection high <-> z under the prior N(mu(low), sigma^2 I).
Enhancement decodes z = mu(low); sampling around mu gives alternatives.

References
    Dinh et al., Density estimation using Real NVP, ICLR 2017: affine couplings, squeezes, logit
    mapping Kingma & Dhariwal, Glow, NeurIPS 2018: invertible 1x1 convolutions with an LU
    factorisation Wang et al., Low-Light Image Enhancement with Normalizing Flow (LLFlow), AAAI
    2022: conditional prior mean Wang et al., Enhancing Low-Light Images Using Infrared-Encoded
    Images (ELIEI), ICIP 2023: data, colour loss
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import difflib
import glob
import hashlib
import io
import json
import logging
import math
import os
import random
import re
import struct
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import (
    contextmanager,
    nullcontext,
    suppress,
)
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
import skimage
import torch
import torch.distributed as dist
import torch.distributed.nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from support.checkpoints import (
    RUN_FILE,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    set_aside,
    written_by,
)
from support.decoding import SUFFIXES, VIDEO_SUFFIXES, Picture, read_image, read_picture
from support.files import (
    atomic_path,
    make_folder,
    results_folder,
    write_bytes,
    write_csv,
    write_json,
)
from support.folders import enhance_folder, find_inputs, natural_key, pictures_by_stem
from support.metrics import image_metrics, load_lpips, match_mean, psnr_of, ssim_of, summarise
from support.pictures import (
    encode_picture,
    encode_png16,
    heat_map,
    level_table,
    stops_to_mean,
    to_tensor,
    to_uint8,
    to_uint16,
    write_image,
)
from support.processes import (
    atomic_folder,
    divide,
    from_all,
    from_first,
    ignore_interrupts,
    my_share,
    polite_signals,
    process_group,
    processes,
    progress_style,
    rank,
    sigterm_as_ctrl_c,
    sum_over_processes,
)
from support.runtime import Runtime, choose_runtime, compiled
from support.settings import (
    OneLineParser,
    RunError,
    UserError,
    allowed,
    complain,
    is_text,
    knob,
    parse_eval_size,
    read_config_file,
    shown,
)
from support.simulated import DEMO_TEST, DEMO_TRAIN, demo_crops, simulate_infrared
from support.tiles import latent_noise, plan_tiles

# --------------------------------------------------------------------------------------------------
# Configuration: one flat dataclass. Each knob states its meaning and range once; --help, errors and
# tests read it here.
# --------------------------------------------------------------------------------------------------

RELEASE = Path(__file__).resolve().parent / "checkpoints" / "best_model.pth"
ARCHIVE_TRAIN = "train-20241116T084056Z-001/train-20241116T084056Z-001/train"
ARCHIVE_EVAL = "eval-20241116T084057Z-001/eval-20241116T084057Z-001/eval"
FOLDER_KEYS = (
    "train_low_dir",
    "train_high_dir",
    "val_low_dir",
    "val_high_dir",
    "eval_low_dir",
    "eval_high_dir",
)


@dataclass
class Config:
    """Every setting of every mode. Twelve keys are the published CPU recipe's and keep its names
    and meaning."""

    # what another system says otherwise, for --help: its name, how it is called, its recipe, the
    # shared keys it cannot use
    method: ClassVar[str] = "a conditional normalizing flow"
    program: ClassVar[str] = "model_script.py"
    recipe: ClassVar[str] = "cpu_train_config.json"
    unused: ClassVar[tuple[str, ...]] = ()

    # run
    device: str = knob("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    use_amp: bool = knob(
        False, "mixed precision: bf16 where the processor has it, else fp16 on CUDA, else fp32"
    )
    compile: bool = knob(
        False,
        "training by torch.compile: a tenth faster on CPU, after a minute; needs a C++ compiler",
    )
    num_workers: int = knob(0, "data loading processes; 0 loads in the main one", low=0, high=64)
    pin_memory: bool = knob(False, "page-locked batches, for faster copies to CUDA")
    seed: int = knob(
        0,
        "seed of the split, the weights, the augmentation and every sample",
        low=0,
        high=2**31 - 1,
    )
    # data
    train_low_dir: str = knob(f"{ARCHIVE_TRAIN}/low", "dark training photographs")
    train_high_dir: str = knob(f"{ARCHIVE_TRAIN}/high", "their targets, paired by file stem")
    val_low_dir: str = knob(
        "", "dark validation photographs; empty: split off the training pairs by scene"
    )
    val_high_dir: str = knob("", "their targets")
    eval_low_dir: str = knob(
        f"{ARCHIVE_EVAL}/low", "dark evaluation photographs, never used to choose anything"
    )
    eval_high_dir: str = knob(f"{ARCHIVE_EVAL}/high", "their targets")
    val_fraction: float = knob(
        0.1, "share of the training pairs held out for validation, whole scenes", low=0.0, high=0.9
    )
    scene_similarity: float = knob(
        0.85,
        "correlation of two targets' thumbnails from which they count as one scene",
        low=0.0,
        high=1.0,
    )
    on_bad_file: str = knob(
        "error",
        "an unreadable file or unequal pair stops the run, or is listed and left out",
        choices=("error", "skip"),
    )
    cache_megabytes: int = knob(
        1024, "memory for decoded pictures; further ones are read on demand", low=0, high=1_000_000
    )
    image_size: list[int] = knob(
        [128, 128],
        "height,width to which whole pictures are resized (published protocol)",
        low=16,
        high=8192,
    )
    crop_size: int = knob(
        0,
        "side of the native-resolution training crops, a multiple of 8; 0: resize to image_size",
        low=0,
        high=4096,
    )
    crop_scales: list[float] = knob(
        [1.0, 0.5, 0.0],
        "scales a crop is drawn from, evenly: 1 native, 0.5 half resolution, 0 the whole picture",
        low=0.0,
        high=1.0,
    )
    whole_share: float = knob(
        0.0,
        "with crop_size: share of the batches that show whole pictures at image_size instead",
        low=0.0,
        high=1.0,
    )
    window_min: float = knob(
        0.45,
        "augmentation: smallest share of each side that plays the whole picture; 1: off",
        low=0.1,
        high=1.0,
    )
    flips: bool = knob(True, "augmentation: mirror, and transpose square inputs")
    exposure_gain: float = knob(
        0.3, "augmentation: random gain on low, in stops either way", low=0.0, high=4.0
    )
    channel_gain: float = knob(
        0.05, "augmentation: random gain per colour channel of low, relative", low=0.0, high=0.9
    )
    # model
    flow_channels: int = knob(
        96,
        "hidden width of the couplings and base width of the branches",
        low=8,
        high=1024,
        architecture=True,
    )
    num_flow_blocks: int = knob(
        2, "flow steps at each of the two scales", low=1, high=64, architecture=True
    )
    thumbnail_size: int = knob(
        128,
        "side of the thumbnail that the global branch sees",
        low=32,
        high=512,
        architecture=True,
    )
    global_dropout: float = knob(0.1, "channel dropout inside the global branch", low=0.0, high=0.9)
    # losses
    nll_weight: float = knob(
        0.5, "weight of the negative log-likelihood, in bits per dimension", low=0.0, high=1e6
    )
    l1_weight: float = knob(10.0, "weight of |enhanced - high|", low=0.0, high=1e6)
    ssim_weight: float = knob(1.0, "weight of 1 - SSIM(enhanced, high)", low=0.0, high=1e6)
    colour_weight: float = knob(
        2.0, "weight of the Wasserstein distance between colour histograms", low=0.0, high=1e6
    )
    histogram_bins: int = knob(64, "bins of the colour histograms", low=2, high=1024)
    histogram_kernel: str = knob(
        "triangle", "soft assignment of a value to bins", choices=("triangle", "inverse_quadratic")
    )
    histogram_sigma: float = knob(
        0.002, "width of the inverse_quadratic kernel 1 / (1 + (d / sigma)^2)", low=1e-6, high=100.0
    )
    histogram_size: int = knob(
        40, "side to which pictures are averaged before their histogram", low=1, high=4096
    )
    # training
    batch_size: int = knob(
        1, "pictures or crops per step, of all processes together", low=1, high=4096
    )
    accumulate: int = knob(
        1,
        "parts in which a process works off its share of a batch, to save memory",
        low=1,
        high=4096,
    )
    num_epochs: int = knob(30, "passes over the training pairs", low=1, high=1_000_000)
    max_minutes: float = knob(
        0.0, "stop cleanly after this many minutes of training; 0: no limit", low=0.0, high=1e6
    )
    learning_rate: float = knob(2e-4, "peak learning rate of AdamW", low=1e-8, high=1.0)
    warmup_steps: int = knob(
        100, "steps of linear warm-up, then cosine decay to 1 % of the peak", low=0, high=10_000_000
    )
    weight_decay: float = knob(1e-4, "decoupled weight decay of AdamW", low=0.0, high=1.0)
    gradient_clip: float = knob(1.0, "largest norm of the gradient", low=1e-6, high=1e6)
    ema_decay: float = knob(
        0.997,
        "decay of the averaged weights that are validated and saved as best; 0: off",
        low=0.0,
        high=0.999999,
    )
    val_freq: int = knob(1, "epochs between validations", low=1, high=1_000_000)
    save_freq: int = knob(1, "epochs between checkpoints", low=1, high=1_000_000)
    keep_checkpoints: int = knob(3, "newest epoch checkpoints kept", low=1, high=1_000_000)
    init_from: str = knob("", "checkpoint whose weights a new training starts from")
    # evaluation and enhancement
    scenes: str = knob(
        "", "evaluate: only the pairs of these file stems, separated by commas; empty: all"
    )
    eval_size: str = knob(
        "auto", "native, or height,width; auto: native for models trained on crops, else image_size"
    )
    temperature: float = knob(
        0.0,
        "spread of the latent around its mean, in prior deviations; 0: the one best answer",
        low=0.0,
        high=10.0,
    )
    samples: int = knob(
        0,
        "enhance: alternatives to draw beside the best answer (temperature 1 where it is 0)",
        low=0,
        high=64,
    )
    uncertainty: bool = knob(
        False,
        "enhance: also write the standard deviation over samples (over 16 where samples is"
        " below 2)",
    )
    exposure: float = knob(
        0.0, "enhance: brighten (or darken, below 0) the result, in stops", low=-6.0, high=6.0
    )
    reference: str = knob("", "enhance: a picture whose mean brightness the result takes")
    overwrite: bool = knob(False, "enhance, folders: do again what is already done")
    quality: int = knob(95, "enhance: quality of JPEG and WebP files", low=1, high=100)
    tile_size: int = knob(
        0,
        "enhance: side of a large picture's tiles, a multiple of 8; 0: by memory",
        low=0,
        high=65536,
    )
    memory_megabytes: int = knob(
        600, "enhance: memory for the work on one tile", low=64, high=1_000_000
    )
    # output
    checkpoint_dir: str = knob("checkpoints", "where weights go")
    log_dir: str = knob("logs", "where TensorBoard logs go")
    results_dir: str = knob("results", "where evaluations go")


# what only the user of a checkpoint says, never the checkpoint: it may be a stranger's
USE_KEYS = (
    *("device", "num_workers", "cache_megabytes", "results_dir"),
    *(
        "samples",
        "uncertainty",
        "exposure",
        "reference",
        "overwrite",
        "quality",
        "tile_size",
        "memory_megabytes",
    ),
)

# what another system may have no use for, and names in its `unused`
FLOW_KEYS = ("flow_channels", "num_flow_blocks", "thumbnail_size", "global_dropout")
HISTOGRAM_KEYS = ("histogram_bins", "histogram_kernel", "histogram_sigma", "histogram_size")
LOSS_KEYS = ("nll_weight", "l1_weight", "ssim_weight", "colour_weight", *HISTOGRAM_KEYS)
TILE_KEYS = ("tile_size", "memory_megabytes")


def coerce(key: dataclasses.Field, value: Any, source: str) -> Any:
    """`value` as the type of `key`, or UserError naming the key and what is allowed."""
    problem = UserError(f"{source}: {key.name} must be {allowed(key)}, got {shown(value)}")

    def number(item: Any) -> Any:
        if isinstance(item, bool) or not isinstance(item, (int, float)):
            raise problem
        # false for NaN; before int(), which infinity breaks
        if not key.metadata["low"] <= item <= key.metadata["high"]:
            raise problem
        if "int" in key.type and item != int(item):
            raise problem
        return int(item) if "int" in key.type else float(item)

    if key.type == "bool":
        if not isinstance(value, bool):
            raise problem
        return value
    if key.type == "str":
        if not is_text(value) or (key.metadata["choices"] and value not in key.metadata["choices"]):
            raise problem
        return value
    if key.type.startswith("list"):
        if not isinstance(value, list) or not value:
            raise problem
        return [number(item) for item in value]
    return number(value)


def apply_settings(config: Config, settings: dict[str, Any], source: str) -> Config:
    """A copy of `config` with `settings` typed, range-checked and put in; `source` names where they
    came from."""
    merged = dataclasses.replace(config, **typed_settings(config, settings, source))
    check_together(merged, source)
    return merged


def typed_settings(config: Config, settings: dict[str, Any], source: str) -> dict[str, Any]:
    """`settings` as the types of `config`'s keys. Raises UserError for an unknown key or a value
    that is not allowed."""
    keys = {key.name: key for key in dataclasses.fields(config)}
    changes = {}
    for name, value in settings.items():
        if name not in keys:
            nearest = difflib.get_close_matches(name[:80], keys, n=1, cutoff=0.0)[0]
            raise UserError(
                f"{source}: unknown key {name[:80]}; the nearest is {nearest}"
                f" ({allowed(keys[nearest])})"
            )
        changes[name] = coerce(keys[name], value, source)
    return changes


def check_together(config: Config, source: str) -> None:
    """Rules that no single key can state."""
    if len(config.image_size) != 2:
        raise UserError(
            f"{source}: image_size must be two integers in [16, 8192], height and width, got"
            f" {config.image_size}"
        )
    if config.crop_size % 8 or 0 < config.crop_size < 32:
        raise UserError(
            f"{source}: crop_size must be 0 or a multiple of 8 in [32, 4096], got"
            f" {config.crop_size}"
        )
    if config.thumbnail_size % 16:
        raise UserError(
            f"{source}: thumbnail_size must be a multiple of 16 in [32, 512], got"
            f" {config.thumbnail_size}"
        )
    if config.flow_channels % 8:
        raise UserError(
            f"{source}: flow_channels must be a multiple of 8 in [8, 1024], got"
            f" {config.flow_channels}"
        )
    if bool(config.val_low_dir) != bool(config.val_high_dir):
        raise UserError(f"{source}: val_low_dir and val_high_dir must be given together")
    if not config.val_low_dir and config.val_fraction == 0:
        raise UserError(
            f"{source}: val_fraction must be above 0 unless val_low_dir and val_high_dir name a"
            " validation set"
        )
    if config.nll_weight == config.l1_weight == config.ssim_weight == config.colour_weight == 0:
        raise UserError(
            f"{source}: one of nll_weight, l1_weight, ssim_weight and colour_weight must be above 0"
        )
    if config.tile_size % 8 or 0 < config.tile_size < 64:
        raise UserError(
            f"{source}: tile_size must be 0 or a multiple of 8 in [64, 65536], got"
            f" {config.tile_size}"
        )
    parse_eval_size(config.eval_size, source)


def parse_assignment(text: str, config_class: type[Config]) -> tuple[str, Any]:
    """('batch_size', 4) from 'batch_size=4', read by the type of the field."""
    name, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--set {text}: write KEY=VALUE, for example --set batch_size=4")
    kinds = {key.name: key.type for key in dataclasses.fields(config_class)}
    kind = kinds.get(name, "str")
    if kind == "str":
        return name, value
    if kind.startswith("list") and not value.startswith("["):
        value = f"[{value}]"
    try:
        return name, json.loads(value.lower() if kind == "bool" else value.removeprefix("+"))
    except (ValueError, RecursionError):
        return name, value


EXAMPLES = """\
examples
  train      python {program} --mode train    --config {recipe}
  resume     python {program} --mode train    --resume {folder}/checkpoint_epoch_7.pth
  evaluate   python {program} --mode evaluate --checkpoint {folder}/best_model.pth --config {recipe}
  enhance    python {program} --mode enhance  --checkpoint {folder}/best_model.pth \\
               --input low.jpg --output out.jpg
  folder     python {program} --mode enhance  --checkpoint {folder}/best_model.pth \\
               --input photos --output enhanced
  export     python {program} --mode export   --checkpoint {folder}/best_model.pth \\
               --output enhancer.onnx
  demo       python {program} --mode demo     --config {recipe}
  curves     tensorboard --logdir logs
"""


def examples(config_class: type[Config]) -> str:
    """A command for every mode, for --help."""
    return EXAMPLES.format(
        program=config_class.program,
        recipe=config_class.recipe,
        folder=config_class().checkpoint_dir,
    )


def describe_keys(config_class: type[Config]) -> str:
    """Every config key with its default, its meaning and its range, for --help."""
    lines = ["config keys (in the JSON file, or --set KEY=VALUE)"]
    default = config_class()
    for key in dataclasses.fields(config_class):
        if key.name not in config_class.unused:
            value = json.dumps(getattr(default, key.name))
            lines.append(
                f"  {key.name} = {value}\n      {key.metadata['meaning']} ({allowed(key)})"
            )
    if config_class.unused:
        lines.append(
            f"of the shared keys these change nothing here: {', '.join(config_class.unused)}"
        )
    return "\n".join(lines)


def parse_command_line(
    argv: Sequence[str] | None = None, config_class: type[Config] = Config
) -> argparse.Namespace:
    """Arguments with `settings` (the config file's and --set's, checked) added. Raises
    UserError."""
    ours = (
        "the released ones beside this script"
        if config_class is Config
        else "best_model.pth in checkpoint_dir"
    )
    parser = OneLineParser(
        description=f"Enhance dark, infrared-tinted photographs with {config_class.method}.",
        epilog=f"{examples(config_class)}\n{describe_keys(config_class)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--mode", required=True, choices=("train", "evaluate", "enhance", "demo", "export")
    )
    parser.add_argument("--config", metavar="FILE", help="JSON file with any of the keys below")
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="override one key; repeatable",
    )
    parser.add_argument("--checkpoint", metavar="FILE", help=f"weights to use; default: {ours}")
    parser.add_argument(
        "--resume",
        metavar="FILE",
        help="train: go on from this checkpoint, or from a folder's newest",
    )
    parser.add_argument(
        "--input",
        metavar="FILE",
        help="enhance: the dark picture, a folder of them, or a pattern in quotes",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        help=(
            "enhance: the enhanced picture, whose suffix sets the format, or a folder; export: the"
            " .onnx file"
        ),
    )
    arguments = parser.parse_args(argv)

    needs = {"enhance": ("input", "output"), "export": ("output",)}
    takes = {
        "train": ("resume",),
        "evaluate": ("checkpoint",),
        "enhance": ("checkpoint", "input", "output"),
    }
    takes |= {"export": ("checkpoint", "output")}
    for name in ("checkpoint", "resume", "input", "output"):
        given = getattr(arguments, name) is not None
        if given and name not in takes.get(arguments.mode, ()):
            raise UserError(f"--{name} does nothing in --mode {arguments.mode}; leave it out")
        if not given and name in needs.get(arguments.mode, ()):
            raise UserError(f"--mode {arguments.mode} needs --{name} FILE")
    default, source = config_class(), arguments.config or "config"
    settings = (
        typed_settings(default, read_config_file(arguments.config), source)
        if arguments.config
        else {}
    )
    overrides = dict(parse_assignment(text, config_class) for text in arguments.set)
    for name in config_class.unused:
        settings.pop(name, None)  # a config file may be for several systems
        if name in overrides:
            raise UserError(f"--set {name}: changes nothing in {config_class.method}; leave it out")
    settings |= typed_settings(default, overrides, "--set")
    check_together(dataclasses.replace(default, **settings), "--set" if overrides else source)
    arguments.settings = settings
    if arguments.checkpoint is None and "checkpoint" in takes.get(arguments.mode, ()):
        theirs = Path(settings.get("checkpoint_dir", default.checkpoint_dir)) / "best_model.pth"
        arguments.checkpoint = str(RELEASE if config_class is Config else theirs)
    return arguments


# --------------------------------------------------------------------------------------------------
# Files: pictures in, everything out through one atomic helper
# --------------------------------------------------------------------------------------------------


# --------------------------------------------------------------------------------------------------
# Data: pairs by stem, split by scene, cached as uint8, served resized or as native-resolution crops
# --------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """Two files of one stem."""

    name: str
    low: Path
    high: Path


def find_pairs(
    low_dir: str, high_dir: str, kind: str, log: Callable[[str], None] = print
) -> list[Pair]:
    """Pairs in natural order; files without a partner are counted and named through `log`.

    `kind` is train, val or eval and names the config keys in errors. Raises UserError when nothing
    pairs up.
    """
    lows, highs = (
        pictures_by_stem(low_dir, f"{kind}_low_dir"),
        pictures_by_stem(high_dir, f"{kind}_high_dir"),
    )
    for folder, orphans in (
        (low_dir, lows.keys() - highs.keys()),
        (high_dir, highs.keys() - lows.keys()),
    ):
        if orphans:
            paths = lows if folder == low_dir else highs
            names = ", ".join(paths[stem].name for stem in sorted(orphans, key=natural_key))
            log(
                f"{kind}: {len(orphans)} pictures in {folder} have no partner and are left out:"
                f" {names}"
            )
    stems = sorted(lows.keys() & highs.keys(), key=natural_key)
    if not stems:
        raise UserError(
            f"{kind}_low_dir: no file in {low_dir} shares its stem with one in {high_dir}; pairs"
            " are matched by stem"
        )
    return [Pair(stem, lows[stem], highs[stem]) for stem in stems]


def choose_scenes(pairs: list[Pair], scenes: str) -> list[Pair]:
    """The pairs whose stems the list `scenes` names, in its order; all for an empty one. Raises
    UserError for others."""
    known = {pair.name: pair for pair in pairs}
    wanted = [stem.strip() for stem in scenes.split(",") if stem.strip()]
    for stem in wanted:
        if stem not in known:
            raise UserError(
                f"scenes: no pair has the stem {stem}; there are {len(known)}, from {min(known)} to"
                f" {max(known)}"
            )
    return [known[stem] for stem in dict.fromkeys(wanted)] or pairs


def evaluation_pairs(config: Config) -> list[Pair]:
    """The pairs to score, those of `scenes` where it names some. Raises UserError."""
    return choose_scenes(
        find_pairs(config.eval_low_dir, config.eval_high_dir, "eval"), config.scenes
    )


class PairStore:
    """Decoded pairs, kept as uint8 up to a byte limit and read again beyond it.

    Every file is decoded once at construction, so that a bad one is reported before the first step.
    `thumbnails` holds each target at 16x16 (N, 16, 16, 3) uint8; scenes and twins are told by them.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        config: Config,
        log: Callable[[str], None] = print,
        room: int | None = None,
    ) -> None:
        self.pairs: list[Pair] = []
        self._cache: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        # bytes; what another store left, say
        self.room = config.cache_megabytes * 2**20 if room is None else room
        thumbnails, bad = [], []
        for pair in tqdm(pairs, desc="reading pairs", leave=False, **progress_style()):
            try:
                low, high = self._read(pair)
            except UserError as error:
                if config.on_bad_file == "error":
                    raise UserError(
                        f"{error}; or leave such files out with --set on_bad_file=skip"
                    ) from None
                bad.append(str(error))
                continue
            self.pairs.append(pair)
            thumbnails.append(
                np.asarray(Image.fromarray(high).resize((16, 16), Image.Resampling.BOX))
            )
            if low.nbytes + high.nbytes <= self.room:
                self.room -= low.nbytes + high.nbytes
                self._cache[pair.name] = (low, high)
        for line in bad:
            log(f"left out: {line}")
        if not self.pairs:
            raise UserError(f"{pairs[0].low.parent}: not one readable pair is left")
        self.thumbnails = np.stack(thumbnails)

    @staticmethod
    def _read(pair: Pair) -> tuple[np.ndarray, np.ndarray]:
        low, high = read_image(pair.low), read_image(pair.high)
        if low.shape != high.shape:
            sizes = (
                f"{low.shape[1]}x{low.shape[0]} against {high.shape[1]}x{high.shape[0]} in"
                f" {pair.high}"
            )
            raise UserError(f"{pair.low}: the pair's sizes differ, {sizes}")
        if min(low.shape[:2]) < 16:
            raise UserError(
                f"{pair.low}: {low.shape[1]}x{low.shape[0]} is too small; the least side is 16"
            )
        return low, high

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(low, high), each (H, W, 3) uint8."""
        pair = self.pairs[index]
        return self._cache[pair.name] if pair.name in self._cache else self._read(pair)


def find_scenes(thumbnails: np.ndarray, similarity: float) -> list[list[int]]:
    """Groups of indices whose (N, 16, 16, 3) thumbnails are alike, chained: one scene never falls
    apart.

    Alike means a Pearson correlation of at least `similarity`; it ignores exposure, which differs
    between takes.
    """
    flat = thumbnails.reshape(len(thumbnails), -1).astype(np.float64)
    flat = flat - flat.mean(1, keepdims=True)
    flat /= np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-9)
    alike = flat @ flat.T >= similarity
    scenes: list[list[int]] = []
    unseen = set(range(len(flat)))
    for first in range(len(flat)):
        scene, frontier = [], {first} & unseen
        while frontier:
            unseen -= frontier
            scene += sorted(frontier)
            frontier = {int(j) for i in frontier for j in np.flatnonzero(alike[i])} & unseen
        if scene:
            scenes.append(sorted(scene))
    return scenes


def split_by_scene(thumbnails: np.ndarray, config: Config) -> tuple[list[int], list[int]]:
    """(training, validation) indices; whole scenes, drawn by the seed, until val_fraction is
    filled."""
    scenes = find_scenes(thumbnails, config.scene_similarity)
    if len(scenes) < 2:
        raise UserError(
            "val_fraction: all training pairs show one scene; name val_low_dir and val_high_dir"
            " instead"
        )
    wanted = max(1, round(config.val_fraction * len(thumbnails)))
    order = np.random.default_rng(config.seed).permutation(len(scenes))
    validation: list[int] = []
    for place in order[:-1]:
        if len(validation) < wanted and len(validation) + len(scenes[place]) <= max(
            wanted, len(scenes[place])
        ):
            validation += scenes[place]
    return sorted(set(range(len(thumbnails))) - set(validation)), sorted(validation)


def find_twins(thumbnails: np.ndarray, others: np.ndarray, tolerance: float = 2.0) -> np.ndarray:
    """For each of (N, 16, 16, 3) uint8 thumbnails whether one of `others` is the same picture: mean
    |difference| in levels."""
    if len(others) == 0:
        return np.zeros(len(thumbnails), bool)
    known = others.astype(np.float32)
    return np.array([np.abs(known - one).mean((1, 2, 3)).min() <= tolerance for one in thumbnails])


def resize(image: Tensor, size: Sequence[int], quantise: bool = False) -> Tensor:
    """(B, 3, h, w) of (B, 3, H, W): antialiased bilinear; `quantise` rounds to 8-bit levels, as a
    resized file would be."""
    if tuple(image.shape[-2:]) != tuple(size):
        image = F.interpolate(
            image, size=tuple(size), mode="bilinear", antialias=True, align_corners=False
        )
    return (image * 255).round() / 255 if quantise else image


class Sample(NamedTuple):
    """A batch, or one item of it before collation. Values in [0, 1] but `box`.

    low, high: (B, 3, h, w), the pixels the local branch sees; thumbnail: (B, 3, t, t), the whole
    picture, low; box: (B, 4), left, top, right, bottom of `low` within the whole picture, in [0,
    1].
    """

    low: Tensor
    high: Tensor
    thumbnail: Tensor
    box: Tensor


WHOLE_BOX = (0.0, 0.0, 1.0, 1.0)


class Draw(NamedTuple):
    """What a training sample is made of: pair number `pair`, as `epoch` augments it; `whole` at
    image_size, else cropped."""

    epoch: int
    pair: int
    whole: bool = False


class TrainingSamples(Dataset):
    """Augmented samples; the item of a Draw is a pure function of the seed, so that a resumed run
    repeats it."""

    def __init__(self, store: PairStore, indices: Sequence[int], config: Config) -> None:
        self.store, self.indices, self.config = store, indices, config

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, draw: Draw | tuple[int, int]) -> Sample:
        epoch, index, whole = Draw(*draw)
        rng = np.random.default_rng((self.config.seed, epoch, index))
        low, high = self.store[self.indices[index]]
        top, left, height, width = self._window(low.shape, rng)
        pair = torch.stack(
            [to_tensor(p[top : top + height, left : left + width]) for p in (low, high)]
        )
        if self.config.crop_size and not whole:
            pixels, box = self._crop(pair, rng)
        else:
            pixels, box = resize(pair, self.config.image_size, quantise=True), WHOLE_BOX
        thumbnail = resize(pair[:1], [self.config.thumbnail_size] * 2)[0]
        return self._augment(Sample(pixels[0], pixels[1], thumbnail, torch.tensor(box)), rng)

    def _window(
        self, shape: tuple[int, ...], rng: np.random.Generator
    ) -> tuple[int, int, int, int]:
        """Top, left, height, width of the part that plays the whole picture, so that the global
        branch sees variety."""
        sides = [
            max(16, round(side * rng.uniform(self.config.window_min, 1))) for side in shape[:2]
        ]
        top, left = (
            int(rng.integers(0, full - side + 1))
            for full, side in zip(shape[:2], sides, strict=True)
        )
        return top, left, sides[0], sides[1]

    def _crop(self, pair: Tensor, rng: np.random.Generator) -> tuple[Tensor, tuple[float, ...]]:
        """A crop_size square of a (2, 3, H, W) pair at one of crop_scales, and the box it was cut
        from."""
        crop, (height, width) = self.config.crop_size, pair.shape[-2:]
        scale = float(rng.choice(self.config.crop_scales))
        if scale == 0:
            return resize(pair, (crop, crop), quantise=True), WHOLE_BOX
        side = min(round(crop / scale), height, width)
        top, left = int(rng.integers(0, height - side + 1)), int(rng.integers(0, width - side + 1))
        pixels = resize(
            pair[..., top : top + side, left : left + side], (crop, crop), quantise=True
        )
        return pixels, (left / width, top / height, (left + side) / width, (top + side) / height)

    def _augment(self, sample: Sample, rng: np.random.Generator) -> Sample:
        low, high, thumbnail = sample[:3]
        flip_x, flip_y, swap = (bool(x) for x in rng.integers(0, 2, 3))
        gain = 2.0 ** (self.config.exposure_gain * rng.uniform(-1, 1))
        gains = torch.tensor(
            gain * (1 + self.config.channel_gain * rng.uniform(-1, 1, 3)), dtype=torch.float32
        )[:, None, None]
        low, thumbnail = (low * gains).clamp(0, 1), (thumbnail * gains).clamp(0, 1)
        left, top, right, bottom = sample.box.tolist()
        pictures = [low, high, thumbnail]
        if self.config.flips and flip_x:
            pictures, (left, right) = [p.flip(-1) for p in pictures], (1 - right, 1 - left)
        if self.config.flips and flip_y:
            pictures, (top, bottom) = [p.flip(-2) for p in pictures], (1 - bottom, 1 - top)
        if self.config.flips and swap and low.shape[-1] == low.shape[-2]:
            pictures, (left, top, right, bottom) = (
                [p.mT for p in pictures],
                (top, left, bottom, right),
            )
        low, high, thumbnail = (picture.contiguous() for picture in pictures)
        return Sample(low, high, thumbnail, torch.tensor([left, top, right, bottom]))


def batch_plan(count: int, config: Config, epoch: int) -> list[list[Draw]]:
    """The batches of an epoch: a pure function, so that resuming may start at any step. A batch is
    whole or it is not."""
    rng = np.random.default_rng((config.seed, epoch))
    order = rng.permutation(count).tolist()
    batches = [
        order[start : start + config.batch_size] for start in range(0, count, config.batch_size)
    ]
    whole = (rng.random(len(batches)) < config.whole_share).tolist()
    return [
        [Draw(epoch, index, all_of_it) for index in batch]
        for batch, all_of_it in zip(batches, whole, strict=True)
    ]


# --------------------------------------------------------------------------------------------------
# Flow: every layer maps forward(x, condition) -> (y, log_det) and inverse(y, condition) -> (x,
# log_det), log_det (B,)
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

    def inverse(self, v: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y = (v.sigmoid() - self.alpha) / (1 - 2 * self.alpha)
        log_det = F.logsigmoid(v) + F.logsigmoid(-v) - math.log(1 - 2 * self.alpha)
        return y, log_det.flatten(1).sum(1)


class Squeeze(nn.Module):
    """(B, C, H, W) <-> (B, 4C, H/2, W/2): space to depth, volume-preserving."""

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return F.pixel_unshuffle(x, 2), x.new_zeros(len(x))

    def inverse(self, y: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return F.pixel_shuffle(y, 2), y.new_zeros(len(y))


class InvertibleConv(nn.Module):
    """1x1 convolution with W = L (U + diag(exp(d))), Kingma & Dhariwal 2018, eq. 10 without its
    fixed permutation.

    It starts as the identity, so that the latent starts in the layout of the picture and the prior
    mean can be one.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.lower = nn.Parameter(torch.zeros(channels, channels))
        self.upper = nn.Parameter(torch.zeros(channels, channels))
        self.log_diagonal = nn.Parameter(torch.zeros(channels))

    def weight(self) -> Tensor:
        lower = self.lower.tril(-1) + torch.eye(
            len(self.lower), device=self.lower.device, dtype=self.lower.dtype
        )
        return lower @ (self.upper.triu(1) + self.log_diagonal.exp().diag())

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_det = self.log_diagonal.sum() * x.shape[2] * x.shape[3]
        # bf16 here would cost the bijection its exactness
        with torch.autocast(x.device.type, enabled=False):
            return F.conv2d(x, self.weight()[:, :, None, None]), log_det.expand(len(x))

    def inverse(self, y: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_det = -self.log_diagonal.sum() * y.shape[2] * y.shape[3]
        with torch.autocast(y.device.type, enabled=False):
            return F.conv2d(y, torch.linalg.inv(self.weight())[:, :, None, None]), log_det.expand(
                len(y)
            )


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
        """log-scale in [-0.5, 0.5] and shift, each of the shape of the kept half, in the kept
        half's precision."""
        hidden = F.silu(self.from_half(kept) + self.from_condition(condition))
        scale, shift = self.out(F.silu(self.mix(hidden))).to(kept.dtype).chunk(2, dim=1)
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

    def inverse(self, y: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        kept, changed = self._split(y)
        scale, shift = self.scale_and_shift(kept, condition)
        return self._join(kept, (changed - shift) * (-scale).exp()), -scale.flatten(1).sum(1)


class Flow(nn.Module):
    """picture in [0, 1] (B, 3, H, W) <-> latent (B, 48, H/4, W/4); H and W multiples of 4.

    Logit map, squeeze, flow steps at 1/2, squeeze, flow steps at 1/4; a step is a 1x1 convolution
    and a coupling. `condition` is a pair: features at 1/2 and at 1/4.
    """

    def __init__(self, blocks: int, hidden: int, half_channels: int, quarter_channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [LogitMap()]
        self.levels = [0]  # which of the two conditions each layer gets
        for level, (channels, condition) in enumerate(
            ((12, half_channels), (48, quarter_channels))
        ):
            layers.append(Squeeze())
            for block in range(blocks):
                layers += [
                    InvertibleConv(channels),
                    Coupling(channels, condition, hidden, first=block % 2 == 1),
                ]
            self.levels += [level] * (1 + 2 * blocks)
        self.layers = nn.ModuleList(layers)

    def forward(self, y: Tensor, condition: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        total = y.new_zeros(len(y))
        for layer, level in zip(self.layers, self.levels, strict=True):
            y, log_det = layer(y, condition[level])
            total = total + log_det
        return y, total

    def inverse(self, z: Tensor, condition: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        total = z.new_zeros(len(z))
        layers: Iterable[Any] = reversed(self.layers)
        for layer, level in zip(layers, reversed(self.levels), strict=True):
            z, log_det = layer.inverse(z, condition[level])
            total = total + log_det
        return z, total


# --------------------------------------------------------------------------------------------------
# Model: the global branch knows the colour, the local branch the detail, the flow what neither can
# know
# --------------------------------------------------------------------------------------------------


def conv3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """3x3 convolution that keeps the size (or halves it with stride 2)."""
    return nn.Conv2d(inputs, outputs, 3, stride, 1)


def zero_init(layer: nn.Conv2d) -> nn.Conv2d:
    """The layer, starting at zero, so that what it feeds starts as the identity."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class ChannelDropout(nn.Module):
    """Dropout of whole channels, the same ones for all of a batch: it is one draw, however the
    batch is divided."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        return (
            x * F.dropout(x.new_ones(1, x.shape[1], 1, 1), self.rate)
            if self.training and self.rate
            else x
        )


class ResidualBlock(nn.Module):
    """x + conv(silu(conv(silu(x)))); no normalisation, so that a crop and the whole picture give
    the same values."""

    def __init__(self, channels: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.second = conv3(channels, channels), zero_init(conv3(channels, channels))
        self.dropout = ChannelDropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.dropout(F.silu(self.first(F.silu(x)))))


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
        qkv = (
            self.to_qkv(self.norm(x))
            .reshape(b, 3, self.heads, c // self.heads, h * w)
            .transpose(-1, -2)
        )
        mixed = F.scaled_dot_product_attention(*qkv.unbind(1))  # (B, heads, HW, C / heads)
        return x + self.out(mixed.transpose(-1, -2).reshape(b, c, h, w))


def low_features(low: Tensor, brightness: Tensor) -> Tensor:
    """(B, 9, H, W): low, its logarithm and low over the whole picture's mean `brightness` (B, 1, 1,
    1).

    The logarithm opens up the few counts of a dark sensor; the ratio makes the rest indifferent to
    exposure.
    """
    return torch.cat(
        [low, (low * 255 + 1).log2() / 8, (low / (4 * brightness)).clamp(max=4)], dim=1
    )


def sample_grid(grid: Tensor, box: Tensor, size: Sequence[int]) -> Tensor:
    """(B, C, h, w) of a (B, C, g, g) grid over the whole picture, read at the pixel centres of
    `box` (B, 4) in [0, 1]."""
    height, width = size
    left, top, right, bottom = box[:, :, None].to(grid.dtype).unbind(1)
    x = left + (right - left) * (torch.arange(width, device=grid.device) + 0.5) / width  # (B, w)
    y = top + (bottom - top) * (torch.arange(height, device=grid.device) + 0.5) / height  # (B, h)
    points = torch.stack(
        [x[:, None].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], dim=-1
    )
    return F.grid_sample(grid, points * 2 - 1, padding_mode="border", align_corners=False)


class System(nn.Module):
    """What training, evaluation and enhancement ask of a model; subclasses are built from their
    config alone.

    They must have `losses` and `enhance`; the rest is there to be overridden.
    """

    # the name that checkpoints carry, so that no other system reads them; empty: the class's
    system = ""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def losses(self, batch: Sample) -> dict[str, Tensor]:
        """Named scalars, means over the batch, whose sum is minimised."""
        raise NotImplementedError

    def enhance(self, low: Tensor, temperature: float = 0.0) -> Tensor:
        """Enhanced pictures (B, 3, H, W) in [0, 1] of `low`, the same shape and range, any sides of
        at least 16."""
        raise NotImplementedError

    def likelihood(self, high: Tensor, low: Tensor) -> tuple[Tensor, Tensor] | None:
        """(bits per dimension (B,), standardised latent) of `high` given `low`; None for a model
        that knows none."""
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

    def begin_step(self, progress: float) -> None:
        """Told before every step, for training in stages: what it does must follow from `progress`
        alone."""


class GlobalBranch(nn.Module):
    """Thumbnail (B, 3, t, t) -> (features (B, width, t/4, t/4), colour (B, 3, t/4, t/4) in the
    flow's space).

    Illumination, white balance and exposure are questions about the whole picture; a U-Net with
    self-attention at t/8.
    """

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        w1, w2, w3, w4 = width // 3 * 2, width // 3 * 4, width // 3 * 8, width * 4
        self.stem = nn.Sequential(conv3(36, w1), ResidualBlock(w1))  # t/2
        # t/4
        self.down2 = nn.Sequential(
            conv3(w1, w2, 2), ResidualBlock(w2, dropout), ResidualBlock(w2, dropout)
        )
        self.down3 = nn.Sequential(
            conv3(w2, w3, 2),
            ResidualBlock(w3, dropout),
            SelfAttention(w3),
            ResidualBlock(w3, dropout),
        )
        self.down4 = nn.Sequential(
            conv3(w3, w4, 2),
            ResidualBlock(w4, dropout),
            SelfAttention(w4),
            ResidualBlock(w4, dropout),
        )
        self.up3 = nn.Sequential(conv3(w4, w3), nn.Upsample(scale_factor=2, mode="nearest"))
        self.mix3 = nn.Sequential(ResidualBlock(w3, dropout), SelfAttention(w3))
        self.up2 = nn.Sequential(conv3(w3, w2), nn.Upsample(scale_factor=2, mode="nearest"))
        self.mix2 = ResidualBlock(w2, dropout)
        self.features = nn.Conv2d(w2, width, 1)
        self.colour = zero_init(conv3(w2, 3))

    def forward(self, thumbnail: Tensor, brightness: Tensor) -> tuple[Tensor, Tensor]:
        x1 = self.stem(F.pixel_unshuffle(low_features(thumbnail, brightness), 2))
        x2 = self.down2(x1)
        x3 = self.down3(x2)
        x3 = self.mix3(x3 + self.up3(self.down4(x3)))
        x2 = self.mix2(x2 + self.up2(x3))
        return self.features(x2), self.colour(x2)


class LocalBranch(nn.Module):
    """Pixels (B, 3, H, W), global grid and colour read at their place -> features at 1/2 and 1/4,
    residual (B, 12, H/2, W/2).

    Fully convolutional with a bounded receptive field: a crop, a tile and the whole picture agree
    away from their rims.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        w1, w2, w3 = width, 2 * width, 4 * width
        self.stem = nn.Sequential(conv3(48, w1), ResidualBlock(w1))  # 1/2
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
        pixels = torch.cat([low_features(low, brightness), colour], dim=1)
        x1 = self.stem(F.pixel_unshuffle(pixels, 2))
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
    """All that the flow knows of `low`: prior_mean in the latent's layout (B, 48, H/4, W/4),
    features at 1/2 and 1/4."""

    prior_mean: Tensor
    features: tuple[Tensor, Tensor]


def pad_to_multiple(image: Tensor, multiple: int = 8) -> Tensor:
    """Repeat the last row and column until both sides divide by `multiple`."""
    height, width = image.shape[-2:]
    return F.pad(image, (0, -width % multiple, 0, -height % multiple), mode="replicate")


def dequantise(image: Tensor, noise: Tensor) -> Tensor:
    """8-bit levels in [0, 1] and uniform noise in [0, 1) -> continuous values in [0, 1): y = (255 x
    + u) / 256."""
    return (image * 255 + noise) / 256


def requantise(y: Tensor) -> Tensor:
    """The level in [0, 1] whose bin has `y` as its centre; inverse of `dequantise` at u = 1/2,
    clamped."""
    return ((y * 256 - 0.5) / 255).clamp(0, 1)


def gaussian_log_prob(z: Tensor, mean: Tensor, log_sigma: Tensor) -> Tensor:
    """log N(z; mean, exp(log_sigma)^2 I), summed over all but the batch: (B,), in nats."""
    deviation = (z - mean) * (-log_sigma).exp()
    return (-0.5 * deviation**2 - log_sigma - 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)


def bits_per_dim(log_likelihood: Tensor, dimensions: int) -> Tensor:
    """Code length of an 8-bit image from the density of its dequantised values in [0, 1]: Theis et
    al. 2016, section 3.1."""
    return -log_likelihood / (dimensions * math.log(2)) + 8


class ConditionalFlow(System):
    """p(high | low): an exact flow whose prior N(mu(low), sigma^2 I) has mu from a global and a
    local branch."""

    system = "ConditionalFlow"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        width = config.flow_channels // 2
        self.global_branch = GlobalBranch(width, config.global_dropout)
        self.local_branch = LocalBranch(width)
        self.flow = Flow(config.num_flow_blocks, config.flow_channels, width, 2 * width)
        self.log_sigma = nn.Parameter(torch.tensor(math.log(0.5)))

    @property
    def reach(self) -> int:
        """Pixels beyond which nothing of `low` but its survey can change an output: the halo of a
        tile, a multiple of 8.

        The sum of every 3x3 convolution's stride from output to input; 7 for tiles that start
        within a block of 8.
        """
        flow = 2 * (2 + 4) * self.config.num_flow_blocks
        half, quarter, eighth = 2 * (1 + 4 + 1 + 3), 4 * (2 + 1 + 2), 8 * (1 + 4)
        return math.ceil((flow + half + quarter + eighth + 7) / 8) * 8

    def survey(self, thumbnail: Tensor) -> Survey:
        """The global branch's view of whole pictures, of which only thumbnails (B, 3, t, t) are
        needed."""
        brightness = thumbnail.mean((1, 2, 3), keepdim=True).clamp(min=1 / 255)
        grid, colour = self.global_branch(thumbnail, brightness)
        return Survey(brightness, grid.to(thumbnail.dtype), colour.to(thumbnail.dtype))

    def condition(self, low: Tensor, survey: Survey, box: Tensor) -> Condition:
        """What the flow is told of `low` (B, 3, H, W), sides multiples of 8, that lies at `box` (B,
        4) of what was surveyed."""
        height, width = low.shape[-2:]
        colour = sample_grid(survey.colour, box, (height, width))
        grid = sample_grid(survey.grid, box, (height // 4, width // 4))
        half, quarter, residual = self.local_branch(low, survey.brightness, grid, colour)
        mean = F.pixel_unshuffle(colour, 2) + residual.to(low.dtype)
        return Condition(F.pixel_unshuffle(mean, 2), (half, quarter))

    def decode(self, latent: Tensor, condition: Condition) -> Tensor:
        """Picture in [0, 1] (B, 3, H, W) of a latent (B, 48, H/4, W/4)."""
        return requantise(self.flow.inverse(latent, condition.features)[0])

    def log_likelihood(
        self, high: Tensor, condition: Condition, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(log p(dequantised high | low) in nats (B,), standardised latent); sides multiples of
        4."""
        latent, log_det = self.flow(dequantise(high, noise), condition.features)
        log_prob = gaussian_log_prob(latent, condition.prior_mean, self.log_sigma)
        return log_prob + log_det, (latent - condition.prior_mean) * (-self.log_sigma).exp()

    def losses(self, batch: Sample) -> dict[str, Tensor]:
        """Named, weighted terms of the training loss, scalars; terms of weight 0 are not
        computed."""
        config, (height, width) = self.config, batch.high.shape[-2:]
        survey = self.survey(batch.thumbnail)
        condition = self.condition(
            pad_to_multiple(batch.low), survey, padded_box(batch.box, height, width)
        )
        terms: dict[str, Tensor] = {}
        if config.nll_weight:
            bits = self._bits(batch.high, condition)[0]
            terms["nll"] = config.nll_weight * bits.mean()
        if config.l1_weight or config.ssim_weight or config.colour_weight:
            enhanced = self.decode(condition.prior_mean, condition)[..., :height, :width]
            terms |= picture_losses(enhanced, batch.high, config)
        return terms

    def _bits(self, high: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """(bits per dimension (B,), standardised latent) of `high`, cut to multiples of 4 so that
        padding never counts."""
        height, width = high.shape[-2] // 4 * 4, high.shape[-1] // 4 * 4
        half, quarter = condition.features
        cut = condition._replace(
            prior_mean=condition.prior_mean[..., : height // 4, : width // 4],
            features=(
                half[..., : height // 2, : width // 2],
                quarter[..., : height // 4, : width // 4],
            ),
        )
        high = high[..., :height, :width]
        # one draw of noise serves all of the batch: as good on average, and the same however the
        # batch is divided
        log_likelihood, latent = self.log_likelihood(high, cut, torch.rand_like(high[:1]))
        return bits_per_dim(log_likelihood, high[0].numel()), latent

    def _condition_whole(self, low: Tensor) -> Condition:
        size = self.config.thumbnail_size
        box = padded_box(
            torch.tensor([WHOLE_BOX], device=low.device).expand(len(low), 4), *low.shape[-2:]
        )
        return self.condition(pad_to_multiple(low), self.survey(resize(low, (size, size))), box)

    def likelihood(self, high: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
        """(bits per dimension (B,), standardised latent) of whole pictures `high` given `low`, each
        (B, 3, H, W) in [0, 1]."""
        return self._bits(high, self._condition_whole(low))

    def enhance(self, low: Tensor, temperature: float = 0.0) -> Tensor:
        """Enhanced whole pictures (B, 3, H, W) in [0, 1] of `low`, any sides of at least 16.

        `temperature` 0 decodes z = mu(low); above 0 it draws z ~ N(mu(low), (temperature sigma)^2
        I).
        """
        condition = self._condition_whole(low)
        latent = condition.prior_mean
        if temperature:
            latent = latent + temperature * self.log_sigma.exp() * torch.randn_like(latent)
        return self.decode(latent, condition)[..., : low.shape[-2], : low.shape[-1]]


def padded_box(box: Tensor, height: int, width: int, multiple: int = 8) -> Tensor:
    """The box of a picture that `pad_to_multiple` made larger at its right and bottom."""
    stretch = box.new_tensor(
        [(width + -width % multiple) / width, (height + -height % multiple) / height]
    )
    return torch.cat([box[:, :2], box[:, :2] + (box[:, 2:] - box[:, :2]) * stretch], dim=1)


# --------------------------------------------------------------------------------------------------
# Losses: small pure functions
# --------------------------------------------------------------------------------------------------


def ssim(a: Tensor, b: Tensor, window: int = 7) -> Tensor:
    """Structural similarity (B,) of (B, C, H, W) images in [0, 1], Wang et al. 2004, with the
    uniform 7x7 window and the sample covariance of scikit-image's default: the loss is the
    metric."""
    sample = window**2 / (window**2 - 1)
    maps = torch.cat([a, b, a * a, b * b, a * b], 1).contiguous(memory_format=torch.channels_last)
    # a box is separable: 2.5x faster so
    means = F.avg_pool2d(F.avg_pool2d(maps, (window, 1), 1), (1, window), 1)
    mean_a, mean_b, aa, bb, ab = means.chunk(5, dim=1)
    var_a, var_b, cov = (
        sample * (aa - mean_a**2),
        sample * (bb - mean_b**2),
        sample * (ab - mean_a * mean_b),
    )
    c1, c2 = 0.01**2, 0.03**2
    value = (
        (2 * mean_a * mean_b + c1)
        * (2 * cov + c2)
        / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    )
    return value.mean((1, 2, 3))


def soft_histogram(
    values: Tensor, bins: int, kernel: str = "triangle", sigma: float = 0.002
) -> Tensor:
    """(..., bins), summing to 1, of values (..., N) in [0, 1]; bin centres at k / (bins - 1).

    triangle: linear interpolation between the two nearest bins. inverse_quadratic: ELIEI's 1 / (1 +
    (d / sigma)^2).
    """
    # only two bins get a share: scattered, 10x faster than all (..., N, bins) distances
    if kernel == "triangle":
        place = values * (bins - 1)
        left = place.detach().floor().clamp(0, bins - 2)
        share, left = place - left, left.long()
        counts = (
            values.new_zeros(*values.shape[:-1], bins)
            .scatter_add(-1, left, 1 - share)
            .scatter_add(-1, left + 1, share)
        )
    else:
        centres = torch.linspace(0, 1, bins, device=values.device, dtype=values.dtype)
        counts = (1 / (1 + ((values[..., None] - centres) / sigma) ** 2)).sum(-2)
    return counts / counts.sum(-1, keepdim=True)


def histogram_wasserstein(p: Tensor, q: Tensor) -> Tensor:
    """1-Wasserstein distance (...,) in [0, 1] of histograms (..., bins) on [0, 1]: the area between
    their CDFs."""
    return (p - q).cumsum(-1).abs().sum(-1) / (p.shape[-1] - 1)


def colour_loss(a: Tensor, b: Tensor, config: Config) -> Tensor:
    """Mean per-channel Wasserstein distance between the colour histograms of (B, 3, H, W) images in
    [0, 1]."""
    size = (min(config.histogram_size, a.shape[-2]), min(config.histogram_size, a.shape[-1]))
    histograms = [
        soft_histogram(
            F.adaptive_avg_pool2d(image, size).flatten(2),
            config.histogram_bins,
            config.histogram_kernel,
            config.histogram_sigma,
        )
        for image in (a, b)
    ]
    return histogram_wasserstein(*histograms).mean()


def picture_losses(enhanced: Tensor, high: Tensor, config: Config) -> dict[str, Tensor]:
    """The weighted terms that compare (B, 3, H, W) pictures in [0, 1]; those of weight 0 are not
    computed."""
    terms: dict[str, Tensor] = {}
    if config.l1_weight:
        terms["l1"] = config.l1_weight * F.l1_loss(enhanced, high)
    if config.ssim_weight:
        terms["ssim"] = config.ssim_weight * (1 - ssim(enhanced, high).mean())
    if config.colour_weight:
        terms["colour"] = config.colour_weight * colour_loss(enhanced, high, config)
    return terms


# --------------------------------------------------------------------------------------------------
# Processes: torchrun starts several; each does its share, the first one speaks and writes
# --------------------------------------------------------------------------------------------------


# --------------------------------------------------------------------------------------------------
# Runtime and checkpoints
# --------------------------------------------------------------------------------------------------


def checkpoint_config(
    checkpoint: dict[str, Any], path: str, settings: dict[str, Any], config_class: type[Config]
) -> Config:
    """The checkpoint's own config under `settings`. Raises UserError where they name another
    architecture.

    Folders recorded in the checkpoint count only where they exist: weights travel, data sets do
    not.
    """
    stored = typed_settings(config_class(), checkpoint["config"], path)
    there = {
        name: value
        for name, value in stored.items()
        if name not in FOLDER_KEYS or os.path.isdir(value)
    }
    config = apply_settings(config_class(), there, path)
    for key in dataclasses.fields(config):
        mine = getattr(config, key.name)
        if key.metadata["architecture"] and settings.get(key.name, mine) != mine:
            raise UserError(
                f"{key.name}: {path} was trained with {mine}, the config says {settings[key.name]};"
                " drop one"
            )
    return apply_settings(config, settings, "config")


def system_of(model_class: type[System]) -> str:
    """The name that a model's checkpoints carry, so that no other system reads them."""
    return model_class.system or model_class.__name__


def check_system(checkpoint: dict[str, Any], path: str, model_class: type[System]) -> None:
    """Raises UserError when the checkpoint is another system's."""
    theirs, ours = checkpoint.get("system", ConditionalFlow.system), system_of(model_class)
    if theirs != ours:
        raise UserError(
            f"{path}: holds weights of {theirs}, not of {ours}; use the script that trained them"
        )


def check_weights(
    checkpoint: dict[str, Any], path: str, model_class: type[System], config: Config
) -> None:
    """Raises UserError unless the weights are a model's of this config; the model is not built,
    which may take gigabytes."""
    check_system(checkpoint, path, model_class)

    def form(value: Any) -> Any:
        return (
            (value.shape, value.is_floating_point(), value.is_complex())
            if isinstance(value, Tensor)
            else None
        )

    try:
        with torch.device("meta"):
            expected = {
                name: form(value) for name, value in model_class(config).state_dict().items()
            }
    except RuntimeError:  # a class that computes with its weights as it is built
        return
    found = checkpoint["model"]
    if (
        not isinstance(found, dict)
        or {name: form(value) for name, value in dict.items(found)} != expected
    ):
        raise UserError(
            f"{path}: the weights do not fit the architecture that its config describes"
        )


@torch.no_grad()
def load_weights(model: System, checkpoint: dict[str, Any], path: str) -> None:
    """Put a checkpoint's weights into `model`. Raises UserError when they do not fit, are not
    finite or not invertible."""
    check_system(checkpoint, path, type(model))
    try:
        model.load_state_dict(checkpoint["model"])
    except (RuntimeError, AttributeError, TypeError):
        raise UserError(
            f"{path}: the weights do not fit the architecture that its config describes"
        ) from None
    matrices = [layer.weight() for layer in model.modules() if isinstance(layer, InvertibleConv)]
    if not all(bool(p.isfinite().all()) for p in [*model.parameters(), *matrices]):
        raise UserError(
            f"{path}: holds weights that are not finite; go back to an earlier checkpoint"
        )
    if any(bool(torch.linalg.inv_ex(matrix).info) for matrix in matrices):
        raise UserError(
            f"{path}: holds weights that cannot be inverted; go back to an earlier checkpoint"
        )


# --------------------------------------------------------------------------------------------------
# Metrics: float images in [0, 1], (H, W, 3), by scikit-image
# --------------------------------------------------------------------------------------------------


# --------------------------------------------------------------------------------------------------
# Pictures for people: triptychs and contact sheets
# --------------------------------------------------------------------------------------------------


def triptych(images: Sequence[Tensor], labels: Sequence[str], scores: str = "") -> Image.Image:
    """(3, H, W) images side by side under a caption line that names each; `scores` follows the
    second label."""
    height, width = images[0].shape[-2:]
    shown = max(width, 200)  # captions need room
    points = max(11, shown // 32)
    font, bar = ImageFont.load_default(size=points), int(points * 1.8)
    scale = shown / width
    canvas = Image.new(
        "RGB", (shown * len(images) + 4 * (len(images) - 1), round(height * scale) + bar), "white"
    )
    draw = ImageDraw.Draw(canvas)
    for place, (image, label) in enumerate(zip(images, labels, strict=True)):
        left = place * (shown + 4)
        picture = Image.fromarray(to_uint8(image))
        if shown != width:
            picture = picture.resize((shown, round(height * scale)), Image.Resampling.NEAREST)
        canvas.paste(picture, (left, bar))
        draw.text(
            (left + 4, bar // 8),
            label + (f"  {scores}" if place == 1 and scores else ""),
            fill="black",
            font=font,
        )
    return canvas


def contact_sheet(rows: Sequence[Image.Image], width: int = 1200) -> Image.Image:
    """Captioned strips below each other, all `width` wide."""
    from torchvision.utils import make_grid  # two seconds to import; only written sheets need it

    strips = [
        strip.resize((width, round(strip.height * width / strip.width)), Image.Resampling.LANCZOS)
        for strip in rows
    ]
    tallest = max(strip.height for strip in strips)
    tensors = [to_tensor(np.asarray(strip)) for strip in strips]
    padded = [F.pad(t, (0, 0, 0, tallest - t.shape[1]), value=1.0) for t in tensors]
    return Image.fromarray(to_uint8(make_grid(padded, nrow=1, padding=6, pad_value=1.0)))


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


def learning_rate_at(progress: float, step: int, config: Config) -> float:
    """Linear warm-up over warmup_steps, then half a cosine to 1 % of the peak; `progress` in [0, 1]
    is the share done."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    return (
        config.learning_rate
        * warm
        * (0.01 + 0.99 * (1 + math.cos(math.pi * min(progress, 1.0))) / 2)
    )


def adamw(parameters: Iterable[Any], config: Config) -> torch.optim.Optimizer:
    """AdamW over parameters or groups of them; a group's `lr_scale` multiplies the scheduled
    learning rate."""
    return torch.optim.AdamW(
        parameters,
        config.learning_rate,
        betas=(0.9, 0.99),
        weight_decay=config.weight_decay,
        fused=True,
    )


def averaged_model(model: nn.Module, decay: float) -> torch.optim.swa_utils.AveragedModel:
    """Exponential moving average of the weights; its decay warms up as (1 + n) / (10 + n), so that
    it forgets the start."""

    # tuples or lists of tensors
    def average(averages: Any, current: Any, count: Tensor | int) -> None:
        now = min(decay, (1 + int(count)) / (10 + int(count)))
        torch._foreach_lerp_(averages, current, 1 - now)

    return torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=average)


def training_data(config: Config) -> tuple[PairStore, list[int], PairStore, list[int]]:
    """(training store, its indices, validation store, its indices)."""
    store = PairStore(find_pairs(config.train_low_dir, config.train_high_dir, "train"), config)
    if config.val_low_dir:
        held_out = PairStore(
            find_pairs(config.val_low_dir, config.val_high_dir, "val"), config, room=store.room
        )
        return store, list(range(len(store))), held_out, list(range(len(held_out)))
    training, validation = split_by_scene(store.thumbnails, config)
    return store, training, store, validation


@contextmanager
def curves(log_dir: Path) -> Iterator[Any]:
    """TensorBoard's writer for `log_dir`. Raises UserError when what was logged cannot be written.

    Its thread hands an error on and then dies of it: that traceback would be the second report of
    one full disk.
    """
    import threading

    # two seconds to import; only training needs it
    from torch.utils.tensorboard import SummaryWriter

    def report(failed: threading.ExceptHookArgs) -> None:
        if not isinstance(failed.exc_value, OSError):
            before(failed)

    before, threading.excepthook = threading.excepthook, report
    others = set(threading.enumerate())
    try:
        make_folder(log_dir)
        with SummaryWriter(log_dir) as writer:
            yield writer
    except OSError as error:
        for thread in set(threading.enumerate()) - others:
            thread.join(timeout=1)  # it may still be on its way to its traceback
        where = error.filename or log_dir
        raise UserError(
            f"{where}: cannot write ({error.strerror or error}); check the folder and the free"
            " space"
        ) from None
    finally:
        threading.excepthook = before


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
        self, config: Config, model_class: type[System], resume: str | None = None
    ) -> None:
        self.config, self.runtime = config, choose_runtime(config)
        state = load_checkpoint(resume) if resume else None
        if state is not None and "training" not in state:
            raise UserError(
                f"{resume}: holds weights only; resume from a checkpoint_epoch_N.pth, or start with"
                f" --set init_from={resume}"
            )
        if state is not None:
            check_weights(state, str(resume), model_class, config)
        self.store, self.training, self.held_out, self.validation = training_data(config)
        random.seed(config.seed)
        torch.manual_seed(config.seed)
        model = model_class(config)
        if config.init_from and not resume:
            load_weights(model, load_checkpoint(config.init_from), config.init_from)
        self.model = self.runtime.place(model)
        self.ema = averaged_model(self.model, config.ema_decay)
        self.averaged = cast(System, self.ema.module)
        self.optimizer = self.model.make_optimizer()
        self.scaler = torch.amp.GradScaler(
            self.runtime.device.type, enabled=self.runtime.dtype == torch.float16
        )
        self.step, self.minutes, self.best = 0, 0.0, -math.inf
        self.kept: list[str] = []  # checkpoint_epoch_N.pth, the newest last
        self.run_id = from_first(datetime.now().strftime("%Y%m%d_%H%M%S_") + os.urandom(3).hex())
        if state is not None:
            self._restore(state, str(resume))
        self.steps_per_epoch = math.ceil(len(self.training) / config.batch_size)
        self.total_steps = self.steps_per_epoch * config.num_epochs
        self.folder = Path(config.checkpoint_dir)
        self.writer: Any = None  # TensorBoard's, in the first process
        self.parallel: nn.Module = LossModule(self.model)
        if processes() > 1:
            # a term of weight 0, or training in stages, leaves parameters without gradient
            self.parallel = nn.parallel.DistributedDataParallel(
                self.parallel, find_unused_parameters=True
            )
        if config.compile:
            self.parallel = compiled(self.parallel, self.runtime.device)

    # state ----------------------------------------------------------------------------------------

    def _restore(self, state: dict[str, Any], path: str) -> None:
        load_weights(self.averaged, state, path)
        try:
            training = state["training"]
            self.model.load_state_dict(training["model"])
            self.ema.n_averaged.copy_(training["averaged"])
            # they follow from the config and the step
            own = {"param_groups": self.optimizer.state_dict()["param_groups"]}
            self.optimizer.load_state_dict(training["optimizer"] | own)
            self.scaler.load_state_dict(training["scaler"])
            self.step, self.minutes = int(training["step"]), float(training["minutes"])
            self.best, self.kept, self.run_id = (
                float(training["best"]),
                list(training["kept"]),
                str(state["run_id"]),
            )
            moments = [
                (p, v)
                for p, values in self.optimizer.state.items()
                for v in values.values()
                if isinstance(v, Tensor)
            ]
            fits = all(
                v.shape in (p.shape, torch.Size()) and bool(v.isfinite().all()) for p, v in moments
            )
            # another may keep what it likes
            if not fits and isinstance(self.optimizer, (torch.optim.Adam, torch.optim.AdamW)):
                raise ValueError
            if self.step < 0 or not 0 <= self.minutes < math.inf or math.isnan(self.best):
                raise ValueError
            run = self.run_id  # it becomes a folder
            if not run or not is_text(run) or Path(run).name != run or run.startswith("."):
                raise ValueError
            if not all(
                isinstance(name, str) and re.fullmatch(r"checkpoint_epoch_\d+\.pth", name)
                for name in self.kept
            ):
                raise ValueError  # they are removed one day
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise UserError(
                f"{path}: its training state is damaged ({type(error).__name__}); resume from"
                " another"
            ) from None

    def _deployable(self) -> dict[str, Any]:
        """What enhancement needs: averaged weights, the config, where they come from, and how to
        know the training pictures."""
        return {
            "run_id": self.run_id,
            "system": system_of(type(self.averaged)),
            "config": dataclasses.asdict(self.config),
            "model": self.averaged.state_dict(),
            "epoch": self.step // self.steps_per_epoch,
            "training_thumbnails": torch.from_numpy(self.store.thumbnails),
        }

    def save(self, name: str) -> Path:
        """A checkpoint to resume from, under checkpoint_dir."""
        path = self.folder / name
        if rank():
            return path
        set_aside(path, self.run_id, tqdm.write)
        training = {
            "model": self.model.state_dict(),
            "averaged": self.ema.n_averaged,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "minutes": self.minutes,
            "best": self.best,
            "kept": self.kept,
        }
        save_checkpoint(path, {**self._deployable(), "training": training})
        return path

    def save_epoch(self, epoch: int) -> None:
        """checkpoint_epoch_N.pth, of which the newest keep_checkpoints stay."""
        name = f"checkpoint_epoch_{epoch}.pth"
        old = [other for other in self.kept if other != name]
        cut = max(0, len(old) + 1 - self.config.keep_checkpoints)
        self.kept = [*old[cut:], name]
        self.save(name)
        for other in old[:cut] if rank() == 0 else []:
            if written_by(self.folder / other, self.run_id):
                (self.folder / other).unlink()

    def _claim_folder(self) -> None:
        """Note whose folder this is, for restarts by torchrun; remove what a killed process of this
        run left over.

        The note is also a trial: a folder that cannot be written to is told before the first step,
        not after an epoch.
        """
        write_bytes(self.folder / RUN_FILE, self.run_id.encode())
        # see `atomic_path`
        for path in [
            *self.folder.glob(".checkpoint_*.*.pth"),
            *self.folder.glob(".best_model.*.pth"),
        ]:
            if time.time() - path.stat().st_mtime > 60:
                path.unlink()
        for path in self.folder.glob("checkpoint_epoch_*.pth"):
            number = path.stem.removeprefix("checkpoint_epoch_")
            past = number.isdecimal() and int(number) <= self.step // self.steps_per_epoch
            if past and path.name not in self.kept and written_by(path, self.run_id):
                path.unlink()

    # the loop -------------------------------------------------------------------------------------

    def fit(self) -> int:
        """Train to the end, to max_minutes or to Ctrl-C; returns the exit status."""
        config, log_dir = self.config, Path(self.config.log_dir) / self.run_id
        self._announce(log_dir)
        if rank() == 0:
            make_folder(self.folder)
            self._claim_folder()
        first = self.step // self.steps_per_epoch
        bar = tqdm(
            total=self.total_steps,
            initial=self.step,
            desc="training",
            unit="step",
            **progress_style(),
        )
        with (
            polite_signals() as interrupted,
            bar,
            curves(log_dir) if rank() == 0 else nullcontext() as self.writer,
        ):
            for epoch in range(first, config.num_epochs):
                stop = self._train_epoch(epoch, bar, interrupted)
                whole = self.step == (epoch + 1) * self.steps_per_epoch
                last = epoch + 1 == config.num_epochs or self._out_of_time()
                # a signal at an epoch's last step costs it neither validation nor checkpoint
                if whole or not stop:
                    if last or (epoch + 1) % config.val_freq == 0:
                        self._validate(epoch + 1)
                    if last or (epoch + 1) % config.save_freq == 0:
                        self.save_epoch(epoch + 1)
                    if last:
                        break
                if any(from_all(bool(interrupted))):
                    path = self.save("checkpoint_interrupted.pth")
                    tqdm.write(
                        f"stopped at step {self.step}; go on with --mode train --resume {path}"
                    )
                    return 130
            self._conclude()
        print(
            f"best weights: {self.folder / 'best_model.pth'} (validation PSNR {self.best:.2f} dB)"
        )
        if self.kept:
            print(f"newest checkpoint: {self.folder / self.kept[-1]}")
        print(f"curves: tensorboard --logdir {config.log_dir}")
        return 0

    def _out_of_time(self) -> bool:
        return 0 < self.config.max_minutes <= self.minutes

    def _progress(self) -> float:
        """Share of the run that is done; max_minutes shortens the schedule, so that it too ends at
        a low learning rate."""
        by_time = self.minutes / self.config.max_minutes if self.config.max_minutes else 0.0
        return max(self.step / self.total_steps, by_time)

    def _loader(self, batches: Sequence[list[Draw]]) -> DataLoader:
        config = self.config
        samples = TrainingSamples(self.store, self.training, config)
        return DataLoader(
            samples,
            batch_sampler=batches,
            num_workers=config.num_workers,
            pin_memory=config.pin_memory and self.runtime.device.type == "cuda",
            worker_init_fn=ignore_interrupts,
        )

    def _train_epoch(self, epoch: int, bar: tqdm, interrupted: list[int]) -> bool:
        """The steps of an epoch that are still to do; returns early, and True, on a signal to any
        process."""
        self.model.train()
        config = self.config
        bar.set_description(f"epoch {epoch + 1}/{config.num_epochs}")
        batches = batch_plan(len(self.training), config, epoch)[self.step % self.steps_per_epoch :]
        plans = [divide(batch, rank(), processes(), config.accumulate) for batch in batches]
        parts = iter(self._loader([part for plan in plans for part, _ in plan]))
        started = time.monotonic()
        for batch, plan in zip(batches, plans, strict=True):
            terms, norm, rate = self._train_step([(next(parts), weight) for _, weight in plan])
            seconds, started = time.monotonic() - started + 1e-9, time.monotonic()
            # the first process's clock and anybody's signal count for all
            clock = torch.tensor(
                [seconds if rank() == 0 else 0.0, float(bool(interrupted))],
                device=self.runtime.device,
            )
            seconds, stop = sum_over_processes(clock).tolist()
            self.minutes += seconds / 60
            if self.step % 20 == 0 or self.step % self.steps_per_epoch == 0:
                scalars = {f"loss/{name}": value for name, value in terms.items()}
                scalars |= {
                    "loss/total": sum(terms.values()),
                    "train/learning_rate": rate,
                    "train/gradient_norm": norm,
                }
                self._scalars(scalars | {"train/images_per_second": len(batch) / seconds})
            shown = {name: f"{value:.3f}" for name, value in terms.items()}
            if math.isfinite(self.best):
                shown["best_psnr"] = f"{self.best:.2f}"
            bar.set_postfix(shown, refresh=False)
            bar.update()
            if stop or self._out_of_time():
                return bool(stop)
        return False

    def _train_step(
        self, parts: Sequence[tuple[Sample, float]]
    ) -> tuple[dict[str, float], float, float]:
        """One update; returns the loss terms, the gradient's norm before clipping and the learning
        rate.

        `parts` are this process's share of the batch, each with its weight; all processes' weights
        sum to 1.
        """
        progress = self._progress()
        self.model.begin_step(progress)
        rate = self.model.learning_rate_at(progress, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        self.optimizer.zero_grad(set_to_none=True)
        values: dict[str, Any] = {}
        for place, (batch, weight) in enumerate(parts, 1):
            # dropout and noise repeat: on resume, in every part
            torch.manual_seed(self.config.seed * 1_000_003 + self.step)
            # gradients are exchanged once, after the last part
            alone = processes() == 1 or place == len(parts)
            with nullcontext() if alone else cast(Any, self.parallel).no_sync():
                with self.runtime.autocast():
                    terms = self.parallel(self.runtime.batch(batch))
                # DistributedDataParallel takes the mean over the processes, the weights ask for the
                # sum
                self.scaler.scale(sum(terms.values()) * (weight * processes())).backward()
            for name, term in terms.items():
                values[name] = values.get(name, 0.0) + weight * term.detach()
        sums = sum_over_processes(torch.stack(list(values.values())))
        terms = dict(zip(values, sums.tolist(), strict=True))
        self.scaler.unscale_(self.optimizer)
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), self.config.gradient_clip))
        self._check_finite(terms, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.ema.update_parameters(self.model)
        self.step += 1
        return terms, norm, rate

    def _check_finite(self, terms: dict[str, float], norm: float) -> None:
        bad = [name for name, value in terms.items() if not math.isfinite(value)]
        if not bad and not math.isfinite(norm) and not self.scaler.is_enabled():
            bad = ["gradient"]
        if bad:
            raise RunError(f"step {self.step}: the term {bad[0]} is not finite; {self._way_back()}")

    def _way_back(self) -> str:
        good = (
            f"the last good checkpoint is {self.folder / self.kept[-1]}"
            if self.kept
            else "no checkpoint was written yet"
        )
        return f"{good}; try a lower learning_rate"

    # reports --------------------------------------------------------------------------------------

    def _announce(self, log_dir: Path) -> None:
        config = self.config
        parameters = sum(p.numel() for p in self.model.parameters())
        geometry = (
            f"{config.crop_size} px crops"
            if config.crop_size
            else f"pictures resized to {config.image_size}"
        )
        print(
            f"{len(self.training)} training and {len(self.validation)} validation pairs,"
            f" {geometry}, batch {config.batch_size}"
        )
        print(f"{parameters / 1e6:.2f} M parameters on {self.runtime}; seed {config.seed}")
        print(f"steps {self.step} to {self.total_steps} in {config.num_epochs} epochs")
        print(f"weights to {self.folder}, curves to {log_dir}")

    def _scalars(self, scalars: dict[str, float]) -> None:
        for name, value in scalars.items() if self.writer else ():
            self.writer.add_scalar(name, value, self.step)

    @torch.no_grad()
    def _validate(self, epoch: int) -> None:
        """Score the averaged weights on the validation pairs; the best PSNR so far is saved as
        best_model.pth."""
        model = self.averaged.eval()
        scores, shown, latents = [], list[Tensor](), list[Tensor]()
        for index in my_share(self.validation):
            torch.manual_seed(self.config.seed + index)  # the same dequantisation noise every time
            low, high = (
                to_tensor(pixels)[None].to(self.runtime.device) for pixels in self.held_out[index]
            )
            if not self.config.crop_size:
                low, high = (
                    resize(image, self.config.image_size, quantise=True) for image in (low, high)
                )
            with self.runtime.autocast():
                enhanced = model.enhance(low)
                likelihood = model.likelihood(high, low)
            if not bool(enhanced.isfinite().all()):
                raise RunError(
                    f"step {self.step}: an enhanced picture is not finite; {self._way_back()}"
                )
            pixels = [
                image[0].permute(1, 2, 0).double().cpu().numpy() for image in (enhanced, high)
            ]
            bits = float(likelihood[0]) if likelihood else math.nan
            scores.append(
                {"psnr": psnr_of(*pixels), "ssim": ssim_of(*pixels), "bits_per_dim": bits}
            )
            if len(shown) < 4:
                extra = model.pictures(low).values()
                shown.append(
                    torch.cat(
                        [low[0], enhanced[0], high[0], *(picture[0] for picture in extra)], dim=-1
                    ).cpu()
                )
                latents += [likelihood[1].flatten().cpu()] if likelihood else []
        scores = [score for share in from_all(scores) for score in share]
        means = {name: float(np.mean([score[name] for score in scores])) for name in scores[0]}
        means = {name: value for name, value in means.items() if not math.isnan(value)}
        self._scalars({f"validation/{name}": value for name, value in means.items()})
        for place, image in enumerate(shown if self.writer else ()):
            self.writer.add_image(
                f"validation/low_enhanced_high_{place}", image.clamp(0, 1), self.step
            )
        if latents and self.writer:
            self.writer.add_histogram(
                "validation/standardised_latent", torch.cat(latents), self.step
            )
        better = means["psnr"] > self.best
        self.best = max(self.best, means["psnr"])
        if better and rank() == 0:
            set_aside(self.folder / "best_model.pth", self.run_id, tqdm.write)
            save_checkpoint(
                self.folder / "best_model.pth", {**self._deployable(), "validation": means}
            )
        words = "  ".join(f"{name} {value:.4g}" for name, value in means.items())
        tqdm.write(f"epoch {epoch} ({self.minutes:.1f} min): {words}{'  best' if better else ''}")

    def _conclude(self) -> None:
        plain = {
            k: v if isinstance(v, (int, float, str, bool)) else str(v)
            for k, v in dataclasses.asdict(self.config).items()
        }
        if self.writer:
            self.writer.add_hparams(
                plain,
                {"hparam/best_validation_psnr": self.best, "hparam/minutes": self.minutes},
                run_name=".",
            )


def resume_from(given: str | None) -> str | None:
    """The checkpoint that --resume names, the newest where it is a folder. Raises UserError for a
    folder without one."""
    if not given or not os.path.isdir(given):
        return given
    newest = newest_checkpoint(Path(given))
    if newest is None:
        raise UserError(f"--resume {given}: no checkpoint_epoch_N.pth in this folder; name another")
    return newest


def after_restart(folder: Path) -> str | None:
    """The newest checkpoint in `folder` of the run that torchrun starts again; None where this is
    no restart.

    Each host counts its own failures alone, so any process that was restarted speaks for all. A
    first start forgets whoever trained here before.
    """
    again = any(from_all(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"))
    newest = None
    if rank() == 0:
        with suppress(OSError):
            if again:
                newest = newest_checkpoint(folder, (folder / RUN_FILE).read_text(encoding="utf-8"))
            else:
                (folder / RUN_FILE).unlink()
    return from_first(newest)


def train(
    arguments: argparse.Namespace, model_class: type[System], config_class: type[Config]
) -> int:
    """--mode train."""

    def config_of(resume: str | None) -> Config:
        if resume:
            return checkpoint_config(
                load_checkpoint(resume), resume, arguments.settings, config_class
            )
        return apply_settings(config_class(), arguments.settings, "config")

    resume = from_first(resume_from(arguments.resume))
    config = config_of(resume)
    if dist.is_torchelastic_launched() and (own := after_restart(Path(config.checkpoint_dir))):
        resume, config = own, config_of(own)
    return Trainer(config, model_class, resume).fit()


# --------------------------------------------------------------------------------------------------
# Evaluation
# --------------------------------------------------------------------------------------------------


def load_model(
    path: str, settings: dict[str, Any], model_class: type[System], config_class: type[Config]
) -> Any:
    """(model, its config under `settings`, runtime, checkpoint content) for evaluation and
    enhancement."""
    checkpoint = load_checkpoint(path)
    check_system(checkpoint, path, model_class)
    default = config_class()
    here = {name: getattr(default, name) for name in USE_KEYS}
    config = checkpoint_config(checkpoint, path, here | settings, config_class)
    runtime = choose_runtime(config)
    check_weights(checkpoint, path, model_class, config)
    model = model_class(config)
    load_weights(model, checkpoint, path)
    return runtime.place(model).eval(), config, runtime, checkpoint


def evaluation_size(config: Config) -> tuple[int, int] | None:
    """(height, width) that pictures are scored at; None for their own size."""
    if config.eval_size == "auto" and not config.crop_size:
        return config.image_size[0], config.image_size[1]
    return parse_eval_size(config.eval_size)


class Scored(NamedTuple):
    """One evaluated pair: pictures (3, H, W) in [0, 1] on the CPU and its row of metrics.csv."""

    low: Tensor
    enhanced: Tensor
    high: Tensor
    row: dict[str, Any]
    extra: dict[str, Tensor]


def refuse_not_finite(*pictures: Tensor) -> None:
    """Raises UserError where weights are so large that what they give is no number."""
    if not all(bool(picture.isfinite().all()) for picture in pictures):
        raise UserError(
            "--checkpoint: its weights give no finite picture; go back to an earlier one"
        )


@torch.no_grad()
def score_pairs(
    model: System, store: PairStore, config: Config, runtime: Runtime, twins: Sequence[bool | None]
) -> Iterator[Scored]:
    """Enhance and score this process's share of the pairs of `store`, in order; by one process,
    all."""
    size, lpips_of = evaluation_size(config), load_lpips()
    indices = my_share(range(len(store)))
    for index in tqdm(indices, desc="evaluating", unit="image", **progress_style()):
        pair = store.pairs[index]
        low, high = (to_tensor(pixels)[None].to(runtime.device) for pixels in store[index])
        if size:
            low, high = (resize(image, size, quantise=True) for image in (low, high))
        torch.manual_seed(config.seed + index)
        started = time.perf_counter()
        with runtime.autocast():
            enhanced = model.enhance(low, config.temperature)
        enhanced = enhanced.float().cpu()
        refuse_not_finite(enhanced)
        seconds = time.perf_counter() - started
        ours, target = (
            image[0].permute(1, 2, 0).double().cpu().numpy() for image in (enhanced, high)
        )
        row: dict[str, Any] = {"filename": pair.low.name, **image_metrics(ours, target)}
        with runtime.autocast():
            likelihood = model.likelihood(high, low)
        row |= {"bits_per_dim": float(likelihood[0])} if likelihood else {}
        if lpips_of:
            row |= {
                "lpips": lpips_of(ours, target),
                "lpips_gt_mean": lpips_of(match_mean(ours, target), target),
            }
        row |= {"twin_in_training": twins[index], "seconds": seconds}
        extra = model.pictures(low)
        yield Scored(
            low[0].cpu(),
            enhanced[0],
            high[0].cpu(),
            row,
            {name: image[0].cpu() for name, image in extra.items()},
        )


def training_twins(store: PairStore, checkpoint: dict[str, Any]) -> list[bool | None]:
    """For each pair whether its ground truth is among the checkpoint's training pictures; None
    where that is not known."""
    past = checkpoint.get("training_thumbnails")
    if (
        not isinstance(past, Tensor)
        or past.dtype != torch.uint8
        or past.shape[1:] != (16, 16, 3)
        or not past.is_contiguous()
    ):
        print("twins: the checkpoint does not say what it was trained on; no pair is flagged")
        return [None] * len(store)
    return [bool(twin) for twin in find_twins(store.thumbnails, past.numpy())]


def overview(rows: Sequence[dict[str, Any]], images: Path) -> Image.Image:
    """The triptychs in `images` of the two worst, median and best pictures."""
    order = np.argsort([row["psnr"] for row in rows])
    middle = len(order) // 2
    chosen = dict.fromkeys([*order[:2], *order[max(0, middle - 1) : middle + 1], *order[-2:]])
    return contact_sheet(
        [Image.open(images / f"{Path(rows[i]['filename']).stem}_viz.png") for i in chosen]
    )


def evaluate(
    arguments: argparse.Namespace, model_class: type[System], config_class: type[Config]
) -> int:
    """--mode evaluate."""
    model, config, runtime, checkpoint = load_model(
        arguments.checkpoint, arguments.settings, model_class, config_class
    )
    store = PairStore(evaluation_pairs(config), config)
    twins = training_twins(store, checkpoint)
    folder = from_first(results_folder(config.results_dir, "eval"))
    size = evaluation_size(config)
    protocol = f"resized to {size[1]}x{size[0]}" if size else "native resolution"
    print(f"evaluating {len(store)} pairs, {protocol}, on {runtime}")
    with atomic_folder(folder) as temporary:
        mine = []
        for scored in score_pairs(model, store, config, runtime, twins):
            name = Path(scored.row["filename"]).stem
            for suffix, picture in {
                "": scored.enhanced,
                **{f"_{key}": value for key, value in scored.extra.items()},
            }.items():
                write_image(temporary / "images" / f"{name}{suffix}.png", picture)
            scores = (
                f"{scored.row['psnr']:.2f} dB  SSIM {scored.row['ssim']:.3f}  dE"
                f" {scored.row['ciede2000']:.1f}"
            )
            strip = triptych(scored[:3], (f"input {name}", "enhanced", "target"), scores)
            write_image(temporary / "images" / f"{name}_viz.png", strip)
            mine.append(scored.row)
        by_name = {row["filename"]: row for rows in from_all(mine) for row in rows}
        rows = [by_name[pair.low.name] for pair in store.pairs]
        if rank() == 0:
            write_image(temporary / "overview.png", overview(rows, temporary / "images"))
            write_csv(temporary / "metrics.csv", rows)
            summary = evaluation_summary(rows, config, arguments.checkpoint, protocol, runtime)
            write_json(temporary / "summary.json", summary)
    if rank():
        return 0
    write_json(
        Path(config.results_dir) / "evaluation_results.json",
        {
            "psnr": summary["psnr"],
            "ssim": summary["ssim"],
            "checkpoint": arguments.checkpoint,
            "num_test_samples": len(rows),
            "results_dir": str(folder),
        },
    )
    print_summary(summary)
    print(
        f"{folder}: metrics.csv, summary.json, images/, overview.png (worst, median and best"
        " pictures)"
    )
    return 0


def evaluation_summary(
    rows: list[dict[str, Any]], config: Config, checkpoint: str, protocol: str, runtime: Runtime
) -> dict[str, Any]:
    """The content of summary.json."""
    metrics = summarise(rows)
    alone = [row for row in rows if row["twin_in_training"] is False]
    return {
        "num_images": len(rows),
        "psnr": metrics["psnr"]["mean"],
        "ssim": metrics["ssim"]["mean"],
        "metrics": metrics,
        "without_twins": {"num_images": len(alone), "metrics": summarise(alone)} if alone else None,
        "protocol": protocol,
        "seconds_per_image": metrics["seconds"]["median"],
        "checkpoint": checkpoint,
        "checkpoint_sha256": hashlib.sha256(Path(checkpoint).read_bytes()).hexdigest(),
        "data": {"eval_low_dir": config.eval_low_dir, "eval_high_dir": config.eval_high_dir},
        "device": str(runtime),
        "versions": (
            {"python": sys.version.split()[0]}
            | {m.__name__: m.__version__ for m in (torch, np, skimage)}
        ),
        "config": dataclasses.asdict(config),
    }


def print_summary(summary: dict[str, Any]) -> None:
    """Means on all pairs and on those whose ground truth was not trained on."""
    parts = [("all", summary["num_images"], summary["metrics"])]
    if summary["without_twins"]:
        parts.append(
            (
                "no twin in training",
                summary["without_twins"]["num_images"],
                summary["without_twins"]["metrics"],
            )
        )
    for label, count, metrics in parts:
        means = "  ".join(f"{name} {value['mean']:.4g}" for name, value in metrics.items())
        print(f"{label} ({count}): {means}")


# --------------------------------------------------------------------------------------------------
# Enhancement
# --------------------------------------------------------------------------------------------------


def tile_side(model: ConditionalFlow, config: Config) -> int:
    """The largest tile whose work, halo included, fits in memory_megabytes; `tile_size` where the
    config names one."""
    if config.tile_size:
        return config.tile_size
    # measured: 390 to 620 of 630 at 96 channels, bf16 and fp32
    bytes_per_pixel = 150 + 5 * config.flow_channels
    return max(
        64,
        (math.isqrt(config.memory_megabytes * 2**20 // bytes_per_pixel) - 2 * model.reach) // 8 * 8,
    )


def whole_thumbnail(pixels: np.ndarray, size: int) -> Tensor:
    """`resize` of an (H, W, 3) picture to (1, 3, size, size), in bands: no float copy of a large
    picture is made."""
    bands = [to_tensor(pixels[top : top + 256])[None] for top in range(0, len(pixels), 256)]
    narrow = torch.cat([resize(band, (band.shape[-2], size)) for band in bands], dim=-2)
    return resize(narrow, (size, size))


class Enhanced(NamedTuple):
    """(H, W, 3) uint16 pictures, and the deviation over samples (H, W) in [0, 1], the root of its
    mean square over channels."""

    best: np.ndarray
    samples: list[np.ndarray]
    deviation: np.ndarray | None


@torch.no_grad()
def enhance_pixels(
    model: System,
    pixels: np.ndarray,
    config: Config,
    runtime: Runtime,
    survey: Survey | None = None,
) -> Enhanced:
    """Enhance (H, W, 3) uint8 or uint16 pixels of any size, in tiles where they are many, and draw
    what the config asks for.

    Tiles overlap by the model's reach and share one survey of the whole picture, so that no seam
    can show. Another system sees the picture whole. `survey` replaces the picture's own.
    """
    height, width = pixels.shape[:2]
    wanted = config.samples if config.samples > 1 or not config.uncertainty else 16
    temperature = config.temperature or (1.0 if wanted else 0.0)
    # no memory until used
    best, deviation = np.empty((height, width, 3), np.uint16), np.empty((height, width), np.float32)
    samples = [np.empty_like(best) for _ in range(config.samples)]
    halo, side = 0, max(height, width)
    if isinstance(model, ConditionalFlow):
        halo, side = model.reach, tile_side(model, config)
        if survey is None:
            with runtime.autocast():
                survey = model.survey(
                    whole_thumbnail(pixels, config.thumbnail_size).to(runtime.device)
                )
    for core, outer in plan_tiles(height, width, side, halo):
        low = to_tensor(pixels[outer[0] : outer[1], outer[2] : outer[3]])[None].to(runtime.device)
        here = (slice(*core[:2]), slice(*core[2:]))
        inside = (
            0,
            slice(None),
            slice(core[0] - outer[0], core[1] - outer[0]),
            slice(core[2] - outer[2], core[3] - outer[2]),
        )
        with runtime.autocast():
            if isinstance(model, ConditionalFlow) and survey is not None:
                draw = tile_decoder(model, low, survey, outer, (height, width), config.seed)
            else:
                draw = whole_decoder(model, low, config.seed)
            answer = draw(0, 0.0 if wanted else temperature)[inside]
            drawn = [draw(number + 1, temperature)[inside] for number in range(wanted)]
        refuse_not_finite(answer, *drawn)
        best[here] = to_uint16(answer)
        for sample, picture in zip(samples, drawn, strict=False):
            sample[here] = to_uint16(picture)
        if config.uncertainty:
            deviation[here] = torch.stack(drawn).float().var(0).mean(0).sqrt().cpu().numpy()
    return Enhanced(best, samples, deviation if config.uncertainty else None)


def tile_decoder(
    model: ConditionalFlow,
    low: Tensor,
    survey: Survey,
    outer: Sequence[int],
    size: Sequence[int],
    seed: int,
) -> Callable[[int, float], Tensor]:
    """A function of sample number and temperature that gives the enhanced tile (1, 3, h, w); it
    looks at `low` only once."""
    (top, bottom, left, right), (height, width) = outer, size
    box = torch.tensor(
        [[left / width, top / height, right / width, bottom / height]], device=low.device
    )
    condition = model.condition(
        pad_to_multiple(low), survey, padded_box(box, bottom - top, right - left)
    )

    def draw(number: int, temperature: float) -> Tensor:
        latent = condition.prior_mean
        if temperature:
            noise = latent_noise((seed, number), top // 4, left // 4, *latent.shape[-2:]).to(
                latent.device
            )
            latent = latent + temperature * model.log_sigma.exp() * noise
        return model.decode(latent, condition)[..., : bottom - top, : right - left]

    return draw


def whole_decoder(model: System, low: Tensor, seed: int) -> Callable[[int, float], Tensor]:
    """The same for a model that knows no tiles."""

    def draw(number: int, temperature: float) -> Tensor:
        torch.manual_seed(seed + number)
        return model.enhance(low, temperature)

    return draw


def enhance_file(
    source: Path,
    target: Path,
    model: System,
    config: Config,
    runtime: Runtime,
    brightness: float | None,
) -> dict[str, Any]:
    """Enhance one picture and write what the config asks for; returns its row of enhance.csv.
    Raises UserError.

    `brightness` is the mean that the result takes, None to leave it. The picture itself is written
    last: where it is, all is.
    """
    started = time.perf_counter()
    picture = read_picture(source)
    enhanced = enhance_pixels(model, picture.pixels, config, runtime)
    deep = picture.pixels.dtype == np.uint16 and target.suffix.lower() in (".png", ".tif", ".tiff")
    stops = config.exposure + (
        stops_to_mean(enhanced.best, brightness) if brightness is not None else 0.0
    )
    table = level_table(stops, deep)

    def encode(pixels: np.ndarray) -> bytes:
        # EXIF that the format cannot take must not cost the picture
        for like in (picture, picture._replace(exif=b"")):
            try:
                return encode_picture(pixels, target.suffix.lower(), like, config.quality)
            except (OSError, ValueError, TypeError, RuntimeError, struct.error) as error:
                problem = str(error) or type(error).__name__
        raise UserError(
            f"{target}: the format cannot hold this picture ({problem}); choose another suffix"
        )

    for number, sample in enumerate(enhanced.samples, 1):
        write_bytes(target.with_stem(f"{target.stem}_sample{number}"), encode(table[sample]))
    row = {
        "file": str(source),
        "output": str(target),
        "width": picture.pixels.shape[1],
        "height": picture.pixels.shape[0],
    }
    if enhanced.deviation is not None:
        map16 = np.rint(np.clip(enhanced.deviation, 0, 1) * 65535).astype(np.uint16)
        write_bytes(
            target.with_name(f"{target.stem}_uncertainty.png"), encode_png16(map16, Picture(map16))
        )
        write_image(
            target.with_name(f"{target.stem}_uncertainty_view.png"),
            Image.fromarray(heat_map(enhanced.deviation)),
        )
    after = table[enhanced.best]
    write_bytes(target, encode(after))
    row |= {
        "seconds": round(time.perf_counter() - started, 3),
        "brightness_before": round(
            float(picture.pixels.mean()) / np.iinfo(picture.pixels.dtype).max, 5
        ),
        "brightness_after": round(float(after.mean()) / np.iinfo(after.dtype).max, 5),
        "deviation": (
            "" if enhanced.deviation is None else round(float(enhanced.deviation.mean()), 5)
        ),
        "note": picture.note,
    }
    return row


def smooth_survey(old: Survey | None, now: Survey, rate: float) -> Survey:
    """A running mean of surveys, so that a clip does not flicker; a cut to another scene starts it
    afresh."""
    if old is None or abs(float((now.brightness / old.brightness).log2().mean())) > 0.5:
        return now
    return Survey(
        *(torch.lerp(before, after, rate) for before, after in zip(old, now, strict=True))
    )


def enhance_video(
    source: Path,
    target: Path,
    model: System,
    config: Config,
    runtime: Runtime,
    brightness: float | None,
) -> dict[str, Any]:
    """Enhance every frame of a clip, with its sound; returns its row of enhance.csv. Raises
    UserError.

    The global branch's view is averaged over half a second: brightness and white balance follow the
    scene, not the noise. The result is H.264; an odd side loses a row or column.
    """
    try:
        import av
    except ImportError:
        raise UserError(
            f"{source}: clips need the optional package av; run pip install av"
        ) from None
    if not isinstance(model, ConditionalFlow):
        raise UserError(
            f"{source}: this model has no survey to smooth over time; give it single pictures"
        )
    started, frames, before, after = time.perf_counter(), 0, 0.0, 0.0
    survey, stops = None, config.exposure
    try:
        with (
            atomic_path(target) as temporary,
            av.open(str(source)) as reading,
            av.open(str(temporary), "w") as writing,
        ):
            if not reading.streams.video:
                raise UserError(f"{source}: holds no moving picture")
            pictures, sounds = reading.streams.video[0], reading.streams.audio[:1]
            rate = pictures.average_rate or 25
            encoder = None
            copies = [writing.add_stream_from_template(sound) for sound in sounds]
            for packet in reading.demux(pictures, *sounds):
                if packet.stream is not pictures:
                    if packet.dts is not None:
                        packet.stream = copies[0]
                        writing.mux(packet)
                    continue
                for frame in packet.decode():
                    if not isinstance(frame, av.VideoFrame):
                        continue
                    pixels = np.ascontiguousarray(
                        np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
                    )
                    pixels = pixels[: pixels.shape[0] // 2 * 2, : pixels.shape[1] // 2 * 2]
                    if min(pixels.shape[:2]) < 16:
                        raise UserError(
                            f"{source}: {frame.width}x{frame.height} is too small; the least side"
                            " is 16"
                        )
                    with torch.no_grad(), runtime.autocast():
                        now = model.survey(
                            whole_thumbnail(pixels, config.thumbnail_size).to(runtime.device)
                        )
                    survey = smooth_survey(survey, now, 1 - math.exp(-2 / float(rate)))
                    enhanced = enhance_pixels(model, pixels, config, runtime, survey).best
                    if brightness is not None and not frames:
                        stops = config.exposure + stops_to_mean(enhanced, brightness)
                    levels = level_table(stops, deep=False)[enhanced]
                    if encoder is None:
                        encoder = writing.add_stream("libx264", rate=rate, options={"crf": "16"})
                        encoder.height, encoder.width, encoder.pix_fmt = (
                            *pixels.shape[:2],
                            "yuv420p",
                        )
                    out = av.VideoFrame.from_ndarray(levels, format="rgb24")
                    out.pts, out.time_base = frame.pts, frame.time_base
                    writing.mux(encoder.encode(out))
                    frames, before, after = (
                        frames + 1,
                        before + pixels.mean() / 255,
                        after + levels.mean() / 255,
                    )
            if encoder is None:
                raise UserError(f"{source}: holds no frame that can be read")
            writing.mux(encoder.encode())
    except av.FFmpegError as error:
        raise UserError(f"{source}: cannot read or write the clip ({error.strerror})") from None
    return {
        **{
            "file": str(source),
            "output": str(target),
            "width": pixels.shape[1],
            "height": pixels.shape[0],
        },
        **{"seconds": round(time.perf_counter() - started, 3)},
        **{
            "brightness_before": round(before / frames, 5),
            "brightness_after": round(after / frames, 5),
        },
        **{"deviation": "", "note": f"{frames} frames"},
    }


def enhance(
    arguments: argparse.Namespace, model_class: type[System], config_class: type[Config]
) -> int:
    """--mode enhance: a picture, a folder or a pattern, each at its own resolution."""
    given, target = arguments.input, Path(arguments.output)
    many = os.path.isdir(given) or (glob.has_magic(given) and not os.path.exists(given))
    jobs = find_inputs(given, arguments.output) if many else [(Path(given), target)]
    if not many:
        if target.is_dir() or arguments.output.endswith(("/", os.sep)):
            target = target / Path(given).name
            jobs = [(Path(given), target)]
        known = VIDEO_SUFFIXES if Path(given).suffix.lower() in VIDEO_SUFFIXES else SUFFIXES
        if target.suffix.lower() not in known:
            raise UserError(f"--output {target}: the suffix must be one of {', '.join(known)}")
        if target.exists() and os.path.exists(given) and target.samefile(given):
            raise UserError(f"--output {target}: is the input itself; choose another name")
    model, config, runtime, _ = load_model(
        arguments.checkpoint, arguments.settings, model_class, config_class
    )
    brightness = float(read_image(config.reference).mean()) / 255 if config.reference else None

    def work(source: Path, target: Path) -> dict[str, Any]:
        kind = enhance_video if source.suffix.lower() in VIDEO_SUFFIXES else enhance_file
        try:
            return kind(source, target, model, config, runtime, brightness)
        except (MemoryError, RuntimeError) as error:  # PyTorch's allocators raise the latter
            if isinstance(error, RuntimeError) and "memory" not in str(error):
                raise
            raise UserError(
                f"{source}: not enough memory; lower memory_megabytes or samples, or make it"
                " smaller"
            ) from None

    if many:
        return enhance_folder(jobs, target, work, config.overwrite)
    if rank():  # one picture is one process's work
        return 0
    row = work(*jobs[0])
    print(f"{target}: {row['width']}x{row['height']}, {row['seconds']:.2f} s on {runtime}")
    if row["note"]:
        print(f"{given}: {row['note']}")
    if row["deviation"] != "":
        print(f"mean deviation over samples: {row['deviation']:.4f} of full scale")
    return 0


# --------------------------------------------------------------------------------------------------
# Demo: photographs that ship with scikit-image, seen by a simulated infrared-leaking, under-exposed
# sensor
# --------------------------------------------------------------------------------------------------


def write_demo_pairs(folder: Path, config: Config) -> None:
    """Simulated pairs under folder/{train,eval}/{low,high}; training and evaluation show different
    photographs."""
    rng = np.random.default_rng(config.seed)
    for part, names, count in (("train", DEMO_TRAIN, 36), ("eval", DEMO_TEST, 6)):
        for name in names:
            for place, high in enumerate(
                demo_crops(name, count, config.image_size[0], part == "train", rng)
            ):
                write_image(folder / part / "high" / f"{name}_{place}.png", Image.fromarray(high))
                write_image(
                    folder / part / "low" / f"{name}_{place}.png",
                    Image.fromarray(simulate_infrared(high, rng)),
                )


def gamma_baseline(store: PairStore) -> float:
    """The one exponent in {0.1, 0.15, ..., 1} that brightens the training pictures best, by mean
    squared error."""
    pairs = [store[i] for i in range(len(store))]
    low, high = (np.stack([pair[k] for pair in pairs]) / 255.0 for k in (0, 1))
    return min(
        np.arange(0.1, 1.01, 0.05), key=lambda exponent: float(((low**exponent - high) ** 2).mean())
    )


def demo(
    arguments: argparse.Namespace, model_class: type[System], config_class: type[Config]
) -> int:
    """--mode demo: simulate, train a small model, evaluate it on other photographs, print the
    comparison."""
    settings = arguments.settings
    base = apply_settings(config_class(), settings, "config")
    folder = results_folder(base.results_dir, "demo")
    data = folder / "data"
    small = {
        **{
            f"{part}_{kind}_dir": str(data / part / kind)
            for part in ("train", "eval")
            for kind in ("low", "high")
        },
        **dict(
            val_low_dir="",
            val_high_dir="",
            image_size=[128, 128],
            crop_size=0,
            window_min=0.7,
            eval_size="auto",
        ),
        **dict(
            flow_channels=32,
            thumbnail_size=64,
            batch_size=4,
            learning_rate=2e-3,
            num_epochs=8,
            max_minutes=2.9,
        ),
        **dict(
            checkpoint_dir=f"{base.checkpoint_dir}/{folder.name}",
            results_dir=str(folder),
            keep_checkpoints=1,
            init_from="",
        ),
    }
    # what the demo fixes wins over the config file's recipe, and --set wins over both
    overrides = dict(parse_assignment(text, config_class) for text in arguments.set)
    config = apply_settings(
        base, small | {k: v for k, v in overrides.items() if k not in FOLDER_KEYS}, "demo"
    )
    write_demo_pairs(data, config)
    print(
        f"demo: simulated {len(DEMO_TRAIN)} photographs for training and {len(DEMO_TEST)} others"
        f" for evaluation in {data}"
    )
    status = Trainer(config, model_class).fit()
    if status:
        return status
    best = f"{config.checkpoint_dir}/best_model.pth"
    here = {"results_dir": str(folder), "device": config.device}
    evaluate(argparse.Namespace(checkpoint=best, settings=here), model_class, config_class)
    ours = json.loads((folder / "evaluation_results.json").read_text())
    return demo_table(config, folder, Path(ours["results_dir"]))


def demo_table(config: Config, folder: Path, evaluation: Path) -> int:
    """Input and gamma baseline beside ours: printed, and written to demo.csv."""
    training = PairStore(find_pairs(config.train_low_dir, config.train_high_dir, "train"), config)
    exponent = gamma_baseline(training)
    store = PairStore(find_pairs(config.eval_low_dir, config.eval_high_dir, "eval"), config)
    pairs = [[pixels / 255.0 for pixels in store[i]] for i in range(len(store))]
    scores = {
        "input": [image_metrics(low, high) for low, high in pairs],
        f"gamma {exponent:.2f}": [image_metrics(low**exponent, high) for low, high in pairs],
    }
    columns = ("psnr", "ssim", "ciede2000", "colourfulness_ratio")
    summary = json.loads((evaluation / "summary.json").read_text())
    rows: list[dict[str, Any]] = [
        {"method": name} | {c: float(np.mean([score[c] for score in values])) for c in columns}
        for name, values in scores.items()
    ]
    rows.append({"method": "ours"} | {c: summary["metrics"][c]["mean"] for c in columns})
    write_csv(folder / "demo.csv", rows)
    print(f"\n{'':12}" + "".join(f"{name:>20}" for name in columns))
    for row in rows:
        print(f"{row['method']:12}" + "".join(f"{row[name]:20.3f}" for name in columns))
    print(f"\npictures: {evaluation / 'overview.png'}")
    return 0


# --------------------------------------------------------------------------------------------------
# Export: the deterministic enhancement as one ONNX file for other languages and runtimes
# --------------------------------------------------------------------------------------------------


class FixedConv(nn.Module):
    """The inverse of an InvertibleConv with its matrix worked out, which ONNX has no operator
    for."""

    weight: Tensor

    def __init__(self, layer: InvertibleConv) -> None:
        super().__init__()
        self.register_buffer(
            "weight", torch.linalg.inv(layer.weight().double()).float()[:, :, None, None]
        )

    def inverse(self, y: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return F.conv2d(y, self.weight), y.new_zeros(len(y))


class Enhancer(nn.Module):
    """low (1, 3, H, W) in [0, 1] -> enhanced, the same shape; all that `enhance` does, thumbnail
    and padding included."""

    def __init__(self, model: System) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).float().cpu().eval()
        for layers in [
            module.layers for module in self.model.modules() if isinstance(module, Flow)
        ]:
            for place, layer in enumerate(layers):
                if isinstance(layer, InvertibleConv):
                    layers[place] = FixedConv(layer)

    def forward(self, low: Tensor) -> Tensor:
        return self.model.enhance(low)


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings: the exporter tells of its own deprecations and of guesses that it mends
    itself."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


EXPORT_SIZES = ((64, 96), (131, 201), (400, 600))
EXPORT_TOLERANCE = 1e-3


def export(
    arguments: argparse.Namespace, model_class: type[System], config_class: type[Config]
) -> int:
    """--mode export: an ONNX file with free height and width, compared with PyTorch at three sizes
    before it is written."""
    target = Path(arguments.output)
    if target.suffix.lower() != ".onnx":
        raise UserError(f"--output {target}: the suffix must be .onnx")
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--mode export needs the package {error.name}; run pip install onnx onnxruntime"
            " onnxscript"
        ) from None
    model, _, _, _ = load_model(
        arguments.checkpoint, arguments.settings | {"device": "cpu"}, model_class, config_class
    )
    enhancer = Enhancer(model)
    sides = {
        2: torch.export.Dim("height", min=16, max=65536),
        3: torch.export.Dim("width", min=16, max=65536),
    }
    with atomic_path(target) as temporary, torch.no_grad(), quiet():
        try:
            torch.onnx.export(
                enhancer,
                (torch.rand(1, 3, 120, 168),),
                temporary,
                input_names=["low"],
                output_names=["enhanced"],
                dynamic_shapes={"low": sides},
                opset_version=20,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError:
            name = system_of(model_class)
            raise UserError(
                f"--mode export: ONNX cannot express what {name} computes; use --mode enhance"
            ) from None
        session = onnxruntime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])
        generator = torch.Generator().manual_seed(0)
        for height, width in EXPORT_SIZES:
            low = torch.rand(1, 3, height, width, generator=generator) ** 3
            difference = float(
                np.abs(session.run(None, {"low": low.numpy()})[0] - enhancer(low).numpy()).max()
            )
            print(f"{height}x{width}: largest difference from PyTorch {difference:.1e}")
            if not difference < EXPORT_TOLERANCE:
                raise RunError(
                    f"{target}: ONNX and PyTorch differ by {difference:.3g}; not written, please"
                    " report it"
                )
    print(
        f"{target}: {target.stat().st_size / 2**20:.1f} MiB; low (1, 3, H, W) float32 in [0, 1] ->"
        " enhanced, sides from 16"
    )
    print("to run it:")
    print(f"  session = onnxruntime.InferenceSession({str(target)!r})")
    print('  enhanced = session.run(None, {"low": low})[0]')
    return 0


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------

MODES = {"train": train, "evaluate": evaluate, "enhance": enhance, "demo": demo, "export": export}


def main(
    argv: Sequence[str] | None = None,
    model_class: type[System] = ConditionalFlow,
    config_class: type[Config] = Config,
) -> int:
    """Run one mode; returns the exit status.

    Another model is a subclass of System, and brings a subclass of Config with its own keys; the
    file of that needs `from __future__ import annotations`, as its fields' types are read as text.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file's name need not be text
    try:
        arguments = parse_command_line(argv, config_class)
        sources = [
            text
            for text in (arguments.config, arguments.resume, arguments.checkpoint, arguments.input)
            if text
        ]
        with (
            sigterm_as_ctrl_c(),
            process_group(arguments.mode, arguments.settings.get("device", "auto")),
        ):
            print(f"{arguments.mode}: {', '.join(sources) or 'default settings'}", flush=True)
            return MODES[arguments.mode](arguments, model_class, config_class)
    except UserError as mistake:
        return complain(mistake)
    except OSError as error:  # what has no better message of its own
        where = error.filename or "the output"
        return complain(
            UserError(f"{where}: {error.strerror or error}; check the folder and the free space")
        )
    except RuntimeError as error:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            return complain(
                RunError(f"compile: {str(error).splitlines()[0]}; use --set compile=false")
            )
        if "gloo" not in str(error) and not isinstance(error, dist.DistError):
            raise
        return complain(RunError("another process of this job stopped; see its message"))
    # training catches its own; elsewhere nothing half-written is left behind
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
