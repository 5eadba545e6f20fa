"""Scores of an enhanced picture where there is no target: float RGB in [0, 1], (H, W, 3).

They count what enhancing breaks. They do not say whether a picture is good: the input itself has
no new clipping and little noise. Read them together, and look at the pictures.
"""

from __future__ import annotations

import math

import numpy as np

from support.metrics import GREY, check_range, colourfulness

WHITE, BLACK = 250 / 255, 5 / 255  # at and beyond them a channel counts as clipped
FREE = 220 / 255  # below it a channel of the input had room to brighten
BLOCK, CELL = 16, 4  # sides in pixels
LAPLACIANS = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]]) / 6  # their difference: noise alone


def clipped_new(enhanced: np.ndarray, low: np.ndarray) -> float:
    """Share of the pixels, in [0, 1], that enhancing burnt out: one channel of `enhanced` or more
    is at 250 of 255 or above, and all of `low` are below 220."""
    return float(((enhanced >= WHITE).any(-1) & (low < FREE).all(-1)).mean())


def black_new(enhanced: np.ndarray, low: np.ndarray) -> float:
    """Share of the pixels, in [0, 1], that enhancing made black: all channels of `enhanced` are at
    5 of 255 or below, and one of `low` or more is above."""
    return float(((enhanced <= BLACK).all(-1) & (low > BLACK).any(-1)).mean())


def blocks_of(image: np.ndarray, side: int) -> np.ndarray:
    """(H // side, W // side, side, side, C) of an (H, W, C) image; what is left over is cut off."""
    rows, columns = image.shape[0] // side, image.shape[1] // side
    cut = image[: rows * side, : columns * side]
    return cut.reshape(rows, side, columns, side, -1).swapaxes(1, 2)


def noise_flat(image: np.ndarray) -> float:
    """Deviation of the noise in flat zones, in levels of 255; root mean square over R, G and B.

    The median over the flattest tenth of the blocks of 16x16, each by Immerkaer, *Fast noise
    variance estimation*, CVIU 1996: the mean magnitude under the difference of two Laplacians,
    which edges hardly reach, times sqrt(pi / 2). Flat is a block whose cells of 4x4 have much the
    same mean grey. Blocks with a mean grey outside [16, 240] of 255 are left out, as noise is
    clipped there, unless there are no others. Both sides of the picture are at least 16.
    """
    from scipy.ndimage import convolve  # seldom wanted, and slow to import

    grey = blocks_of((image @ GREY)[..., None], CELL).mean((2, 3))  # of the cells
    cells = blocks_of(grey, BLOCK // CELL)
    spread, level = cells.std((2, 3)).ravel(), cells.mean((2, 3)).ravel() * 255
    magnitude = np.abs(convolve(image, LAPLACIANS[..., None], mode="mirror"))
    noise = blocks_of(magnitude, BLOCK).mean((2, 3)).reshape(-1, 3) * math.sqrt(math.pi / 2)
    fair = (level >= 16) & (level <= 240)
    if fair.any():
        spread, noise = spread[fair], noise[fair]
    flattest = np.argsort(spread, kind="stable")[: math.ceil(len(spread) / 10)]
    return float(np.median(np.sqrt((noise[flattest] ** 2).mean(-1)))) * 255


def scores_without_target(enhanced: np.ndarray, low: np.ndarray) -> dict[str, float]:
    """Every score of a picture and the dark one that it was made from, (H, W, 3) in [0, 1] each.

    `brightness` is the mean over all values, in [0, 1]; `colourfulness` that of
    `metrics.colourfulness`. Neither is better high or low. Raises ValueError beyond [0, 1].
    """
    check_range(enhanced, low)
    return {
        "clipped_new": clipped_new(enhanced, low),
        "black_new": black_new(enhanced, low),
        "brightness": float(enhanced.mean()),
        "colourfulness": colourfulness(enhanced),
        "noise_flat": noise_flat(enhanced),
    }
