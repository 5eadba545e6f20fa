"""What the test files share: the script on the path, small random models and data sets."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def smooth_scene(seed: int, height: int, width: int) -> np.ndarray:
    """A colourful (height, width, 3) uint8 picture; two seeds give pictures without correlation."""
    coarse = np.random.default_rng((977, seed)).uniform(0, 1, (6, 6, 3))
    coarse = (coarse - coarse.min()) / (coarse.max() - coarse.min())
    picture = Image.fromarray(np.rint(20 + 215 * coarse).astype(np.uint8))
    return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))


def write_pairs(
    folder: Path,
    count: int,
    size: tuple[int, int] = (32, 32),
    scenes: Sequence[int] | None = None,
    equal: bool = False,
) -> tuple[Path, Path]:
    """Write low/1.png, high/1.png, ... of `size` (height, width) and return the two folders.

    `scenes` gives the scene of each pair (default: all different). Takes of a scene differ in
    exposure and noise. `equal` makes every low the same picture as its high.
    """
    low_dir, high_dir = Path(folder) / "low", Path(folder) / "high"
    for created in (low_dir, high_dir):
        created.mkdir(parents=True, exist_ok=True)
    for place, scene in enumerate(range(count) if scenes is None else scenes):
        rng = np.random.default_rng((31, place))
        high = smooth_scene(scene, *size) * rng.uniform(0.6, 1.0) + rng.normal(0, 2, (*size, 3))
        low = high if equal else 0.1 * high + rng.normal(0, 1, high.shape)
        for target, pixels in ((low_dir, low), (high_dir, high)):
            Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8)).save(
                target / f"{place + 1}.png"
            )
    return low_dir, high_dir


def randomise(module: nn.Module, scale: float = 0.1, seed: int = 0) -> nn.Module:
    """Perturb every parameter and return the module.

    Also those that start at zero and would make the layer an identity.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            parameter.add_(scale * noise)
    return module


@pytest.fixture
def make_pairs(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """`write_pairs` into the test's own folder."""
    return lambda count, **options: write_pairs(tmp_path / "pairs", count, **options)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Sums come out the same in every run and in every process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
