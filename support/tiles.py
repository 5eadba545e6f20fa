"""Tiles: how a large picture is divided, what lies around it, and noise that knows no tiles."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class Tile(NamedTuple):
    """A part of a picture: what it is responsible for, and that with its halo, as (top, bottom,
    left, right) in pixels."""

    core: tuple[int, int, int, int]
    outer: tuple[int, int, int, int]


def plan_tiles(height: int, width: int, side: int, halo: int) -> list[Tile]:
    """Overlapping tiles of one size, at most `side` and two halos, whose cores cover the picture
    without overlap.

    They start at multiples of 8, where the model's strides fall on the same pixels as in the whole
    picture, and lie evenly; one size, because every further size costs the convolutions' library
    further memory.
    """

    # core begin and end, outer begin and end
    def cuts(length: int) -> list[tuple[int, int, int, int]]:
        padded = math.ceil(length / 8) * 8
        count = max(1, math.ceil((padded - 2 * halo) / side))
        extent = padded if count == 1 else math.ceil((padded - 2 * halo) / count / 8) * 8 + 2 * halo
        starts = [
            round(place * (padded - extent) / max(1, count - 1) / 8) * 8 for place in range(count)
        ]
        middles = [(before + extent + after) // 2 for before, after in itertools.pairwise(starts)]
        bounds = itertools.pairwise([0, *middles, length])
        return [
            (*core, start, min(start + extent, length))
            for core, start in zip(bounds, starts, strict=True)
        ]

    rows, columns = cuts(height), cuts(width)
    return [
        Tile((*row[:2], *column[:2]), (*row[2:], *column[2:])) for row in rows for column in columns
    ]


RIM, NO_RIM = 8, (0, 0, 0, 0)  # pixels: a multiple of 8, where the model's strides fall alike


def pad_to_multiple(image: Tensor, multiple: int = 8) -> Tensor:
    """Repeat the last row and column until both sides divide by `multiple`."""
    height, width = image.shape[-2:]
    return F.pad(image, (0, -width % multiple, 0, -height % multiple), mode="replicate")


def with_rim(low: Tensor, box: Tensor, rim: Sequence[int]) -> tuple[Tensor, Tensor]:
    """`low` (B, 3, H, W) with (left, right, top, bottom) mirrored pixels around it and, to the
    right and down, up to multiples of 8; and its box (B, 4), which grows with it.

    The convolutions take zeros for what lies outside, and few crops of a training end where a
    picture does: without a rim its outermost lines differ from the next ones.
    """
    size, left, top = low.shape[-2:], rim[0], rim[2]
    low = F.pad(low, tuple(rim), mode="reflect") if any(rim) else low
    low = pad_to_multiple(low)
    after = (low.shape[-1] - left - size[1]) / size[1], (low.shape[-2] - top - size[0]) / size[0]
    grown = box.new_tensor([-left / size[1], -top / size[0], *after])
    return low, box + grown * (box[:, 2:] - box[:, :2]).repeat(1, 2)


NOISE_BLOCK = 64


def latent_noise(seed: Sequence[int], top: int, left: int, height: int, width: int) -> Tensor:
    """(1, 48, height, width) standard normal values of an endless field, from latent position (top,
    left) on.

    Whatever the tiles, a position has the same value: the field is made of blocks, each seeded by
    its place.
    """
    n = NOISE_BLOCK
    rows = [
        np.concatenate(
            [
                np.random.default_rng((*seed, y, x)).standard_normal((48, n, n), dtype=np.float32)
                for x in range(left // n, (left + width - 1) // n + 1)
            ],
            axis=2,
        )
        for y in range(top // n, (top + height - 1) // n + 1)
    ]
    field = np.concatenate(rows, axis=1)[:, top % n : top % n + height, left % n : left % n + width]
    return torch.from_numpy(np.ascontiguousarray(field))[None]
