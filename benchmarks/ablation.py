"""Short training runs of equal budget that differ in one thing each.

    python benchmarks/ablation.py [VARIANT ...] [--minutes 5] [--seed 0] [--set KEY=VALUE ...]

They are scored on the validation scenes. Evaluation pictures play no part. Every run starts from
nothing and is

    python model_script.py --mode train --config configs/november_stage3.json

with its schedule cut to --minutes, with SHORT (smaller crops and a higher rate, as the recipe's own
crops come after two other stages), and with the settings of its variant. The variants that need
another model get it here. Without names all variants run. Each adds a line to results/ablation.csv,
from which the table in benchmarks/ablation.md was made. Data: train_low_dir and train_high_dir of
the recipe.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import model_script as ms  # noqa: E402
from support.files import write_csv  # noqa: E402
from support.metrics import image_metrics  # noqa: E402
from support.pictures import to_tensor  # noqa: E402
from support.settings import read_config_file  # noqa: E402


class Untouched(ms.ConditionalFlow):
    """Gives back its input, which is not trained: what there is to win."""

    def enhance(self, low: Tensor, temperature: float = 0.0) -> Tensor:
        return low


class WithoutGlobal(ms.ConditionalFlow):
    """The local branch alone: of the whole picture it knows the mean brightness."""

    def survey(self, thumbnail: Tensor) -> ms.Survey:
        survey = super().survey(thumbnail)
        return survey._replace(grid=survey.grid * 0, colour=survey.colour * 0)


class WithoutFlow(ms.ConditionalFlow):
    """Direct regression by the two branches: the mean is the picture in logit space.

    No coupling touches it.
    """

    def decode(self, latent: Tensor, condition: ms.Condition) -> Tensor:
        squeezes = [
            layer for layer in self.flow.layers if isinstance(layer, (ms.LogitMap, ms.Squeeze))
        ]
        for layer in reversed(squeezes):
            latent = layer.inverse(latent)[0]
        return ms.requantise(latent)


SHORT: dict[str, Any] = {"crop_size": 128, "learning_rate": 5e-4}
VARIANTS: dict[str, dict[str, Any]] = {
    "input itself": {"model": Untouched, "nll_weight": 0.0},
    "recipe": {},
    "without global branch": {"model": WithoutGlobal},
    "without flow (direct regression)": {"model": WithoutFlow, "nll_weight": 0.0},
    "L1 only": {"nll_weight": 0.0, "ssim_weight": 0.0, "colour_weight": 0.0},
    "without NLL": {"nll_weight": 0.0},
    "NLL weight 0.5": {"nll_weight": 0.5},
    "without colour loss": {"colour_weight": 0.0},
    "colour loss, published wide kernel": {
        "histogram_kernel": "inverse_quadratic",
        "histogram_sigma": 0.05,
    },
    "SSIM weight 1": {"ssim_weight": 1.0},
    "without SSIM": {"ssim_weight": 0.0},
    "augmentation off": {
        "flips": False,
        "window_min": 1.0,
        "exposure_gain": 0.0,
        "channel_gain": 0.0,
    },
    "EMA off": {"ema_decay": 0.0},
    "1 coupling a scale": {"num_flow_blocks": 1},
    "4 couplings a scale": {"num_flow_blocks": 4},
    "crops of 256": {"crop_size": 256},
    "crops of 64, batch 8": {"crop_size": 64, "batch_size": 8},
    "whole pictures at 128x128": {"crop_size": 0},
    "batch 1": {"batch_size": 1},
    "batch 4": {"batch_size": 4},
    "batch 8": {"batch_size": 8},
}
NATIVE = (
    "psnr",
    "ssim",
    "psnr_gt_mean",
    "ciede2000",
    "colourfulness_ratio",
    "wasserstein",
    "bits_per_dim",
)
RESIZED = ("psnr", "ssim", "ciede2000")  # the same at image_size, whole pictures


@torch.no_grad()
def validation_scores(trainer: ms.Trainer) -> dict[str, float]:
    """Mean metrics over the validation pairs, at native size and at image_size.

    They are those of the averaged weights.
    """
    model = trainer.averaged.eval()
    native: list[dict[str, Any]] = []
    resized: list[dict[str, Any]] = []
    for index in trainer.validation:
        low, high = (to_tensor(pixels)[None] for pixels in trainer.held_out[index])
        small = [
            ms.resize(image, trainer.config.image_size, quantise=True) for image in (low, high)
        ]
        for rows, (dark, target) in ((native, (low, high)), (resized, small)):
            with trainer.runtime.autocast():
                enhanced = model.enhance(dark).float()
                likelihood = model.likelihood(target, dark) if trainer.config.nll_weight else None
            pictures = [image[0].permute(1, 2, 0).double().numpy() for image in (enhanced, target)]
            rows.append(
                image_metrics(*pictures)
                | {"bits_per_dim": float(likelihood[0]) if likelihood else math.nan}
            )
    means = {name: float(np.mean([row[name] for row in native])) for name in NATIVE}
    side = "x".join(map(str, trainer.config.image_size))
    return means | {
        f"{name}_{side}": float(np.mean([row[name] for row in resized])) for name in RESIZED
    }


def results_of(overrides: dict[str, Any]) -> Path:
    """Where the table and the runs' weights go."""
    return Path(overrides.get("results_dir", ROOT / "results"))


def train_and_score(
    name: str, minutes: float, seed: int, overrides: dict[str, Any]
) -> dict[str, Any]:
    """The scores of a variant's averaged weights on its validation pairs."""
    settings = read_config_file(str(ROOT / "release_train_config.json"))
    variant = dict(VARIANTS[name])
    model_class = variant.pop("model", ms.ConditionalFlow)
    folder = results_of(overrides) / "ablation" / f"{name.replace(' ', '_')}_{seed}"
    budget: dict[str, Any] = dict(
        max_minutes=minutes,
        num_epochs=100_000,
        val_freq=100_000,
        save_freq=100_000,
        warmup_steps=100,
    )
    budget |= dict(
        ema_decay=0.99, checkpoint_dir=str(folder), log_dir=str(folder / "logs"), seed=seed
    )
    config = ms.apply_settings(
        ms.Config(), settings | SHORT | budget | overrides | variant, "ablation"
    )
    trainer = ms.Trainer(config, model_class)
    with contextlib.redirect_stdout(io.StringIO()):
        if model_class is not Untouched:
            trainer.fit()
    means = {name: round(value, 4) for name, value in validation_scores(trainer).items()}
    shown: dict[str, Any] = {
        key: value.__name__ if isinstance(value, type) else value
        for key, value in VARIANTS[name].items()
    }
    return {
        "variant": name,
        "seed": seed,
        "minutes": minutes,
        "steps": trainer.step,
        **means,
        "settings": str(shown | overrides),
    }


def main() -> None:
    """Run the named variants, one after the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help=", ".join(VARIANTS))
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    if unknown := set(arguments.variants) - VARIANTS.keys():
        parser.error(f"unknown variant {unknown.pop()!r}; there are {', '.join(VARIANTS)}")
    overrides = dict(ms.parse_assignment(text, ms.Config) for text in arguments.set)
    table = results_of(overrides) / "ablation.csv"
    for name in arguments.variants or VARIANTS:
        row = train_and_score(name, arguments.minutes, arguments.seed, overrides)
        rows = list(csv.DictReader(table.open(encoding="utf-8"))) if table.exists() else []
        write_csv(table, [*rows, row])
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
