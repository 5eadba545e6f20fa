"""Simulated: dark sensors, ordinary and infrared; what training mixes; the demo's photographs."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import skimage
from PIL import Image

from support.decoding import read_image
from support.files import write_csv
from support.metrics import image_metrics
from support.pictures import linear_to_srgb, srgb_to_linear, write_image

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


Pairs = Sequence[tuple[np.ndarray, np.ndarray]]  # (low, high), each (H, W, 3) uint8


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


def linear_levels() -> np.ndarray:
    """(256,) float32: each 8-bit sRGB level as linear light in [0, 1]."""
    return srgb_to_linear(np.arange(256) / 255).astype(np.float32)


def to_levels(light: np.ndarray) -> np.ndarray:
    """uint8 sRGB of linear light, clipped to [0, 1]."""
    return np.rint(linear_to_srgb(np.clip(light, 0, 1)) * 255).astype(np.uint8)


def by_lamplight(light: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(H, W, 3) linear light under a lamp: blue up to 2.5 stops weaker and green a third of that,
    or, seldom, a blue hour."""
    stops = rng.uniform(0, 2.5) if rng.random() < 0.8 else -rng.uniform(0, 0.8)
    gains = 2.0 ** np.array([min(0.0, stops), -0.33 * abs(stops), -max(0.0, stops)])
    return light * gains.astype(np.float32)


