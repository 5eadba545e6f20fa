"""What the benchmarks on evaluation pairs share: arguments, model, and the pairs in turn."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import model_script as ms  # noqa: E402
from support.pairs import evaluation_pairs  # noqa: E402
from support.pictures import to_tensor  # noqa: E402
from support.runtime import Runtime  # noqa: E402
from support.settings import UserError, complain, read_all  # noqa: E402


class Bench(NamedTuple):
    """A loaded model and the evaluation pairs, (H, W, 3) uint8 low and high."""

    loaded: ms.Loaded
    use: ms.Use
    runtime: Runtime
    store: ms.PairStore

    def model(self, low: np.ndarray) -> ms.ConditionalFlow:
        """The network that is for `low`."""
        return self.loaded.choose(low)[0]

    def pairs(self) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """(name, low, high) in order."""
        for index, pair in enumerate(self.store.pairs):
            yield (pair.low.name, *self.store[index])


def open_bench(description: str | None) -> Bench:
    """Reads --checkpoint and --set from the command line.

    eval_low_dir, eval_high_dir and scenes name the pairs.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", default=str(ms.RELEASED))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    try:
        given = read_all((ms.Config, ms.Use), None, arguments.set, ())
        loaded = ms.load_model(arguments.checkpoint, given, ms.ConditionalFlow)
        use, skip = loaded.use, loaded.use.on_bad_file == "skip"
        room = use.cache_megabytes * 2**20
        store = ms.PairStore(evaluation_pairs(use), room, skip)
    except UserError as error:
        sys.exit(complain(error))
    return Bench(loaded, use, loaded.runtime, store)


def batch(pixels: np.ndarray, bench: Bench) -> Tensor:
    """(1, 3, H, W) in [0, 1] on the model's device."""
    return to_tensor(pixels)[None].to(bench.runtime.device)


@torch.no_grad()
def enhance(bench: Bench, low: np.ndarray) -> np.ndarray:
    """(H, W, 3) float64 in [0, 1]: the best answer."""
    return ms.enhance_pixels(bench.model(low), low, bench.use, bench.runtime).best / 65535
