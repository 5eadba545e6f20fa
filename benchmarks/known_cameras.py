"""How often enhancement says that a picture looks like no camera of the training.

    python benchmarks/known_cameras.py --known data/val/eliei/low --known data/val/lol/low \\
        --known data/val/sice/low --known data/val/bsds/low --base data/val/bsds/low

--known names held-out pictures of cameras that the weights were trained on: few of them should be
warned of. --base names well-exposed photographs, of which the sets are made that no training saw:
veils of other colours, false colours, negatives, drawings. Screens and noise are made here, and
scikit-image's own pictures, of microscopes, telescopes and textures, come with it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import skimage
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import gaussian_filter, sobel

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model_script import RELEASED  # noqa: E402
from support.checkpoints import load_checkpoint  # noqa: E402
from support.decoding import read_image  # noqa: E402
from support.known import Known, known_of  # noqa: E402
from support.metrics import GREY  # noqa: E402
from support.pairs import pictures_by_stem  # noqa: E402
from support.settings import UserError, complain  # noqa: E402
from support.simulated import darkened  # noqa: E402

SCIENCE = (
    *("cell", "hubble_deep_field", "immunohistochemistry", "microaneurysms", "moon", "retina"),
    *("page", "text", "coins", "brick", "grass", "gravel", "horse", "logo", "colorwheel"),
    *("checkerboard", "clock", "camera"),
)
THERMAL = ((0, 0, 20), (90, 0, 120), (200, 40, 60), (255, 160, 0), (255, 255, 200))
RAINBOW = ((0, 0, 130), (0, 120, 255), (60, 255, 180), (255, 200, 0), (130, 0, 0))
Make = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def levels(values: np.ndarray) -> np.ndarray:
    """uint8, three channels."""
    colour = values if values.ndim == 3 else np.repeat(values[..., None], 3, -1)
    return np.clip(np.rint(colour), 0, 255).astype(np.uint8)


def night(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """As an ordinary camera sees it in the dark."""
    return darkened(pixels, rng)[0]


def veil(*gains: float) -> Make:
    """A dark picture of one hue, each channel with noise of its own."""

    def make(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        grey = night(pixels, rng) @ GREY
        return levels(grey[..., None] * np.array(gains) + rng.normal(0, 1, pixels.shape))

    return make


def false_colours(stops: tuple[tuple[int, int, int], ...]) -> Make:
    """Brightness shown by a table of colours."""

    def make(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        places = np.linspace(0, 255, len(stops))
        columns = [np.interp(pixels @ GREY, places, column) for column in zip(*stops, strict=True)]
        return levels(np.stack(columns, -1))

    return make


def drawing(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Black lines where the edges are."""
    grey = gaussian_filter(pixels @ GREY, 1.5)
    edges = np.hypot(sobel(grey, 0), sobel(grey, 1))
    return levels(255.0 * (edges < np.quantile(edges, 0.9)))


def screen(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A window with a bar, a column and lines of text, light or dark."""
    dark = rng.random() < 0.5
    image = Image.new("RGB", (640, 420), (30, 30, 34) if dark else (250, 250, 250))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=int(rng.integers(9, 16)))
    draw.rectangle((0, 0, 640, 24), fill=tuple(int(v) for v in rng.integers(30, 220, 3)))
    shade = rng.integers(40, 70, 3) if dark else rng.integers(220, 245, 3)
    draw.rectangle((0, 24, int(rng.integers(60, 180)), 420), fill=tuple(int(v) for v in shade))
    for top in range(34, 406, int(rng.integers(14, 20))):
        words = "".join(rng.choice(list("abcdefghijklm nopqrstu"), int(rng.integers(0, 80))))
        draw.text((190, top), words, fill=(210,) * 3 if dark else (20,) * 3, font=font)
    return np.asarray(image)


def noise(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Grey or coloured noise."""
    shape = (300, 400, 3) if rng.random() < 0.5 else (300, 400)
    return levels(rng.normal(rng.uniform(20, 130), rng.uniform(5, 60), shape))


UNSEEN: dict[str, Make] = {
    "green night vision": veil(0.12, 1.0, 0.2),
    "blue veil": veil(0.15, 0.35, 1.0),
    "magenta veil": veil(1.0, 0.15, 0.9),
    "black and white, dark": lambda pixels, rng: levels(night(pixels, rng) @ GREY),
    "black and white, lit": lambda pixels, rng: levels(pixels @ GREY),
    "thermal colours": false_colours(THERMAL),
    "rainbow colours": false_colours(RAINBOW),
    "negative": lambda pixels, rng: 255 - pixels,
    "negative of a dark one": lambda pixels, rng: 255 - night(pixels, rng),
    "X-ray": lambda pixels, rng: levels(0.8 * (255 - 0.7 * (pixels @ GREY))),
    "red and blue swapped": lambda pixels, rng: pixels[..., ::-1],
    "drawing": drawing,
    "screen": screen,
    "noise": noise,
}


def science() -> list[np.ndarray]:
    """scikit-image's pictures that are no photographs in colour, and the middle of each."""
    found = []
    for name in SCIENCE:
        pixels = np.asarray(getattr(skimage.data, name)())
        pixels = levels(pixels * 255.0 if pixels.dtype == bool else pixels.astype(np.float32))
        height, width = pixels.shape[:2]
        middle = pixels[height // 4 : 3 * height // 4, width // 4 : 3 * width // 4]
        found += [pixels[..., :3], np.ascontiguousarray(middle[..., :3])]
    return found


def row(name: str, pictures: list[np.ndarray], known: Known) -> float:
    """Print the share that is warned of; returns it."""
    share = float(np.mean([known.strange(np.ascontiguousarray(one)) for one in pictures]))
    print(f"{name:28} {len(pictures):4} {share:8.1%}")
    return share


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", default=str(RELEASED))
    parser.add_argument("--known", action="append", default=[], metavar="FOLDER")
    parser.add_argument("--base", default="", metavar="FOLDER")
    arguments = parser.parse_args()
    try:
        known = known_of(load_checkpoint(arguments.checkpoint))
        if known is None:
            mend = "add it by benchmarks/add_looks.py"
            raise UserError(f"{arguments.checkpoint}: stores no looks of its training; {mend}")
        print(f"{'pictures':28} {'':>4} {'warned':>8}")
        for folder in arguments.known:
            files = pictures_by_stem(folder, "known").values()
            row("/".join(Path(folder).parts[-3:]), [read_image(path) for path in files], known)
        base = [read_image(p) for p in pictures_by_stem(arguments.base, "base").values()]
        rng = np.random.default_rng(0)
        row("simulated ordinary night", [night(pixels, rng) for pixels in base], known)
        print("never seen")
        shares = [row(name, [make(p, rng) for p in base], known) for name, make in UNSEEN.items()]
        shares.append(row("scikit-image's science", science(), known))
        print(f"{'mean of the sets':33} {np.mean(shares):8.1%}")
    except UserError as error:
        return complain(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
