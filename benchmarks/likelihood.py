"""Does the likelihood know which input belongs to a target?

    python benchmarks/likelihood.py [--checkpoint FILE] \\
        [--set eval_low_dir=... --set eval_high_dir=...]

Prints bits per dimension of every evaluation target, twice: given its own input, and given the
input of the pair half-way round the list.
"""

from __future__ import annotations

import numpy as np
import torch
from eval_pairs import batch, open_bench

from support.pictures import resize


@torch.no_grad()
def main() -> None:
    """Print both means and how often the right one is lower."""
    bench = open_bench(__doc__)
    pairs = list(bench.pairs())
    bits = []
    for index, (_, low, high) in enumerate(pairs):
        wrong = resize(
            batch(pairs[(index + len(pairs) // 2) % len(pairs)][1], bench), high.shape[:2]
        )
        model = bench.model(low)
        torch.manual_seed(model.config.seed)
        with bench.runtime.autocast():
            right_bits = model.bits_per_dim(batch(high, bench), batch(low, bench))[0]
        torch.manual_seed(model.config.seed)  # the same dequantisation noise
        with bench.runtime.autocast():
            wrong_bits = model.bits_per_dim(batch(high, bench), wrong)[0]
        bits.append((float(right_bits), float(wrong_bits)))
    right, wrong = np.array(bits).T
    print(
        f"{len(bits)} pairs, bits per dimension: right low {right.mean():.3f}, wrong low"
        f" {wrong.mean():.3f}"
    )
    print(
        f"the right one is lower on {100 * (right < wrong).mean():.1f} % of pairs; least margin"
        f" {(wrong - right).min():.3f}"
    )


if __name__ == "__main__":
    main()
