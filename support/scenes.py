"""Scenes: which targets show the same, told by their thumbnails (N, 16, 16, 3) uint8."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from support.settings import UserError


def find_scenes(thumbnails: np.ndarray, similarity: float) -> list[list[int]]:
    """Groups of indices whose (N, 16, 16, 3) thumbnails are alike, chained: no scene falls apart.

    Alike means a Pearson correlation of at least `similarity`; it ignores exposure, which differs
    between takes.
    """
    from scipy.sparse.csgraph import connected_components  # seldom wanted, and slow to import

    with np.errstate(invalid="ignore"):  # a picture of one colour correlates with nothing: NaN
        correlation = np.corrcoef(thumbnails.reshape(len(thumbnails), -1))
    alike = np.atleast_2d(correlation) >= similarity
    labels = connected_components(alike, directed=False)[1]
    return [np.flatnonzero(labels == label).tolist() for label in range(labels.max() + 1)]


def split_by_scene(
    thumbnails: np.ndarray, fraction: float, similarity: float, seed: int
) -> tuple[list[int], list[int]]:
    """(training, validation) indices: whole scenes, drawn by `seed`, until `fraction` is reached.

    Raises UserError where there is one scene only.
    """
    scenes = find_scenes(thumbnails, similarity)
    if len(scenes) < 2:
        hint = "name val_low_dir and val_high_dir instead"
        raise UserError(f"val_fraction: all training pairs show one scene; {hint}")
    wanted = max(1, round(fraction * len(thumbnails)))
    order = np.random.default_rng(seed).permutation(len(scenes))
    validation: list[int] = []
    for scene in [scenes[place] for place in order[:-1]]:
        if len(validation) < wanted and len(validation) + len(scene) <= max(wanted, len(scene)):
            validation += scene
    return sorted(set(range(len(thumbnails))) - set(validation)), sorted(validation)


def find_twins(thumbnails: np.ndarray, others: np.ndarray, tolerance: float = 2.0) -> np.ndarray:
    """For each of (N, 16, 16, 3) uint8 thumbnails whether one of `others` is the same picture: a
    mean absolute difference of at most `tolerance` levels."""
    if len(others) == 0:
        return np.zeros(len(thumbnails), bool)
    known = others.astype(np.float32)
    return np.array([np.abs(known - one).mean((1, 2, 3)).min() <= tolerance for one in thumbnails])


def seen_scenes(thumbnails: np.ndarray, others: np.ndarray, similarity: float) -> np.ndarray:
    """For each of (N, 16, 16, 3) thumbnails whether one of `others` correlates with it by at least
    `similarity`: another take of its scene."""
    if len(others) == 0:
        return np.zeros(len(thumbnails), bool)
    both = np.concatenate([thumbnails, others])
    with np.errstate(invalid="ignore"):  # as in find_scenes
        correlation = np.corrcoef(both.reshape(len(both), -1))
    return (correlation[: len(thumbnails), len(thumbnails) :] >= similarity).any(1)


def known_thumbnails(checkpoint: Mapping[str, Any], key: str) -> np.ndarray | None:
    """The (N, 16, 16, 3) uint8 thumbnails that a checkpoint holds under `key`; None for none, and
    for what is no such thing."""
    past = checkpoint.get(key)
    if (
        not isinstance(past, Tensor)
        or past.dtype != torch.uint8
        or past.shape[1:] != (16, 16, 3)
        or not past.is_contiguous()
    ):
        return None
    return past.numpy()


def training_twins(thumbnails: np.ndarray, checkpoint: dict[str, Any]) -> list[bool | None]:
    """For each target whether it is among the checkpoint's training pictures; None where that
    is not known."""
    past = known_thumbnails(checkpoint, "training_thumbnails")
    if past is None:
        print("twins: the checkpoint does not say what it was trained on; no pair is flagged")
        return [None] * len(thumbnails)
    return [bool(twin) for twin in find_twins(thumbnails, past)]
