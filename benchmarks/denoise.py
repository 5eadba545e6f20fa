"""What `denoise` does to held-out pairs: noise in flat zones, and the scores against the target.

    python benchmarks/denoise.py --pairs data/val/lol --pairs data/val/eliei --count 12

Each folder of --pairs holds low/ and high/; `count` pairs of it are taken, evenly.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import model_script as ms  # noqa: E402
from support.decoding import read_image  # noqa: E402
from support.metrics import image_metrics  # noqa: E402
from support.no_reference import noise_flat  # noqa: E402
from support.pairs import find_pairs  # noqa: E402
from support.pictures import calmed  # noqa: E402
from support.plans import spread  # noqa: E402
from support.settings import UserError, complain  # noqa: E402

STRENGTHS = (0.0, 0.5, 1.0)


def scores_of(best: np.ndarray, high: np.ndarray, strength: float) -> list[float]:
    """PSNR, SSIM, noise in flat zones, and the seconds that it took."""
    started = time.perf_counter()
    calm = calmed(best, strength)
    seconds = time.perf_counter() - started
    enhanced = np.rint(calm / 257) / 255
    found = image_metrics(enhanced, high / 255.0)
    return [found["psnr"], found["ssim"], noise_flat(enhanced), seconds]


def main() -> int:
    """Print a line for each folder and strength."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", default=str(ms.RELEASED))
    parser.add_argument("--pairs", action="append", required=True, metavar="FOLDER")
    parser.add_argument("--count", type=int, default=12)
    arguments = parser.parse_args()
    try:
        loaded = ms.load_model(arguments.checkpoint, {}, ms.ConditionalFlow)
        print(f"{'pairs':16} {'denoise':>7} {'PSNR':>7} {'SSIM':>7} {'noise':>7} {'seconds':>7}")
        for folder in arguments.pairs:
            pairs = find_pairs(f"{folder}/low", f"{folder}/high", "eval")
            rows: dict[float, list[list[float]]] = {strength: [] for strength in STRENGTHS}
            for place in spread(len(pairs), arguments.count):
                low, high = read_image(pairs[place].low), read_image(pairs[place].high)
                model, _ = loaded.choose(low)
                best = ms.enhance_pixels(model, low, loaded.use, loaded.runtime).best
                for strength in STRENGTHS:
                    rows[strength].append(scores_of(best, high, strength))
            for strength, found in rows.items():
                psnr, ssim, noise, seconds = np.mean(found, axis=0)
                name = "/".join(Path(folder).parts[-2:])
                told = f"{psnr:7.2f} {ssim:7.4f} {noise:7.2f} {seconds:7.2f}"
                print(f"{name:16} {strength:7} {told}", flush=True)
    except UserError as error:
        return complain(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
