"""Makes the README's first picture, docs/enhanced.jpg, with the default weights.

    python docs/make_picture.py [--checkpoint FILE] [--real FILE ...] [--output docs/enhanced.jpg]

Two photographs that ship with scikit-image are darkened by `underexpose`, enhanced by
`model_script.py --mode enhance`, and set beside the originals: dark | enhanced | photograph.
Each --real FILE adds a row for a photograph that is dark already: dark | enhanced. Show only
photographs whose licence allows it, and name their authors in the README.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import skimage  # noqa: E402
from PIL import Image, ImageDraw, ImageFont  # noqa: E402

from support.files import write_bytes  # noqa: E402
from support.pictures import linear_to_srgb, srgb_to_linear  # noqa: E402

SUBJECTS = ("astronaut", "chelsea")  # NASA, public domain; Stefan van der Walt, CC0
EXPOSURE = 1 / 30  # of the exposure that the photograph had
ELECTRONS = 10_000  # at white in the full exposure
READ_NOISE = 2  # electrons
WIDTH = 512  # pixels of one panel
LARGEST = 300_000  # bytes


def underexpose(high: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(H, W, 3) uint8 as an ordinary camera takes it in a thirtieth of the exposure.

    In linear light: fewer electrons, Poisson and read noise, then sRGB and 8 bits. Unlike the
    demo's sensor this one sees no infrared light.
    """
    electrons = ELECTRONS * EXPOSURE * srgb_to_linear(high / 255.0)
    noisy = (rng.poisson(electrons) + rng.normal(0, READ_NOISE, electrons.shape)) / ELECTRONS
    return np.rint(linear_to_srgb(np.clip(noisy, 0, 1)) * 255).astype(np.uint8)


def enhance(folder: Path, output: Path, checkpoint: str | None) -> None:
    """Every picture of `folder` by the real command line, into `output`."""
    command = [sys.executable, str(ROOT / "model_script.py"), "--mode", "enhance"]
    command += [] if checkpoint else ["--camera", "ordinary"]  # which the simulation imitates
    command += ["--input", str(folder), "--output", str(output)]
    command += ["--checkpoint", checkpoint] if checkpoint else []
    subprocess.run(command, check=True)


def sheet(rows: list[list[tuple[str, Image.Image]]]) -> Image.Image:
    """Rows of labelled panels, each WIDTH pixels wide."""
    gap, band = 8, 26
    font = ImageFont.load_default(18)
    rows = [
        [(label, p.resize((WIDTH, round(p.height * WIDTH / p.width)))) for label, p in row]
        for row in rows
    ]
    heights = [row[0][1].height + band + gap for row in rows]
    columns = max(len(row) for row in rows)
    canvas = Image.new("RGB", (columns * (WIDTH + gap) - gap, sum(heights) - gap), "white")
    draw, top = ImageDraw.Draw(canvas), 0
    for row, height in zip(rows, heights, strict=True):
        for column, (label, panel) in enumerate(row):
            left = column * (WIDTH + gap)
            draw.text((left, top), label, fill="black", font=font)
            canvas.paste(panel, (left, top + band))
        top += height
    return canvas


def encoded(picture: Image.Image) -> bytes:
    """The picture as the best JPEG of at most LARGEST bytes."""
    for quality in range(92, 40, -4):
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=quality, optimize=True)
        if buffer.tell() <= LARGEST:
            break
    return buffer.getvalue()


def main() -> None:
    """Darken, enhance, lay out, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", metavar="FILE", help="default: the released weights")
    parser.add_argument("--real", metavar="FILE", action="append", default=[])
    parser.add_argument("--output", default=str(ROOT / "docs" / "enhanced.jpg"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        low, output = Path(name) / "low", Path(name) / "enhanced"
        low.mkdir()
        rng = np.random.default_rng(0)
        photographs = {n: getattr(skimage.data, n)() for n in SUBJECTS}
        for subject, pixels in photographs.items():
            Image.fromarray(underexpose(pixels, rng)).save(low / f"{subject}.png")
        for number, path in enumerate(arguments.real):
            picture = Image.open(path).convert("RGB")
            picture.thumbnail((2 * WIDTH, 2 * WIDTH))
            picture.save(low / f"real_{number}.png")
        enhance(low, output, arguments.checkpoint)
        rows = []
        for path in sorted(low.iterdir()):
            dark = "dark photograph" if path.stem.startswith("real_") else "darkened by simulation"
            row = [(dark, Image.open(path)), ("enhanced", Image.open(output / path.name))]
            if path.stem in photographs:
                row.append(("the photograph", Image.fromarray(photographs[path.stem])))
            rows.append(row)
        write_bytes(Path(arguments.output), encoded(sheet(rows)))
    print(arguments.output)


if __name__ == "__main__":
    main()
