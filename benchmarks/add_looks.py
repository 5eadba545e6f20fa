"""Adds to a checkpoint what the pictures look like that it was trained on.

    python benchmarks/add_looks.py --checkpoint checkpoints/released.pth \\
        --pictures data/train/eliei/low --pictures data/train/lol/low \\
        --pictures data/train/sice/low --pictures data/train/bsds/low --darken data/train/bsds/high

By that enhancement says of a picture that it looks like none of them (support/known.py). A training
stores it by itself; this is for weights that are older. --darken adds well-exposed pictures as a
simulated ordinary camera sees them in the dark. All else in the file stays as it is, which is
checked.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from support.cameras import small_thumbnail  # noqa: E402
from support.checkpoints import load_checkpoint, save_checkpoint  # noqa: E402
from support.decoding import read_image  # noqa: E402
from support.known import fitted, look_of  # noqa: E402
from support.pairs import pictures_by_stem  # noqa: E402
from support.scenes import find_scenes  # noqa: E402
from support.settings import UserError, complain  # noqa: E402
from support.simulated import darkened  # noqa: E402

SIMILARITY = 0.85  # of pictures that show one scene, as in a training


def looks_of(folders: Sequence[str], darken: Sequence[str]) -> dict[str, Tensor]:
    """What `support.known.fitted` gives of the pictures in `folders` and of those in `darken`, as
    they look in the dark. Raises UserError where they are too few."""
    rng, looks, small = np.random.default_rng(0), list[np.ndarray](), list[np.ndarray]()
    for folder, dark in [(name, False) for name in folders] + [(name, True) for name in darken]:
        for path in pictures_by_stem(folder, "darken" if dark else "pictures").values():
            pixels = read_image(path)
            seen = darkened(pixels, rng)[0] if dark else pixels
            looks.append(look_of(seen))
            small.append(small_thumbnail(pixels, 16))
    scenes = np.zeros(len(looks), int)
    for number, members in enumerate(find_scenes(np.stack(small), SIMILARITY)):
        scenes[members] = number
    found = fitted(np.stack(looks), scenes)
    if found is None:
        raise UserError("--pictures: are too few to tell what is strange; name more")
    return found


def same(a: Any, b: Any) -> bool:
    """Whether two contents of checkpoints are equal, tensors bit for bit."""
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    return bool(a == b)


def main() -> int:
    """Read, add, write, compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True)
    for name in ("pictures", "darken"):
        parser.add_argument(f"--{name}", action="append", default=[], metavar="FOLDER")
    arguments = parser.parse_args()
    try:
        if not arguments.pictures:
            raise UserError("--pictures: name the folders of the dark training pictures")
        before = load_checkpoint(arguments.checkpoint)
        known = looks_of(arguments.pictures, arguments.darken)
        save_checkpoint(Path(arguments.checkpoint), before | {"known": known})
        after = load_checkpoint(arguments.checkpoint)
    except UserError as error:
        return complain(error)
    for content in (before, after):
        content.pop("known", None)
    assert same(before, after), "the rest of the file changed"
    size = Path(arguments.checkpoint).stat().st_size / 1e6
    told = f"{len(known['looks'])} looks, limit {float(known['limit']):.2f}"
    print(f"{arguments.checkpoint}: {told}; {size:.1f} MB, all else as it was")
    return 0


if __name__ == "__main__":
    sys.exit(main())
