"""Known: whether a picture looks like those that the weights were trained on.

A look is what a 64x64 thumbnail says of a camera and its light: how bright, which colours and how
they go together, how much of it is fine. A picture is strange where the looks of the training
pictures are far from its own, further than almost all of them are from those of other scenes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from support.cameras import small_thumbnail
from support.pairs import PairStore
from support.scenes import find_scenes
from support.simulated import darkened

SIDE = 64  # of the thumbnail
LENGTH = 24  # of a look
SHRINKAGE = 0.3  # of the correlations towards none
NEIGHBOUR = 2  # the distance is that to the second nearest: one odd training picture is no camera
SHARE = 0.98  # of the training pictures that are nearer to another scene than the limit
FEWEST, FEWEST_SCENES, MOST = 40, 5, 2000  # pictures; fewer say too little, more cost too much


def bands(image: np.ndarray) -> list[np.ndarray]:
    """What an (s, s) image loses when its side is halved, again and again down to 4."""
    found = []
    while len(image) > 4:
        half = image.reshape(len(image) // 2, 2, -1, 2).mean((1, 3))
        found.append(image - np.kron(half, np.ones((2, 2), np.float32)))
        image = half
    return found


def log_deviation(image: np.ndarray) -> float:
    """log2 of the root mean square, from -6.6 on."""
    return float(np.log2(np.sqrt((image**2).mean()) + 0.01))


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Of two images, near 0 where one of them is flat."""
    a, b = a - a.mean(), b - b.mean()
    spread = ((a**2).mean() + 0.01) * ((b**2).mean() + 0.01)
    return float((a * b).mean() / np.sqrt(spread))


def look_of(pixels: np.ndarray) -> np.ndarray:
    """(24,) float32 of (H, W, 3) uint8 or uint16 pixels; stops and correlations."""
    levels = small_thumbnail(pixels, SIDE)
    red, green, blue = np.moveaxis(np.log2(levels.astype(np.float32) + 2), -1, 0)
    light, warm, cold = (red + green + blue) / 3, red - green, blue - green
    fine, chroma = bands(light), [bands(warm), bands(cold)]
    found = [*np.quantile(light, (0.02, 0.25, 0.5, 0.75, 0.98))]
    found += [share for cast in (warm, cold) for share in np.quantile(cast, (0.05, 0.5, 0.95))]
    found += [log_deviation(band) for band in fine]
    found += [log_deviation(band[scale]) for band in chroma for scale in (0, 2)]
    found.append(float(np.log2(np.abs(fine[0]).mean() + 0.003)) - log_deviation(fine[0]))
    found += [correlation(warm, cold), correlation(warm, light), correlation(cold, light)]
    equal = [
        (a == b).all(-1).mean()
        for a, b in ((levels[1:], levels[:-1]), (levels[:, 1:], levels[:, :-1]))
    ]
    found.append(float(np.log2(np.mean(equal) + 0.02)))  # screens and drawings
    return np.array(found, np.float32)


def whitening(looks: np.ndarray) -> np.ndarray:
    """(D, D) W, by which (N, D) looks @ W have about deviation 1 and no correlation."""
    deviation = np.maximum(looks.std(0), 0.05)  # what never differs must not decide
    correlations = np.atleast_2d(np.cov((looks / deviation).T))
    shrunk = (1 - SHRINKAGE) * correlations + SHRINKAGE * np.eye(len(deviation))
    values, vectors = np.linalg.eigh(shrunk)
    return (vectors / np.sqrt(values) / deviation[:, None]).astype(np.float32)


def squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(N, M) of (N, D) and (M, D)."""
    middle = b.mean(0)  # or large values would cost the small differences their digits
    a, b = a - middle, b - middle
    return np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T, 0)


def to_neighbour(squared: np.ndarray) -> np.ndarray:
    """(N,) the distance to the second nearest, of (N, M) squared ones."""
    return np.sqrt(np.partition(squared, NEIGHBOUR - 1, axis=1)[:, NEIGHBOUR - 1])


def distances(looks: np.ndarray, scenes: np.ndarray) -> np.ndarray:
    """(N,) how far each of (N, 24) looks is from those of other scenes, numbered by (N,)."""
    white = looks @ whitening(looks)
    squared = squared_distances(white, white)
    squared[scenes[:, None] == scenes] = np.inf
    return to_neighbour(squared)


def fitted(looks: np.ndarray, scenes: np.ndarray, own: int = 0) -> dict[str, Tensor] | None:
    """What a checkpoint stores: (N, 24) looks, (N,) numbers of their scenes, and the limit, which
    the last `own` of them keep to, however few they are. None where all are too few."""
    if len(looks) < FEWEST or len(np.unique(scenes)) < FEWEST_SCENES:
        return None
    apart = distances(looks, scenes)
    limit = np.quantile(apart, SHARE)
    if own:
        limit = max(limit, np.quantile(apart[-own:], SHARE))
    if not np.isfinite(limit):  # of fewer than two pictures outside a scene
        return None
    stored = (looks.astype(np.float32), scenes.astype(np.int32), np.float32(limit))
    names = ("looks", "scenes", "limit")
    return {k: torch.from_numpy(np.asarray(v)) for k, v in zip(names, stored, strict=True)}


def looks_in(
    store: PairStore, similarity: float, dark: Collection[str] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """(N, 24) looks of the dark pictures of `store`, or of 2000 of them, and (N,) their scenes.

    Pictures of the sources `dark` count darkened, too. `similarity` tells scenes, see
    `find_scenes`.
    """
    rng = np.random.default_rng(0)
    scenes = np.zeros(len(store), int)
    for number, members in enumerate(find_scenes(store.thumbnails, similarity)):
        scenes[members] = number
    chosen = np.sort(rng.permutation(len(store))[:MOST])
    looks, places = list[np.ndarray](), list[int]()
    for index in chosen.tolist():
        low, high = store[index]
        looks.append(look_of(low))
        places.append(index)
        if store.pairs[index].source in dark:
            looks.append(look_of(darkened(high, rng)[0]))
            places.append(index)
    return np.stack(looks), scenes[places]


def extended(stored: Any, looks: np.ndarray, scenes: np.ndarray) -> dict[str, Tensor] | None:
    """`fitted` of what a checkpoint stores, if it does, and further looks and their scenes."""
    if not sound(stored):
        return fitted(looks, scenes)
    first = int(stored["scenes"].max()) + 1
    both = np.concatenate([stored["looks"].float().numpy(), looks])
    numbers = np.concatenate([stored["scenes"].numpy(), first + scenes])
    return fitted(both, numbers, own=len(looks))


def sound(stored: Any) -> bool:
    """Whether `stored` is what `fitted` gives; it may come from a stranger's checkpoint."""
    if type(stored) is not dict or not {"looks", "scenes", "limit"} <= stored.keys():
        return False
    looks, scenes, limit = (stored[name] for name in ("looks", "scenes", "limit"))
    if not all(isinstance(part, Tensor) and part.is_contiguous() for part in stored.values()):
        return False
    shapes = looks.ndim == 2 and looks.shape[1:] == (LENGTH,) and limit.ndim == 0
    kinds = (scenes.dtype, limit.dtype) == (torch.int32, torch.float32)
    kinds = kinds and looks.dtype in (torch.float32, torch.float16)
    if not (shapes and kinds and scenes.shape == looks.shape[:1]):
        return False
    size = FEWEST <= len(looks) <= 20 * MOST
    return size and bool(looks.isfinite().all() and looks.abs().max() < 1e3 and limit > 0)


class Known:
    """The looks of the pictures that weights were trained on."""

    def __init__(self, stored: Mapping[str, Tensor]) -> None:
        looks = stored["looks"].float().numpy()
        self.white = whitening(looks)
        self.looks, self.limit = looks @ self.white, float(stored["limit"])

    def distance(self, pixels: np.ndarray) -> float:
        """How far (H, W, 3) uint8 or uint16 pixels are from training pictures; 1 is the limit."""
        look = look_of(pixels)[None] @ self.white
        return float(to_neighbour(squared_distances(look, self.looks))[0]) / self.limit

    def strange(self, pixels: np.ndarray) -> bool:
        """Whether (H, W, 3) uint8 or uint16 pixels look like no training picture."""
        return self.distance(pixels) > 1


def known_of(checkpoint: Mapping[str, Any]) -> Known | None:
    """What a checkpoint says of its training pictures' looks; None where it does not."""
    stored: Any = checkpoint.get("known")
    return Known(stored) if sound(stored) else None
