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
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import model_script as ms  # noqa: E402
from support import settings  # noqa: E402
from support.files import results_folder, write_csv  # noqa: E402
from support.settings import UserError, complain  # noqa: E402

RECIPE = str(ROOT / "configs" / "november_stage3.json")
KINDS = (ms.Config, ms.Use)


class Untouched(ms.System):
    """Gives back its input, which is not trained: what there is to win."""

    def __init__(self, config: ms.Config) -> None:
        super().__init__(config)
        self.nothing = nn.Parameter(torch.zeros(()))  # an optimizer wants a parameter

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

    def decode(self, condition: ms.Condition, noise: Tensor | None = None) -> Tensor:
        latent, (height, width), (top, left) = condition[0], condition.size, condition.corner
        squeezes = [
            layer for layer in self.flow.layers if isinstance(layer, (ms.LogitMap, ms.Squeeze))
        ]
        for layer in reversed(squeezes):
            latent = layer.inverse(latent)
        return ms.requantise(latent)[..., top : top + height, left : left + width]


SHORT: dict[str, Any] = {"crop_size": 128, "learning_rate": 5e-4}
VARIANTS: dict[str, dict[str, Any]] = {
    "input itself": {"system": Untouched, "nll_weight": 0.0},
    "recipe": {},
    "without global branch": {"system": WithoutGlobal},
    "without flow (direct regression)": {"system": WithoutFlow, "nll_weight": 0.0},
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
        pair = trainer.held_out[index]
        for rows, size in ((native, None), (resized, trainer.config.image_size)):
            scored = ms.score_pair(model, *pair, size, ms.Use(), trainer.runtime, index)
            trained = bool(trainer.config.nll_weight)  # else its likelihood means nothing
            rows.append(scored.row if trained else scored.row | {"bits_per_dim": math.nan})
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
    recipe = settings.read_all(KINDS, RECIPE, [], ())
    variant = dict(VARIANTS[name])
    system = variant.pop("system", ms.ConditionalFlow)
    parent = str(results_of(overrides) / "ablation")
    folder = results_folder(parent, f"{name.replace(' ', '_')}_{seed}")
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
    budget["init_from"] = ""
    chosen = recipe | SHORT | budget | overrides | variant
    config = settings.build(ms.Config, chosen, "ablation")
    use = settings.build(ms.Use, chosen, "ablation")
    trainer = ms.Trainer(config, use, system)
    with contextlib.redirect_stdout(io.StringIO()):
        if system is not Untouched and (status := trainer.fit()):
            sys.exit(status)
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


def main() -> int:
    """Run the named variants, one after the other; returns the exit status."""
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
    try:
        overrides = settings.read_all(KINDS, None, arguments.set, ())
        table = results_of(overrides) / "ablation.csv"
        for name in arguments.variants or VARIANTS:
            row = train_and_score(name, arguments.minutes, arguments.seed, overrides)
            rows = list(csv.DictReader(table.open(encoding="utf-8"))) if table.exists() else []
            write_csv(table, [*rows, row])
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    except UserError as error:
        return complain(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
