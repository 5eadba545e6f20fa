"""Lines that the model makes by itself: along the edges of a picture, and between two rows.

    python benchmarks/edges.py --pairs data/val/eliei --pairs data/val/lol --pairs data/val/sice

A step is how far the outermost row or column is from the mean of the third to fifth, both averaged
over 31 pixels along the edge, in levels of 255: the mean over the four edges. It is given with and
without the mirrored rim, beside the scores. Rows are by how much even rows differ from odd ones
over the flattest tenth of the target's blocks of 16x16, in levels: the mean over the channels.

Then a picture of one colour is enhanced, whose rows should all be alike: by how many levels even
rows differ from odd ones, red, green and blue, and the same of columns. That pattern is made by the
model alone. --pairs may be left out.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from scipy.ndimage import uniform_filter1d

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import model_script as ms  # noqa: E402
from support.decoding import read_image  # noqa: E402
from support.metrics import image_metrics  # noqa: E402
from support.pairs import find_pairs  # noqa: E402
from support.plans import spread  # noqa: E402
from support.settings import UserError, complain  # noqa: E402

COLOURS = ((6, 5, 5), (16, 15, 13), (30, 12, 10), (40, 38, 35), (120, 120, 110), (200, 205, 210))


def step(image: np.ndarray) -> float:
    """Of an (H, W, 3) picture in [0, 1]."""
    turned = image.swapaxes(0, 1)
    found = []
    for side in (image, image[::-1], turned, turned[::-1]):
        difference = uniform_filter1d(side[0] - side[2:5].mean(0), 31, axis=0)
        found.append(np.abs(difference).mean() * 255)
    return float(np.mean(found))


def blocks(image: np.ndarray, side: int = 16) -> np.ndarray:
    """(H, W, 3) -> (N, side, side, 3), without what is left over at the right and below."""
    high, wide = (length // side for length in image.shape[:2])
    cut = image[: high * side, : wide * side].reshape(high, side, wide, side, 3)
    return cut.swapaxes(1, 2).reshape(-1, side, side, 3)


def row_difference(image: np.ndarray, target: np.ndarray) -> float:
    """Of even rows and odd ones where the target is flat; (H, W, 3) pictures in [0, 1]."""
    deviation = blocks(target).std((1, 2)).mean(1)
    flat = blocks(image)[deviation <= np.quantile(deviation, 0.1)]
    difference = (flat[:, ::2] - flat[:, 1::2]).mean((0, 1, 2))
    return float(np.abs(difference).mean() * 255)


def pattern(loaded: ms.Loaded, model: ms.ConditionalFlow, colour: tuple[int, ...]) -> np.ndarray:
    """(2, 3): even rows less odd ones, and columns, in levels, in the middle of a picture of one
    `colour`."""
    flat = np.full((256, 256, 3), colour, np.uint8)
    middle = ms.enhance_pixels(model, flat, loaded.use, loaded.runtime).best[96:160, 96:160] / 257
    lines = (middle.mean(1), middle.mean(0))
    return np.stack([line[::2].mean(0) - line[1::2].mean(0) for line in lines])


def main() -> int:
    """Print a line for each folder, with and without the rim, and one for each colour."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", default=str(ms.RELEASED))
    parser.add_argument("--pairs", action="append", default=[], metavar="FOLDER")
    parser.add_argument("--count", type=int, default=8)
    arguments = parser.parse_args()
    try:
        loaded = ms.load_model(arguments.checkpoint, {}, ms.ConditionalFlow)
        lines_of = " ".join(f"{name:>6}" for name in ("step", "target", "rows", "target"))
        print(f"{'pairs':16} {'rim':>4} {lines_of} {'PSNR':>8} {'SSIM':>8}")
        for folder in arguments.pairs:
            pairs = find_pairs(f"{folder}/low", f"{folder}/high", "eval")
            rows: dict[int, list[list[float]]] = {0: [], ms.RIM: []}
            for place in spread(len(pairs), arguments.count):
                low, high = read_image(pairs[place].low), read_image(pairs[place].high) / 255.0
                model, _ = loaded.choose(low)
                for rim, found in rows.items():
                    vars(ms)["RIM"] = rim
                    best = ms.enhance_pixels(model, low, loaded.use, loaded.runtime).best
                    enhanced = np.rint(best / 257) / 255
                    scores = image_metrics(enhanced, high)
                    lines = [step(enhanced), step(high)]
                    lines += [row_difference(image, high) for image in (enhanced, high)]
                    found.append([*lines, scores["psnr"], scores["ssim"]])
            for rim, found in rows.items():
                *lines, psnr, ssim = np.mean(found, axis=0)
                name = "/".join(Path(folder).parts[-2:])
                told = " ".join(f"{value:6.2f}" for value in lines)
                print(f"{name:16} {rim:4} {told} {psnr:8.3f} {ssim:8.4f}", flush=True)
        networks = {"ordinary": loaded.model, "infrared": loaded.infrared or loaded.model}
        for name, network in networks.items():
            for colour in COLOURS:
                rows_of, columns = np.round(pattern(loaded, network, colour), 1)
                print(f"{name} {colour}: rows {rows_of}, columns {columns}", flush=True)
    except UserError as error:
        return complain(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
