"""Scored pictures: their scores, and the strips and sheets that show them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from support.pictures import contact_sheet, triptych, write_image


class Scored(NamedTuple):
    """One scored pair: pictures (3, H, W) in [0, 1] on the CPU, of which `enhanced` has the 8-bit
    levels of the file that a user would get; its scores; what else the model shows."""

    low: Tensor
    enhanced: Tensor
    high: Tensor
    row: dict[str, Any]
    extra: dict[str, Tensor]
    latent: Tensor | None


def overview(rows: Sequence[dict[str, Any]], images: Path) -> Image.Image:
    """The triptychs in `images` of the two worst, median and best pictures."""
    order = np.argsort([row["psnr"] for row in rows])
    middle = len(order) // 2
    chosen = dict.fromkeys([*order[:2], *order[max(0, middle - 1) : middle + 1], *order[-2:]])
    names = [Path(rows[i]["filename"]).stem for i in chosen]
    return contact_sheet([Image.open(images / f"{name}_viz.png") for name in names])


def write_scored(scored: Scored, folder: Path) -> None:
    """The enhanced picture, what else the model shows, and the triptych."""
    row, name = scored.row, Path(scored.row["filename"]).stem
    files_of = {"": scored.enhanced, **{f"_{key}": image for key, image in scored.extra.items()}}
    for suffix, image in files_of.items():
        write_image(folder / f"{name}{suffix}.png", image)
    scores = f"{row['psnr']:.2f} dB  SSIM {row['ssim']:.3f}  dE {row['ciede2000']:.1f}"
    strip = triptych(scored[:3], (f"input {name}", "enhanced", "target"), scores)
    write_image(folder / f"{name}_viz.png", strip)
