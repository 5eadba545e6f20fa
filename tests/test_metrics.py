"""Metrics against scikit-image, SciPy and formulas written out."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
import skimage
from conftest import smooth_scene

from support.metrics import (
    ciede2000_of,
    colourfulness,
    image_metrics,
    match_mean,
    psnr_of,
    ssim_of,
    summarise,
    wasserstein_of,
)
from support.scenes import find_twins, seen_scenes


def pair(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(enhanced, high): a scene and a darker, noisier, yellower version of it, float in [0, 1]."""
    high = smooth_scene(seed, 40, 33) / 255.0
    noise = np.random.default_rng(seed).normal(0, 0.03, high.shape)
    return np.clip(high * [0.7, 0.65, 0.5] + noise, 0, 1), high


def test_psnr_by_its_formula() -> None:
    enhanced, high = pair()
    assert psnr_of(enhanced, high) == pytest.approx(
        -10 * math.log10(((enhanced - high) ** 2).mean()), abs=1e-9
    )
    assert psnr_of(enhanced, high) == pytest.approx(
        skimage.metrics.peak_signal_noise_ratio(high, enhanced, data_range=1)
    )


def test_psnr_of_equal_pictures_is_finite() -> None:
    assert psnr_of(*[pair()[1]] * 2) == 100.0


def test_psnr_of_a_uniform_error_by_hand() -> None:
    assert psnr_of(np.full((8, 8, 3), 0.6), np.full((8, 8, 3), 0.5)) == pytest.approx(20.0)


def test_ssim_is_that_of_scikit_image() -> None:
    enhanced, high = pair()
    assert ssim_of(enhanced, high) == skimage.metrics.structural_similarity(
        high, enhanced, data_range=1.0, channel_axis=2
    )
    per_channel = [
        skimage.metrics.structural_similarity(high[..., c], enhanced[..., c], data_range=1.0)
        for c in range(3)
    ]
    assert ssim_of(enhanced, high) == pytest.approx(np.mean(per_channel))
    assert ssim_of(enhanced[..., 0], high[..., 0]) == pytest.approx(per_channel[0])


@pytest.mark.parametrize("score", [psnr_of, ssim_of])
@pytest.mark.parametrize("value", [1.001, -0.001])
@pytest.mark.parametrize("place", [0, 1])
def test_scores_refuse_values_out_of_range(
    score: Callable[..., float], value: float, place: int
) -> None:
    images = [image.copy() for image in pair()]
    score(*images)
    images[place][3, 4, 1] = value
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        score(*images)


def test_ciede2000() -> None:
    enhanced, high = pair()
    assert ciede2000_of(high, high) == 0
    grey = [np.full((4, 4, 3), value) for value in (0.2, 0.8)]
    light = [skimage.color.rgb2lab(image)[0, 0, 0] for image in grey]
    middle = sum(light) / 2  # for greys CIEDE2000 is the lightness difference over S_L
    expected = (light[1] - light[0]) / (
        1 + 0.015 * (middle - 50) ** 2 / math.sqrt(20 + (middle - 50) ** 2)
    )
    assert ciede2000_of(*grey) == pytest.approx(expected, abs=0.01)
    assert ciede2000_of(enhanced, high) > 5


def test_colourfulness_of_grey_is_zero() -> None:
    grey = np.repeat(pair()[1][..., :1], 3, axis=2)
    assert colourfulness(grey) == pytest.approx(0, abs=1e-12)


def test_colourfulness_by_hasler_and_suesstrunk() -> None:
    image = pair()[1]
    red, green, blue = (image[..., c].ravel() for c in range(3))
    rg, yb = red - green, 0.5 * (red + green) - blue
    spread = math.sqrt(rg.var() + yb.var())
    expected = spread + 0.3 * math.sqrt(rg.mean() ** 2 + yb.mean() ** 2)
    assert colourfulness(image) == pytest.approx(expected, rel=1e-12)
    assert colourfulness(np.broadcast_to([1.0, 0.0, 0.0], (5, 5, 3))) == pytest.approx(
        0.3 * math.hypot(1, 0.5)
    )


def test_wasserstein_is_that_of_scipy_per_channel() -> None:
    enhanced, high = pair()
    expected = np.mean(
        [
            scipy.stats.wasserstein_distance(enhanced[..., c].ravel(), high[..., c].ravel())
            for c in range(3)
        ]
    )
    assert wasserstein_of(enhanced, high) == pytest.approx(expected, abs=1e-12)
    assert wasserstein_of(high[::-1], high) == 0  # a matter of values, not of places


def test_match_mean_brings_the_mean_grey_to_the_targets() -> None:
    enhanced, high = pair()
    weights = np.array([0.299, 0.587, 0.114])
    matched = match_mean(0.5 * enhanced, high)
    gain = (high * weights).sum(2).mean() / (0.5 * enhanced * weights).sum(2).mean()
    np.testing.assert_allclose(matched, np.clip(0.5 * enhanced * gain, 0, 1), atol=1e-12)
    assert np.isfinite(match_mean(np.zeros_like(high), high)).all()


