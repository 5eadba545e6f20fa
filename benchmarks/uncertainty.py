"""Does the uncertainty map mean something? Its rank correlation with the error that was made.

    python benchmarks/uncertainty.py [--checkpoint FILE] \\
        [--set eval_low_dir=... --set eval_high_dir=...] [--set samples=16]

For every evaluation pair: Spearman correlation over pixels between the deviation over samples and
the absolute error of the best answer, both blurred by a Gaussian of 8 pixels. Needs SciPy, which
scikit-image brings.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import scipy.ndimage
import scipy.stats
from eval_pairs import open_bench

import model_script as ms


def main() -> None:
    """Print the mean, the least and the correlation between pictures."""
    bench = open_bench(__doc__)
    use = dataclasses.replace(bench.use, uncertainty=True)
    within, deviations, errors = [], [], []
    for _, low, high in bench.pairs():
        found = ms.enhance_pixels(bench.model(low), low, use, bench.runtime)
        assert found.deviation is not None
        error = np.abs(found.best / 65535 - high / 255).mean(-1)
        blurred = [
            scipy.ndimage.gaussian_filter(image.astype(np.float64), 8)
            for image in (found.deviation, error)
        ]
        within.append(scipy.stats.spearmanr(*(image[::4, ::4].ravel() for image in blurred))[0])
        deviations.append(found.deviation.mean())
        errors.append(error.mean())
    between = scipy.stats.spearmanr(deviations, errors)[0]
    print(
        f"{len(within)} pairs: Spearman within a picture, mean {np.mean(within):.3f}, least"
        f" {np.min(within):.3f}"
    )
    print(f"between pictures (mean deviation against mean error): {between:.3f}")


if __name__ == "__main__":
    main()
