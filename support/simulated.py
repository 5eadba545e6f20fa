"""Simulated: photographs that ship with scikit-image, seen by a dark sensor."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import skimage
from PIL import Image

from support.pictures import linear_to_srgb, srgb_to_linear

DEMO_TRAIN = (
    "coffee",
    "chelsea",
    "stereo_motorcycle",
    "immunohistochemistry",
    "retina",
    "colorwheel",
    "hubble_deep_field",
)


DEMO_TEST = ("astronaut", "rocket")


def simulate_infrared(high: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(H, W, 3) uint8 as a sensor without infrared-cut filter sees it in a short exposure.

    In linear light: (1) near-infrared reflectance is guessed from the visible, brightest where red
    and green are (skin, cloth, leaves); (2) each colour filter passes its colour, a little of its
    neighbours and, unequally, the infrared; (3) exposure about 1/40, varying by a fifth of a stop;
    (4) Poisson noise of 4000 photo-electrons at white and Gaussian read noise of 2; (5) sRGB
    encoding and rounding to 8 bits.
    """
    light = srgb_to_linear(high / 255.0)
    infrared = light @ np.array([0.55, 0.35, 0.10]) * 0.8 + 0.05
    crosstalk = np.array([[0.80, 0.15, 0.05], [0.12, 0.76, 0.12], [0.06, 0.16, 0.78]])
    veil = np.array([0.75, 0.30, 0.45])
    exposure = 2.0 ** rng.uniform(-0.2, 0.2) / 40
    electrons = 4000 * exposure * (light @ crosstalk.T + infrared[..., None] * veil)
    noisy = (rng.poisson(electrons) + rng.normal(0, 2, electrons.shape)) / 4000
    return np.rint(linear_to_srgb(np.clip(noisy, 0, 1)) * 255).astype(np.uint8)


def demo_photograph(name: str) -> Image.Image:
    """A photograph in scikit-image's wheel; of a stereo pair the left one."""
    pixels = getattr(skimage.data, name)()
    return Image.fromarray(pixels[0] if isinstance(pixels, tuple) else pixels)


def demo_crops(
    name: str, count: int, side: int, recolour: bool, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """`count` random (side, side, 3) uint8 crops of a photograph in scikit-image's wheel, at scales
    from 1/4 to 1.

    `recolour` permutes the channels: seven photographs hold too few colours to learn a colour from.
    """
    photograph = demo_photograph(name)
    least = min(photograph.size)
    for _ in range(count):
        extent = int(rng.integers(min(least, 2 * side), least + 1))
        left, top = (int(rng.integers(0, full - extent + 1)) for full in photograph.size)
        crop = photograph.crop((left, top, left + extent, top + extent)).resize(
            (side, side), Image.Resampling.LANCZOS
        )
        order = rng.permutation(3) if recolour else np.arange(3)
        yield np.asarray(crop)[..., order]
