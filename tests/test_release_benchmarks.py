"""The benchmarks of a release: what is held out, and the scores without a target."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import prepare_sources
import release_table


def test_what_is_held_out_is_whole_scenes() -> None:
    rng = np.random.default_rng(0)
    looks = rng.integers(0, 256, (40, 16, 16, 3)).astype(np.uint8)
    names = [f"{scene:03d}_{frame}" for scene in range(40) for frame in range(3)]
    held = prepare_sources.held_out(names, looks.repeat(3, 0), 20, 0, 0.85, set())
    assert 20 <= len(held) <= 22
    scenes = {name.split("_")[0] for name in held}
    assert sorted(held) == sorted(name for name in names if name.split("_")[0] in scenes)


def test_takes_of_one_scene_stay_together_and_what_is_kept_stays() -> None:
    rng = np.random.default_rng(0)
    looks = rng.integers(0, 256, (30, 16, 16, 3)).astype(np.uint8)[np.arange(60) % 30]
    names = [str(i) for i in range(60)]
    held = prepare_sources.held_out(names, looks, 21, 1, 0.85, {"7"})
    assert "7" in held and "37" not in held  # its list says so
    assert (
        all(str((int(name) + 30) % 60) in held for name in held if name != "7") and len(held) == 21
    )


def test_burnt_share_counts_what_was_not_bright() -> None:
    given, enhanced = np.full((2, 10, 3), 100, np.uint8), np.full((2, 10, 3), 200, np.uint8)
    given[0, :5] = 230
    enhanced[0, :8, 1] = 255
    assert release_table.burnt_share(given, enhanced) == pytest.approx(3 / 20)


def test_chroma_shift_sees_bright_pixels_alone() -> None:
    given = np.full((4, 4, 3), 20, np.uint8)
    assert np.isnan(release_table.chroma_shift(given, given))
    given[0] = 200
    enhanced = given.copy()
    enhanced[1:] = (255, 0, 0)
    assert release_table.chroma_shift(given, enhanced) == 0
    enhanced[0] = (200, 200, 120)
    assert 30 < release_table.chroma_shift(given, enhanced) < 60


def test_spread_takes_the_ends() -> None:
    assert release_table.spread(10, 4) == [0, 3, 6, 9] and release_table.spread(3, 9) == [0, 1, 2]
