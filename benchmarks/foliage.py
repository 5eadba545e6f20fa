"""How well leaves come out, beside the rest of the picture, before and after enhancing.

    python benchmarks/foliage.py [--checkpoint FILE] \\
        [--set eval_low_dir=... --set eval_high_dir=...] [--set scenes=...]

Leaves reflect infrared light, so a camera without infrared-cut filter shows them as pale as skin.
They are found in the target: CIELAB hue between yellow-green and green, 100 to 150 degrees, at a
chroma above 15 and a lightness between 15 and 85. Printed are, over the pixels of all pairs, the
mean CIEDE2000 of the dark picture at the target's mean brightness and of the enhanced one, and the
chroma of either over the target's: 1 is right, below 1 is paler.
"""

from __future__ import annotations

import numpy as np
import skimage.color
from eval_pairs import open_bench

import model_script as ms

HUE, CHROMA, LIGHTNESS = (100, 150), 15, (15, 85)


def leaves(target: np.ndarray) -> np.ndarray:
    """(H, W) bool: where an (H, W, 3) CIELAB picture is as green as leaves."""
    lightness, a, b = np.moveaxis(target, -1, 0)
    hue = np.degrees(np.arctan2(b, a))
    green = (HUE[0] < hue) & (hue < HUE[1]) & (np.hypot(a, b) > CHROMA)
    return green & (LIGHTNESS[0] < lightness) & (lightness < LIGHTNESS[1])


def as_bright(image: np.ndarray, target: np.ndarray) -> np.ndarray:
    """A picture in [0, 1], scaled to the target's mean."""
    return np.clip(image * target.mean() / max(image.mean(), 1e-6), 0, 1)


def main() -> None:
    """Print a row for leaves and one for all else."""
    bench = open_bench(__doc__)
    sums = np.zeros((2, 2, 3))  # leaves or not; before or after; CIEDE2000, chroma, the target's
    counts = np.zeros(2)
    for _, low, high in bench.pairs():
        found = ms.enhance_pixels(bench.model(low), low, bench.use, bench.runtime).best / 65535
        target = high / 255
        goal = skimage.color.rgb2lab(target)
        where = leaves(goal)
        parts = (where, ~where)
        counts += [int(part.sum()) for part in parts]
        for time, image in enumerate((as_bright(low / 255, target), found)):
            lab = skimage.color.rgb2lab(image)
            error = skimage.color.deltaE_ciede2000(lab, goal)
            chroma, wanted = (np.hypot(x[..., 1], x[..., 2]) for x in (lab, goal))
            for kind, part in enumerate(parts):
                sums[kind, time] += [values[part].sum() for values in (error, chroma, wanted)]
    print("pixels     share   CIEDE2000 before, after   chroma ratio before, after")
    for kind, name in enumerate(("leaves", "all else")):
        errors = sums[kind, :, 0] / max(counts[kind], 1)
        ratios = sums[kind, :, 1] / np.maximum(sums[kind, :, 2], 1e-6)
        share = counts[kind] / counts.sum()
        line = f"{share:6.3f} {errors[0]:13.2f} {errors[1]:7.2f} {ratios[0]:18.2f} {ratios[1]:6.2f}"
        print(f"{name:9} {line}")


if __name__ == "__main__":
    main()
