"""Averaging frames: noise of what stands still is halved at least, what moves leaves no ghost."""

from __future__ import annotations

import math

import numpy as np
import pytest
import skimage.data
import torch
from temporal import FLOOR, Steady, noise_curve

BRIGHT = skimage.data.astronaut()[::2, ::2]
DARK = (BRIGHT / 255.0) ** 1.5 * 60


def frames_of(scene: np.ndarray, count: int, deviation: float) -> list[np.ndarray]:
    """A still with sensor noise, which grows with the light."""
    rng = np.random.default_rng(0)
    spread = deviation * np.sqrt(0.3 + scene / 60)
    noisy = (scene + spread * rng.normal(0, 1, scene.shape) for _ in range(count))
    return [np.clip(np.rint(frame), 0, 255).astype(np.uint8) for frame in noisy]


def pan(count: int, step: int) -> list[np.ndarray]:
    """A clean pan over a dark picture."""
    scene = (skimage.data.rocket() / 255.0) ** 1.5 * 60
    cuts = (scene[60:220, place * step : place * step + 240] for place in range(count))
    return [np.rint(cut).astype(np.uint8) for cut in cuts]


def steadied(frames: list[np.ndarray]) -> list[np.ndarray]:
    """In levels of 255."""
    steady = Steady()
    return [steady(frame) / 257.0 for frame in frames]


def psnr(a: np.ndarray, b: np.ndarray, peak: float) -> float:
    return 10 * math.log10(peak**2 / np.mean((a - b) ** 2))


@pytest.mark.parametrize("deviation", [1.0, 3.0, 6.0])
def test_the_noise_of_a_still_is_more_than_halved(deviation: float) -> None:
    frames = frames_of(DARK, 24, deviation)
    before = np.stack(frames[8:]).astype(float).std(0).mean()
    after = np.stack(steadied(frames)[8:]).std(0).mean()
    assert after < 0.4 * before
    error = [np.abs(np.mean(group[8:], 0) - DARK).mean() for group in (frames, steadied(frames))]
    assert error[1] < 1.1 * error[0]  # the mean is that of the scene


@pytest.mark.parametrize("step", [1, 4, 17])
def test_a_clean_pan_has_no_ghosts(step: int) -> None:
    frames = pan(12, step)
    for given, found in zip(frames, steadied(frames), strict=True):
        assert np.array_equal(given, found) or psnr(found, given, 60) > 45


def test_a_noisy_pan_is_nearer_to_the_clean_one() -> None:
    clean, rng = pan(12, 4), np.random.default_rng(0)
    noise = [rng.normal(0, 3, frame.shape) for frame in clean]
    frames = [
        np.clip(np.rint(a + b), 0, 255).astype(np.uint8) for a, b in zip(clean, noise, strict=True)
    ]
    before, after = (
        np.mean(
            [(frame.astype(float) - truth) ** 2 for frame, truth in zip(group, clean, strict=True)]
        )
        for group in (frames, steadied(frames))
    )
    assert after < 0.7 * before


def test_a_cut_starts_afresh() -> None:
    frames = [*frames_of(DARK, 8, 2.0), *frames_of(60 - DARK, 3, 2.0)]
    found = steadied(frames)
    assert psnr(found[8], 60 - DARK, 60) > psnr(frames[8].astype(float), 60 - DARK, 60) - 0.5
    steady = Steady()
    steady(frames[0])
    assert np.array_equal(steady(frames[0][:64, :80]) / 257, frames[0][:64, :80])  # another size


def test_the_curve_of_noise_follows_the_light() -> None:
    torch.manual_seed(0)
    ramp = torch.linspace(20, 200, 512).expand(1, 3, 256, 512)
    curve = noise_curve(ramp + (1 + ramp / 50) * torch.randn(1, 3, 256, 512))
    for level in (40, 110, 180):
        assert float(curve[level].sqrt()) == pytest.approx(1 + level / 50, rel=0.2)
    assert float(noise_curve(torch.full((1, 3, 40, 50), 9.0)).max()) == pytest.approx(FLOOR)
