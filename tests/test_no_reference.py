"""Scores without a target, against loops over the pixels and noise of a known deviation."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from cli_tools import save_picture
from conftest import smooth_scene

from support.metrics import colourfulness, summarise
from support.no_reference import black_new, clipped_new, noise_flat, scores_without_target
from support.scored import overview


def levels(*pixels: tuple[int, int, int]) -> np.ndarray:
    """A picture of one row with these 8-bit pixels, float in [0, 1]."""
    return np.array([pixels]) / 255.0


def noisy(deviation: float, shape: tuple[int, int] = (96, 128), seed: int = 0) -> np.ndarray:
    """A ramp with white noise of `deviation` levels, rounded to 8 bits, float in [0, 1]."""
    ramp = np.linspace(60, 190, shape[1])[None, :, None] * np.ones((shape[0], 1, 3))
    noise = np.random.default_rng(seed).normal(0, deviation, ramp.shape)
    return np.rint(ramp + noise) / 255.0


def test_clipped_new_counts_pixels_that_had_room() -> None:
    low = levels((10, 20, 30), (10, 20, 219), (10, 20, 220), (10, 20, 30))
    enhanced = levels((250, 0, 0), (90, 90, 255), (90, 90, 255), (249, 249, 249))
    assert clipped_new(enhanced, low) == 0.5
    assert clipped_new(low, low) == 0.0


def test_black_new_counts_pixels_that_were_not_black() -> None:
    low = levels((5, 5, 6), (5, 5, 5), (9, 9, 9), (9, 9, 9))
    enhanced = levels((5, 5, 5), (0, 0, 0), (0, 0, 6), (0, 5, 0))
    assert black_new(enhanced, low) == 0.5
    assert black_new(low, low) == 0.0


def test_shares_are_those_of_a_loop_over_random_pixels() -> None:
    rng = np.random.default_rng(0)
    ours, low = (rng.choice([0, 5, 6, 219, 220, 249, 250, 255], (40, 40, 3)) for _ in range(2))
    burnt = black = 0
    for a, b in zip(ours.reshape(-1, 3), low.reshape(-1, 3), strict=True):
        burnt += max(a) >= 250 and max(b) < 220
        black += max(a) <= 5 and max(b) > 5
    assert clipped_new(ours / 255.0, low / 255.0) == burnt / 1600 > 0
    assert black_new(ours / 255.0, low / 255.0) == black / 1600 > 0


@pytest.mark.parametrize("deviation", [1.0, 2.0, 5.0, 10.0])
def test_noise_is_found_on_a_ramp(deviation: float) -> None:
    assert noise_flat(noisy(deviation)) == pytest.approx(math.hypot(deviation, 0.29), rel=0.1)


def test_noise_of_a_clean_picture_is_none() -> None:
    assert noise_flat(np.full((32, 48, 3), 0.4)) == 0
    y, x = np.mgrid[:64, :80] / 100.0
    assert noise_flat(np.stack([x, y, (x + y) / 2], -1)) < 1e-9


def test_noise_is_that_of_a_loop_over_the_blocks() -> None:
    image = smooth_scene(3, 50, 70) / 255.0
    image = np.clip(image + np.random.default_rng(1).normal(0, 0.02, image.shape), 0, 1)
    kernel = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]])
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="reflect")
    found = []
    for top in range(0, 48, 16):
        for left in range(0, 64, 16):
            total = np.zeros(3)
            for y in range(top, top + 16):
                for x in range(left, left + 16):
                    window = padded[y : y + 3, x : x + 3]
                    total += np.abs((window * kernel[..., None]).sum((0, 1)))
            sigma = math.sqrt(math.pi / 2) * total / (6 * 256)
            grey = image[top : top + 16, left : left + 16] @ [0.299, 0.587, 0.114]
            corners = [(row, column) for row in range(0, 16, 4) for column in range(0, 16, 4)]
            cells = [grey[row : row + 4, column : column + 4].mean() for row, column in corners]
            if 16 <= 255 * grey.mean() <= 240:
                found.append((np.std(cells), math.sqrt((sigma**2).mean())))
    flattest = sorted(found)[: math.ceil(len(found) / 10)]
    expected = 255 * np.median([noise for _, noise in flattest])
    assert noise_flat(image) == pytest.approx(expected, rel=1e-9)


def test_black_and_white_blocks_say_nothing_of_the_noise() -> None:
    image = noisy(4.0)
    image[:48] = 0.0  # half of the picture, as flat as can be
    assert noise_flat(image) == pytest.approx(4.0, rel=0.15)
    assert noise_flat(np.zeros((20, 20, 3))) == 0.0  # there are no others


def test_structure_is_hardly_taken_for_noise() -> None:
    image = noisy(2.0)
    image[:48, ::8] = 0.9  # stripes in half of the picture
    assert noise_flat(image) == pytest.approx(2.0, rel=0.15)


def test_all_scores_have_their_names_and_ranges() -> None:
    enhanced, low = noisy(3.0), noisy(1.0) * 0.2
    scores = scores_without_target(enhanced, low)
    assert list(scores) == ["clipped_new", "black_new", "brightness", "colourfulness", "noise_flat"]
    assert scores["brightness"] == pytest.approx(enhanced.mean())
    assert scores["colourfulness"] == colourfulness(enhanced)
    assert scores["noise_flat"] == noise_flat(enhanced)
    for value in (1.001, -0.001):
        wrong = enhanced.copy()
        wrong[3, 4, 1] = value
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            scores_without_target(wrong, low)


@pytest.mark.parametrize("size", [(16, 16), (17, 31), (40, 16)])
def test_small_and_flat_pictures_are_finite(size: tuple[int, int]) -> None:
    for value in (0.0, 0.5, 1.0):
        flat = np.full((*size, 3), value)
        assert all(math.isfinite(score) for score in scores_without_target(flat, flat).values())


def test_the_overview_begins_with_the_most_clipping(tmp_path: Path) -> None:
    rows = []
    for name, value, colour in (("a", 0.1, 0), ("b", 0.3, 1), ("c", 0.2, 2)):
        pixels = np.zeros((40, 100, 3), np.uint8)
        pixels[..., colour] = 255
        save_picture(tmp_path / f"{name}_viz.png", pixels)
        rows.append({"filename": f"{name}.png", "clipped_new": value})
    sheet = np.asarray(overview(rows, tmp_path))
    places = [int(np.argmax(sheet[row, 600])) for row in (200, 700, 1200)]
    assert places == [1, 2, 0]  # green, blue, red


def test_the_summary_names_the_worst_where_a_direction_is_better() -> None:
    rows = [
        {"filename": name, "clipped_new": value, "noise_flat": value, "brightness": value}
        for name, value in (("a", 0.1), ("b", 0.3), ("c", 0.2))
    ]
    summary = summarise(rows)
    assert summary["clipped_new"]["worst_file"] == summary["noise_flat"]["worst_file"] == "b"
    assert "worst" not in summary["brightness"] and "worst_file" not in summary["brightness"]
    assert summary["brightness"]["mean"] == pytest.approx(0.2)