def test_image_metrics_are_the_direct_computations() -> None:
    enhanced, high = pair()
    scores = image_metrics(enhanced, high)
    weights = np.array([0.299, 0.587, 0.114])
    gain = (high * weights).sum(2).mean() / (enhanced * weights).sum(2).mean()
    matched = np.clip(enhanced * gain, 0, 1)
    grey = [(image * weights).sum(2) for image in (matched, high)]
    lab = [skimage.color.rgb2lab(image) for image in (enhanced, high)]
    assert scores == pytest.approx(
        {
            "psnr": skimage.metrics.peak_signal_noise_ratio(high, enhanced, data_range=1),
            "ssim": skimage.metrics.structural_similarity(
                high, enhanced, data_range=1, channel_axis=2
            ),
            "ciede2000": skimage.color.deltaE_ciede2000(*lab).mean(),
            "colourfulness_ratio": colourfulness(enhanced) / colourfulness(high),
            "wasserstein": wasserstein_of(enhanced, high),
            "psnr_gt_mean": skimage.metrics.peak_signal_noise_ratio(high, matched, data_range=1),
            "ssim_grey_gt_mean": skimage.metrics.structural_similarity(
                grey[1], grey[0], data_range=1
            ),
        }
    )


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_image_metrics_of_flat_pictures_are_finite(value: float) -> None:
    flat, high = np.full((20, 20, 3), value), pair()[1][:20, :20]
    assert all(
        math.isfinite(v)
        for pictures in ((flat, high), (high, flat), (flat, flat))
        for v in image_metrics(*pictures).values()
    )


def rows(name: str, values: list[float]) -> list[dict[str, object]]:
    return [
        {"filename": f"{i}.png", name: value, "twin_in_training": False}
        for i, value in enumerate(values)
    ]


@pytest.mark.parametrize(
    ("name", "values", "worst"),
    [
        ("psnr", [20.0, 11.0, 30.0], 1),
        ("ssim", [0.2, 0.8, 0.9], 0),
        ("psnr_gt_mean", [20.0, 11.0, 5.0], 2),
        ("ssim_grey_gt_mean", [0.9, 0.1, 0.5], 1),
        ("ciede2000", [3.0, 9.0, 1.0], 1),
        ("wasserstein", [0.1, 0.2, 0.3], 2),
        ("bits_per_dim", [5.0, 3.0, 4.0], 0),
        ("seconds", [0.2, 0.3, 0.1], 1),
        ("colourfulness_ratio", [0.4, 2.0, 1.0], 0),  # 1 is best; 1/2.5 is farther from it than 2
        ("colourfulness_ratio", [0.6, 2.0, 1.0], 1),
        ("colourfulness_ratio", [1.1, 0.0, 3.0], 1),
    ],
)
def test_summarise_names_the_worst_file(name: str, values: list[float], worst: int) -> None:
    summary = summarise(rows(name, values))
    assert set(summary) == {name}
    assert summary[name]["worst_file"] == f"{worst}.png"
    assert summary[name]["worst"] == values[worst]


def test_an_extra_metric_brings_its_direction() -> None:
    scores = rows("niqe", [3.0, 5.0, 4.0])
    assert summarise(scores)["niqe"]["worst"] == 3.0
    assert summarise(scores, ["niqe"])["niqe"]["worst_file"] == "1.png"


def test_summarise_statistics() -> None:
    values = [10.0, 11.0, 15.0, 40.0]
    summary = summarise(rows("psnr", values))["psnr"]
    assert summary["mean"] == 19.0
    assert summary["median"] == 13.0
    assert summary["std"] == pytest.approx(np.std(values))
    assert summary["uses_ground_truth"] is False
    assert summarise(rows("psnr_gt_mean", values))["psnr_gt_mean"]["uses_ground_truth"] is True


def test_every_metric_has_the_right_direction() -> None:
    """A much worse picture must be named worst under every name that image_metrics gives."""
    enhanced, high = pair()
    bad = np.clip(0.1 * enhanced, 0, 1)[::-1]
    scores = [image_metrics(image, high) for image in (enhanced, bad)]
    summary = summarise(
        [{"filename": name, **score} for name, score in zip("ab", scores, strict=True)]
    )
    assert {name: entry["worst_file"] for name, entry in summary.items()} == dict.fromkeys(
        summary, "b"
    )


def test_find_twins_flags_equal_and_nearly_equal_only() -> None:
    known = np.stack([smooth_scene(seed, 16, 16) for seed in range(4)])
    other = smooth_scene(9, 16, 16)
    nearly = np.clip(
        known[2].astype(int) + np.random.default_rng(0).integers(-2, 3, known[2].shape), 0, 255
    ).astype(np.uint8)
    brighter = np.clip(known[1].astype(int) + 12, 0, 255).astype(np.uint8)
    tested = np.stack([known[3], other, nearly, brighter])
    assert find_twins(tested, known).tolist() == [True, False, True, False]
    assert find_twins(tested, known[:0]).tolist() == [False] * 4


def test_another_take_of_a_scene_is_a_seen_scene_whatever_its_exposure() -> None:
    rng = np.random.default_rng(0)
    looks = rng.integers(40, 200, (3, 16, 16, 3)).astype(np.uint8)
    darker = (looks[:1] * 0.5 + rng.normal(0, 2, looks[:1].shape)).astype(np.uint8)
    tested = np.concatenate([darker, looks[2:]])
    assert seen_scenes(tested, looks[:2], 0.98).tolist() == [True, False]
    assert find_twins(tested, looks[:2]).tolist() == [False, False]
    assert seen_scenes(tested, looks[:0], 0.98).tolist() == [False, False]
