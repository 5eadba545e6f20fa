"""What holds a model back?

    python benchmarks/limits.py --checkpoint FILE [--every 4] [--set KEY=VALUE ...]

Scores every --every-th training pair and all validation pairs of the split that the weights were
trained with, whole and at native size. Then it scores the validation outputs blurred, sharpened,
and with all that is coarser than a Gaussian taken from the target, which tells how much of the
error is coarse, fine or noise. Data: train_low_dir and train_high_dir. Evaluation pictures play no
part.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import model_script as ms  # noqa: E402
from support.commands import run, shipped  # noqa: E402
from support.metrics import GREY, match_mean, psnr_of, ssim_of  # noqa: E402
from support.pairs import training_data  # noqa: E402
from support.settings import read_all  # noqa: E402


def blurred(image: np.ndarray, sigma: float) -> np.ndarray:
    """(H, W, 3) under a Gaussian of `sigma` pixels."""
    return gaussian_filter(image, (sigma, sigma, 0), mode="nearest")


def altered(enhanced: np.ndarray, high: np.ndarray) -> dict[str, np.ndarray]:
    """The output by what was done to it."""
    made = {f"blurred, sigma {sigma}": blurred(enhanced, sigma) for sigma in (0.5, 1.0)}
    made |= {
        f"sharpened by {share}": enhanced + share * (enhanced - blurred(enhanced, 1.0))
        for share in (0.3, 0.6)
    }
    coarse = {
        sigma: enhanced - blurred(enhanced, sigma) + blurred(high, sigma) for sigma in (2, 8, 32)
    }
    return made | {
        f"coarser than sigma {sigma} from the target": image for sigma, image in coarse.items()
    }


def main() -> int:
    """Print a line for each kind of picture.

    Pairs, PSNR, SSIM, GT-mean PSNR, |log2| of the brightness ratio.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=shipped, default=str(ms.RELEASED))
    parser.add_argument("--every", type=int, default=4)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    if arguments.every < 1:
        parser.error("--every must be at least 1")
    return run(lambda: measure(arguments))


def measure(arguments: argparse.Namespace) -> int:
    """Raises UserError."""
    given = read_all((ms.Config, ms.Use), None, arguments.set, ())
    loaded = ms.load_model(arguments.checkpoint, given, ms.ConditionalFlow)
    use, runtime = loaded.use, loaded.runtime
    store, training, held_out, validation = training_data(loaded.model.config, use)
    rows = defaultdict(list)
    for kind, pairs, chosen in (
        ("training", store, training[:: arguments.every]),
        ("validation", held_out, validation),
    ):
        for index in chosen:
            low, high = pairs[index]
            model, _ = loaded.choose(low)
            output = ms.enhance_pixels(model, low, use, runtime).best / 65535
            target = high / 255
            pictures = {kind: output} | (altered(output, target) if kind == "validation" else {})
            for name, picture in pictures.items():
                picture = picture.clip(0, 1)
                stops = abs(np.log2((picture @ GREY).mean() / (target @ GREY).mean()))
                helped = psnr_of(match_mean(picture, target), target)
                rows[name].append(
                    (psnr_of(picture, target), ssim_of(picture, target), helped, stops)
                )
    for name, scores in rows.items():
        psnr, ssim, helped, stops = np.mean(scores, axis=0)
        print(
            f"{name:42} {len(scores):3} pairs  {psnr:.2f} dB  SSIM {ssim:.3f}  GT-mean {helped:.2f}"
            f" dB  {stops:.3f} stops"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
