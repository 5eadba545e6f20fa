"""Scored pictures: their scores, and the sheet that shows the best and the worst."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from support.metrics import image_metrics
from support.no_reference import scores_without_target
from support.pictures import contact_sheet, resize_pixels, to_tensor


class Scored(NamedTuple):
    """One scored pair: pictures (3, H, W) in [0, 1] on the CPU, of which `enhanced` has the 8-bit
    levels of the file that a user would get; its scores; what else the model shows."""

    low: Tensor
    enhanced: Tensor
    high: Tensor | None
    row: dict[str, Any]
    extra: dict[str, Tensor]
    latent: Tensor | None

    @property
    def strip(self) -> list[Tensor]:
        """Input, enhanced and, where there is one, target."""
        return [self.low, self.enhanced] + ([] if self.high is None else [self.high])


def score_levels(
    low: np.ndarray, levels: np.ndarray, high: np.ndarray | None, size: Sequence[int] | None = None
) -> Scored:
    """Compare `levels`, the enhanced picture, with its target, or without one with its input; all
    (H, W, 3) uint8, resized to `size` (height, width) first where that is given."""
    low, levels = resize_pixels(low, size), resize_pixels(levels, size)
    high = None if high is None else resize_pixels(high, size)
    if high is None:
        row = scores_without_target(levels / 255.0, low / 255.0)
    else:
        row = image_metrics(levels / 255.0, high / 255.0)
    target = None if high is None else to_tensor(high)
    return Scored(to_tensor(low), to_tensor(levels), target, row, {}, None)


def overview(rows: Sequence[dict[str, Any]], images: Path) -> Image.Image:
    """The strips in `images` of the two worst, median and best pictures: by PSNR, or without
    targets by the share of new clipping."""
    scores = [row["psnr"] if "psnr" in row else -row["clipped_new"] for row in rows]
    order = np.argsort(scores, kind="stable")
    middle = len(order) // 2
    chosen = dict.fromkeys([*order[:2], *order[max(0, middle - 1) : middle + 1], *order[-2:]])
    names = [Path(rows[i]["filename"]).stem for i in chosen]
    return contact_sheet([Image.open(images / f"{name}_viz.png") for name in names])
