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
        [[123.9, 161.4, 196.6], [96.6, 137.9, 158.4], [106.9, 143.9, 165.2], [115.8, 127.5, 145.0]],
        [[103.7, 123.6, 153.5], [88.2, 115.7, 160.1], [95.6, 136.0, 188.0], [85.0, 132.6, 177.7]],
        [
            [133.3, 124.6, 121.7],
            [121.6, 134.7, 157.9],
            [123.4, 145.5, 168.0],
            [102.6, 135.1, 173.5],
        ],
        [
            [135.5, 143.6, 156.8],
            [127.3, 134.6, 128.7],
            [127.2, 145.6, 168.6],
            [117.0, 139.7, 175.1],
        ],
    ],
    "drawn": [
        [[122.5, 160.7, 197.3], [97.0, 136.1, 158.5], [106.2, 143.4, 165.0], [115.8, 126.4, 144.9]],
        [[102.3, 122.9, 153.7], [84.2, 114.0, 160.6], [94.7, 134.3, 188.0], [84.8, 131.8, 180.0]],
        [
            [134.5, 123.6, 120.6],
            [119.0, 132.5, 155.9],
            [121.5, 143.5, 168.6],
            [101.9, 135.5, 174.2],
        ],
        [
            [135.1, 143.7, 157.7],
            [129.6, 135.9, 130.6],
            [126.3, 145.2, 171.0],
            [116.2, 138.9, 176.4],
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
