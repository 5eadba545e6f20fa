"""What the script computes, in numbers that hold on any machine: the fingerprints of pins.py, which
hold on one alone, with a tolerance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pins import large_low, write_pairs

import model_script as ms
from support.pictures import level_table

# loss terms and the gradient's norm of three steps
STEPS: list[dict[str, float]] = [
    {"nll": 4.32, "l1": 1.8489, "ssim": 0.86481, "colour": 0.35243, "norm": 3.6483},
    {"nll": 4.0891, "l1": 1.87, "ssim": 0.82896, "colour": 0.35638, "norm": 3.6986},
    {"nll": 3.5466, "l1": 1.6407, "ssim": 0.85087, "colour": 0.29443, "norm": 6.1473},
]
# 4x4 block means, in levels of 255, of what the weights of November 2026, the infrared network
# of the released ones, make of pins.large_low(): the best answer, and a draw at temperature 1
NOVEMBER: dict[str, list[list[list[float]]]] = {
    "best": [
        [
            [123.9, 161.6, 196.8],
            [96.7, 137.9, 158.4],
            [107.4, 143.9, 165.4],
            [115.5, 127.8, 144.8],
        ],
        [
            [104.3, 123.5, 153.5],
            [88.3, 115.7, 160.1],
            [95.6, 136.0, 188.1],
            [85.2, 132.8, 177.7],
        ],
        [
            [133.3, 124.8, 121.7],
            [121.6, 134.8, 157.9],
            [123.4, 145.5, 168.1],
            [102.6, 135.2, 173.5],
        ],
        [
            [135.4, 143.7, 156.7],
            [127.3, 134.7, 128.8],
            [127.6, 145.8, 168.6],
            [117.0, 140.1, 175.1],
        ],
    ],
    "drawn": [
        [
            [122.2, 160.6, 196.9],
            [96.1, 135.3, 157.9],
            [106.6, 143.4, 165.9],
            [114.8, 125.7, 143.7],
        ],
        [
            [103.5, 122.8, 154.3],
            [84.0, 113.8, 160.0],
            [95.0, 134.4, 187.6],
            [84.5, 131.7, 179.1],
        ],
        [
            [134.6, 124.2, 121.1],
            [118.8, 132.7, 155.7],
            [121.9, 143.7, 169.1],
            [102.0, 135.3, 174.8],
        ],
        [
            [134.9, 143.8, 157.0],
            [129.5, 136.1, 130.6],
            [126.4, 145.1, 171.2],
            [115.4, 139.2, 175.2],
        ],
    ],
}


def three_steps(folder: Path) -> list[dict[str, float]]:
    """Of a tiny training with a fixed seed."""
    write_pairs(folder / "train", 6, 0)
    tiny: dict[str, Any] = dict(
        image_size=[48, 64], flow_channels=16, thumbnail_size=32, batch_size=2
    )
    output: dict[str, Any] = dict(checkpoint_dir=str(folder / "run"), log_dir=str(folder / "run"))
    data: dict[str, Any] = dict(
        train_low_dir=str(folder / "train/low"), train_high_dir=str(folder / "train/high")
    )
    config = ms.Config(
        **tiny, **output, **data, val_fraction=0.2, learning_rate=0.01, warmup_steps=2, num_epochs=2
    )
    trainer = ms.Trainer(config, ms.Use(device="cpu"), ms.ConditionalFlow)
    trainer.model.train()
    plan = [*ms.batch_plan(len(trainer.training), config, 0), *ms.batch_plan(5, config, 1)][:3]
    found = []
    for batch in trainer._loader(plan):
        terms, norm, _ = trainer._train_step([(batch, 1.0)])
        found.append({**terms, "norm": norm})
    return found


def block_means(levels: np.ndarray) -> np.ndarray:
    """(4, 4, 3) of (H, W, 3)."""
    rows = [np.array_split(part, 4, axis=1) for part in np.array_split(levels, 4, axis=0)]
    return np.array([[block.mean((0, 1)) for block in row] for row in rows])


def released_means(tile_size: int) -> dict[str, np.ndarray]:
    """Block means by temperature 0 and 1."""
    given: dict[str, Any] = dict(device="cpu", samples=1, temperature=1.0, tile_size=tile_size)
    loaded = ms.load_model(str(ms.RELEASED), given, ms.ConditionalFlow)
    network = loaded.infrared
    found = ms.enhance_pixels(network, large_low(), loaded.use, loaded.runtime)
    table = level_table(0.0, deep=False)
    return {"best": block_means(table[found.best]), "drawn": block_means(table[found.samples[0]])}


def test_three_steps_of_training(tmp_path: Path) -> None:
    found = three_steps(tmp_path)
    assert len(found) == len(STEPS) == 3
    for ours, pinned in zip(found, STEPS, strict=True):
        assert ours == pytest.approx(pinned, rel=2e-3)


@pytest.mark.parametrize(("tile_size", "tiles"), [(4096, 1), (64, 4)])
def test_what_the_infrared_weights_make_of_a_picture(tile_size: int, tiles: int) -> None:
    halo = ms.load_model(str(ms.RELEASED), {}, ms.ConditionalFlow).model.receptive_field
    height, width = large_low().shape[:2]
    assert len(ms.plan_tiles(height, width, tile_size, halo)) == tiles
    for name, means in released_means(tile_size).items():
        np.testing.assert_allclose(means, NOVEMBER[name], atol=0.15, err_msg=name)