def with_night(light: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(H, W, 3) linear light with black where a smooth random field is high: sky and shadows in
    which nothing is to be found."""
    field = Image.fromarray(rng.uniform(0, 1, (4, 4)).astype(np.float32))
    smooth = np.asarray(field.resize((light.shape[1], light.shape[0]), Image.Resampling.BICUBIC))
    mask = np.clip(
        (smooth - np.quantile(smooth, rng.uniform(0.3, 0.8))) * rng.uniform(4, 30) + 0.5, 0, 1
    )[..., None]
    return (light * (1 - mask) + 10.0 ** rng.uniform(-5, -2.8) * mask).astype(np.float32)


def as_jpeg(low: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(H, W, 3) uint8 as it comes back from a JPEG file of quality 50 to 95: with its blocks."""
    file = io.BytesIO()
    Image.fromarray(low).save(file, "JPEG", quality=int(rng.integers(50, 96)))
    return np.asarray(Image.open(file))


def darkened(high: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(low, high), uint8: a well-exposed (H, W, 3) picture as an ordinary camera sees it in the
    dark, and what is wanted of it.

    In linear light: of some, both under a lamp, whose colour is to stay, or with black parts, which
    are to stay black. Then for low: white balance off by up to a sixth of a stop a channel; 1 to 6
    stops less light; photon noise of 2,000 to 20,000 electrons at white and read noise of 1 to 6; a
    contrast curve of exponent 0.8 to 1.25; sRGB, 8 bits; of half, JPEG.
    """
    light = linear_levels()[high]
    lamp, night, jpeg = rng.random(3) < (0.4, 0.35, 0.5)
    light = by_lamplight(light, rng) if lamp else light
    light = with_night(light, rng) if night else light
    wanted = to_levels(light) if lamp or night else high
    light = light * (2.0 ** (rng.uniform(-1, 1, 3) / 6 - rng.uniform(1, 6))).astype(np.float32)
    full, read, curve = 10.0 ** rng.uniform(3.3, 4.3), rng.uniform(1, 6), rng.uniform(0.8, 1.25)
    noise = rng.standard_normal(high.shape, np.float32) * np.sqrt(light / full + (read / full) ** 2)
    low = to_levels(np.clip(light + noise, 0, 1) ** curve)
    return as_jpeg(low, rng) if jpeg else low, wanted


def paste_bright(low: np.ndarray, high: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """`low` with parts of `high` in it, (H, W, 3) uint8: what is bright there, or a rectangle (Yoo
    et al., CutBlur, 2020).

    What is well exposed in a dark picture, lamps and skies say, is to stay as it is.
    """
    height, width = low.shape[:2]
    mask = np.zeros((height, width), np.float32)
    if rng.random() < 0.7:
        grey = (
            Image.fromarray(high)
            .convert("L")
            .reduce(4)
            .resize((width, height), Image.Resampling.BILINEAR)
        )
        mask = np.clip(
            (np.asarray(grey, np.float32) / 255 - rng.uniform(0.35, 0.85)) * 8 + 0.5, 0, 1
        )
    else:
        sides = [max(8, round(side * rng.uniform(0.2, 0.7))) for side in (height, width)]
        top, left = (
            int(rng.integers(0, full - side + 1))
            for full, side in zip((height, width), sides, strict=True)
        )
        mask[top : top + sides[0], left : left + sides[1]] = 1
    mixed = low + mask[..., None] * (high.astype(np.float32) - low)
    return np.rint(mixed).astype(np.uint8)


def mix_light(first: np.ndarray, second: np.ndarray, weight: float) -> np.ndarray:
    """Two uint8 pictures of one shape mixed in linear light, as a double exposure mixes them."""
    levels = linear_levels()
    return to_levels(weight * levels[first] + (1 - weight) * levels[second])


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


def write_demo_pairs(folder: Path, side: int, seed: int) -> None:
    """Simulated pairs under folder/{train,eval}/{low,high}; training and evaluation show different
    photographs."""
    rng = np.random.default_rng(seed)
    for part, names, count in (
        ("train", DEMO_TRAIN, 36),
        ("eval", DEMO_TEST, 6),
    ):
        for name in names:
            crops = demo_crops(name, count, side, part == "train", rng)
            for place, high in enumerate(crops):
                low = simulate_infrared(high, rng)
                for kind, pixels in (("high", high), ("low", low)):
                    path = folder / part / kind / f"{name}_{place}.png"
                    write_image(path, Image.fromarray(pixels))


def gamma_baseline(pairs: Pairs) -> float:
    """The one exponent in {0.1, 0.15, ..., 1} that brightens (low, high) pairs best, by mean
    squared error."""
    low, high = (np.stack([pair[k] for pair in pairs]) / 255.0 for k in (0, 1))
    exponents = np.arange(0.1, 1.01, 0.05)
    return min(exponents, key=lambda exponent: float(((low**exponent - high) ** 2).mean()))


def read_demo_pairs(folder: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """(low, high) of every pair under `folder`, each (H, W, 3) uint8."""
    names = sorted(path.name for path in (folder / "low").glob("*.png"))
    return [
        (read_image(folder / "low" / name), read_image(folder / "high" / name)) for name in names
    ]


def demo_table(data: Path, ours: dict[str, Any], path: Path) -> None:
    """Input and gamma baseline beside our means `ours`: printed, and written to `path` as CSV.

    `data` is the folder of `write_demo_pairs`.
    """
    training, test = (read_demo_pairs(data / part) for part in ("train", "eval"))
    exponent = gamma_baseline(training)
    pairs = [(low / 255.0, high / 255.0) for low, high in test]
    score = image_metrics
    scores = {
        "input": [score(low, high) for low, high in pairs],
        f"gamma {exponent:.2f}": [score(low**exponent, high) for low, high in pairs],
    }
    columns = ("psnr", "ssim", "ciede2000", "colourfulness_ratio")
    rows: list[dict[str, Any]] = [
        {"method": name} | {c: float(np.mean([row[c] for row in values])) for c in columns}
        for name, values in scores.items()
    ]
    rows.append({"method": "ours"} | {c: ours[c]["mean"] for c in columns})
    write_csv(path, rows)
    print(f"\n{'':12}" + "".join(f"{name:>20}" for name in columns))
    for row in rows:
        print(f"{row['method']:12}" + "".join(f"{row[name]:20.3f}" for name in columns))


def demo_settings(folder: Path, weights: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the recipe of the demo's small model, which a user may change; where its files lie)."""
    sides = [(part, kind) for part in ("train", "eval") for kind in ("low", "high")]
    here: dict[str, Any] = {f"{a}_{b}_dir": str(folder / "data" / a / b) for a, b in sides}
    here |= dict(checkpoint_dir=f"{weights}/{folder.name}", results_dir=str(folder))
    here |= dict(sources=[], scenes="", camera="auto", outputs_dir="", extra_metrics="")
    small = dict(
        **dict(val_low_dir="", val_high_dir="", image_size=[128, 128], crop_size=0, window_min=0.7),
        **dict(flow_channels=32, thumbnail_size=64, batch_size=4, learning_rate=2e-3, num_epochs=8),
        **dict(max_minutes=2.9, keep_checkpoints=1, init_from="", eval_size="auto"),
    )
    return small, here
