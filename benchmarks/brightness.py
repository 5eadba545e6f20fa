"""How far a target's brightness follows from its dark picture, and how far a network finds it.

    python benchmarks/brightness.py --pairs LOW:HIGH [--score LOW:HIGH ...] [--checkpoint FILE]

Brightness is the binary logarithm of a picture's mean level, so that differences are in stops.
--pairs: its spread over all targets and, where a scene was taken at least three times (targets
whose 16x16 thumbnails correlate above 0.95), within a scene; and what is left of the latter after
the straight line in the brightness of low that fits best. --score: the root mean square error of
the network's brightness on these pairs, at their own size.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import model_script as ms  # noqa: E402
from support.commands import run  # noqa: E402
from support.pairs import PairStore, find_pairs  # noqa: E402
from support.processes import progress_style  # noqa: E402
from support.scenes import find_scenes  # noqa: E402
from support.settings import UserError  # noqa: E402

ALIKE, TAKES = 0.95, 3


def opened(text: str) -> PairStore:
    """The pairs of LOW:HIGH. Raises UserError."""
    low, _, high = text.partition(":")
    if not high:
        raise UserError(f"{text}: give two folders as LOW:HIGH")
    return PairStore(find_pairs(low, high, "train"), 0, False)


def brightness(pixels: np.ndarray) -> float:
    """log2 of the mean of uint8 or uint16 pixels, over the largest level."""
    return float(np.log2(pixels.mean() / np.iinfo(pixels.dtype).max))


def deviation(values: np.ndarray, groups: int = 1) -> float:
    """Standard deviation of values whose `groups` means were taken away."""
    return float(np.sqrt((values**2).sum() / (len(values) - groups)))


def within_scenes(low: np.ndarray, high: np.ndarray, scenes: Sequence[Sequence[int]]) -> str:
    """What the takes of one scene tell, in words; `low` and `high` are brightnesses."""
    many = [scene for scene in scenes if len(scene) >= TAKES]
    if not many:
        return f"no scene was taken {TAKES} times"
    dark = np.concatenate([low[scene] - low[scene].mean() for scene in many])
    lit = np.concatenate([high[scene] - high[scene].mean() for scene in many])
    left = lit - (lit * dark).sum() / (dark**2).sum() * dark
    count, alike = f"{len(many)} scenes of {len(lit)} takes", np.corrcoef(lit, dark)[0, 1]
    spread = [f"{deviation(values, len(many)):.2f}" for values in (lit, dark)]
    told = f"high {spread[0]}, low {spread[1]}, correlation {alike:.2f}"
    return f"within {count}: {told}, left {deviation(left, len(many) + 1):.2f}"


def error_of(loaded: ms.Loaded, store: PairStore) -> float:
    """Root mean square error of the enhanced pictures' brightness."""
    found = []
    for index in tqdm(range(len(store)), desc="enhancing", unit="image", **progress_style()):
        low, high = store[index]
        best = ms.enhance_pixels(loaded.choose(low)[0], low, loaded.use, loaded.runtime).best
        found.append(brightness(best) - brightness(high))
    return float(np.sqrt(np.square(found).mean()))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", required=True, metavar="LOW:HIGH")
    parser.add_argument("--score", action="append", default=[], metavar="LOW:HIGH")
    parser.add_argument("--checkpoint", default=str(ms.RELEASED))
    arguments = parser.parse_args(argv)

    def work() -> int:
        store = opened(arguments.pairs)
        scored = [(text, opened(text)) for text in arguments.score]
        pairs = [store[index] for index in range(len(store))]
        low, high = (np.array([brightness(pair[kind]) for pair in pairs]) for kind in (0, 1))
        apart = [f"{deviation(values - values.mean()):.2f}" for values in (high, low)]
        told = f"high {apart[0]}, low {apart[1]}, correlation {np.corrcoef(low, high)[0, 1]:.2f}"
        print(f"{len(pairs)} pairs, in stops: {told}")
        print(within_scenes(low, high, find_scenes(store.thumbnails, ALIKE)))
        loaded = ms.load_model(arguments.checkpoint, {}, ms.ConditionalFlow) if scored else None
        for text, one in scored:
            assert loaded is not None
            print(f"{text}: off by {error_of(loaded, one):.2f} on {len(one)} pairs")
        return 0

    return run(work)


if __name__ == "__main__":
    sys.exit(main())
