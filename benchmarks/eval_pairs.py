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
from support.pictures import to_tensor  # noqa: E402
from support.runtime import Runtime  # noqa: E402
from support.settings import UserError, complain  # noqa: E402


class Bench(NamedTuple):
    """A loaded model and the evaluation pairs, (H, W, 3) uint8 low and high."""

    model: ms.ConditionalFlow
    config: ms.Config
    runtime: Runtime
    store: ms.PairStore

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
    parser.add_argument("--checkpoint", default=str(ms.RELEASE))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    try:
        settings = ms.typed_settings(
            ms.Config(), dict(ms.parse_assignment(t, ms.Config) for t in arguments.set), "--set"
        )
        model, config, runtime, _ = ms.load_model(
            arguments.checkpoint, settings, ms.ConditionalFlow, ms.Config
        )
        store = ms.PairStore(ms.evaluation_pairs(config), config)
    except UserError as error:
        sys.exit(complain(error))
    return Bench(model, config, runtime, store)


def batch(pixels: np.ndarray, bench: Bench) -> Tensor:
    """(1, 3, H, W) in [0, 1] on the model's device."""
    return to_tensor(pixels)[None].to(bench.runtime.device)


@torch.no_grad()
def enhance(bench: Bench, low: np.ndarray) -> np.ndarray:
    """(H, W, 3) float64 in [0, 1]: the best answer."""
    return ms.enhance_pixels(bench.model, low, bench.config, bench.runtime).best / 65535
