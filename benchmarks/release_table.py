"""Everything that a release is judged by, for several weights side by side, in one run.

    python benchmarks/release_table.py --out results/release \\
        --weights november=FILE --weights new=FILE \\
        --pairs eliei=LOW:HIGH --pairs lol=LOW:HIGH --unpaired photos \\
        [--size 128,128] [--detail 15] [--set use_amp=true]

Of each set of pairs
    scores       PSNR, SSIM, CIEDE2000, and GT-mean PSNR and grey SSIM, on all pairs and on those
                 without a twin in training
    harm         PSNR to itself of each different `high` given as input
    uncertainty  its rank correlation with the error over pixels, both blurred by 8 pixels
    likelihood   how often the right `low` has fewer bits per dimension than that of the pair
                 half-way round the list

The last three are taken on --detail pairs, evenly spread. Of a folder without targets: the share of
pixels that reach 250 in the output and were below 220 in the input (largest channel), and the mean
CIELAB chroma shift of pixels above L = 60.

Writes rows.csv (each picture), table.csv and table.md; prints the latter. A column `gamma 0.4`
needs no weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.ndimage
import scipy.stats
import skimage.color
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import model_script as ms  # noqa: E402
from support.decoding import read_image  # noqa: E402
from support.files import write_bytes, write_csv  # noqa: E402
from support.metrics import image_metrics, psnr_of  # noqa: E402
from support.pairs import PairStore, find_pairs, natural_key, pictures_by_stem  # noqa: E402
from support.pictures import resize, to_tensor, to_uint8  # noqa: E402
from support.processes import progress_style  # noqa: E402
from support.scenes import find_twins  # noqa: E402
from support.settings import UserError, complain, read_all, read_size  # noqa: E402

Row = dict[str, Any]


def burnt_share(given: np.ndarray, enhanced: np.ndarray) -> float:
    """Share of the pixels of (H, W, 3) uint8 pictures whose largest channel reaches 250 and was
    below 220."""
    return float(((enhanced.max(-1) >= 250) & (given.max(-1) < 220)).mean())


def chroma_shift(given: np.ndarray, enhanced: np.ndarray) -> float:
    """Mean distance in CIELAB's (a, b) of the pixels of (H, W, 3) uint8 pictures whose L was above
    60; NaN without any."""
    before, after = skimage.color.rgb2lab(given), skimage.color.rgb2lab(enhanced)
    bright = before[..., 0] > 60
    return (
        float(np.linalg.norm((after - before)[bright][:, 1:], axis=-1).mean())
        if bright.any()
        else float("nan")
    )


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` of `count` places, evenly spread; all where there are no more."""
    return sorted({int(i) for i in np.linspace(0, count - 1, min(count, wanted)).round()})


class Scorer:
    """One set of weights; None stands for a gamma of 0.4."""

    def __init__(self, weights: str | None, settings: dict[str, Any]) -> None:
        self.known = None
        if weights is not None:
            self.loaded = ms.load_model(weights, settings, ms.ConditionalFlow)
            self.runtime = self.loaded.runtime
            thumbnails = self.loaded.checkpoint.get("training_thumbnails")
            self.known = (
                thumbnails.numpy()
                if isinstance(thumbnails, torch.Tensor)
                else np.zeros((0, 16, 16, 3), np.uint8)
            )
        self.weights = weights

    def enhance(self, pixels: np.ndarray) -> np.ndarray:
        """(H, W, 3) float in [0, 1] of uint8."""
        if self.weights is None:
            return (pixels / 255) ** 0.4
        model, _ = self.loaded.choose(pixels)
        return ms.enhance_pixels(model, pixels, self.loaded.use, self.runtime).best / 65535

    def doubt(self, low: np.ndarray, high: np.ndarray, samples: int) -> float:
        """Rank correlation of the deviation over samples with the error, both blurred."""
        use = dataclasses.replace(self.loaded.use, uncertainty=True, samples=samples)
        found = ms.enhance_pixels(self.loaded.choose(low)[0], low, use, self.runtime)
        assert found.deviation is not None
        error = np.abs(found.best / 65535 - high / 255).mean(-1)
        blurred = [
            scipy.ndimage.gaussian_filter(image.astype(np.float64), 8)
            for image in (found.deviation, error)
        ]
        return float(scipy.stats.spearmanr(*(image[::4, ::4].ravel() for image in blurred))[0])

    @torch.no_grad()
    def bits(self, high: np.ndarray, low: np.ndarray) -> float:
        """Bits per dimension of `high` given `low`, which is brought to its size."""
        target = to_tensor(high)[None].to(self.runtime.device)
        given = resize(to_tensor(low)[None].to(self.runtime.device), high.shape[:2], quantise=True)
        torch.manual_seed(0)  # the same dequantisation noise for the right and the wrong one
        with self.runtime.autocast():
            return float(self.loaded.choose(low)[0].bits_per_dim(target, given)[0])


def score_set(
    scorer: Scorer, store: PairStore, size: Sequence[int] | None, detail: int, samples: int
) -> list[Row]:
    """A row of scores for each pair."""
    twins = (
        find_twins(store.thumbnails, scorer.known)
        if scorer.known is not None
        else [False] * len(store)
    )
    chosen = set(spread(len(store), detail))

    def pair(index: int) -> list[np.ndarray]:
        pictures = [to_tensor(pixels)[None] for pixels in store[index]]
        pictures = (
            [resize(picture, size, quantise=True) for picture in pictures] if size else pictures
        )
        return [to_uint8(picture[0]) for picture in pictures]

    rows: list[Row] = []
    seen: list[np.ndarray] = []
    for index in tqdm(
        range(len(store)), desc=scorer.weights or "gamma", leave=False, **progress_style()
    ):
        low, high = pair(index)
        enhanced = scorer.enhance(low)
        row: Row = {"picture": store.pairs[index].name, "twin": bool(twins[index])}
        row |= image_metrics(enhanced, high / 255)
        new = not seen or not find_twins(store.thumbnails[index : index + 1], np.stack(seen))[0]
        if index in chosen and new:
            seen.append(store.thumbnails[index])
            row["harm_psnr"] = psnr_of(scorer.enhance(high), high / 255)
        if index in chosen and scorer.weights is not None:
            wrong = pair((index + len(store) // 2) % len(store))[0]
            right = scorer.bits(high, low)
            row |= {
                "bits_per_dim": right,
                "right_low_wins": float(right < scorer.bits(high, wrong)),
            }
            if samples:
                row["doubt"] = scorer.doubt(low, high, samples)
        rows.append(row)
    return rows


def score_unpaired(scorer: Scorer, folder: str) -> list[Row]:
    """A row of scores for each picture of a folder."""
    rows = []
    for name, path in sorted(
        pictures_by_stem(folder, "unpaired").items(), key=lambda item: natural_key(item[0])
    ):
        given = read_image(path)
        enhanced = np.rint(scorer.enhance(given) * 255).astype(np.uint8)
        rows.append(
            {
                "picture": name,
                "burnt": burnt_share(given, enhanced),
                "chroma_shift": chroma_shift(given, enhanced),
            }
        )
    return rows


def means(rows: Sequence[Row]) -> Row:
    """The mean of every number, of the rows that have it."""
    names = dict.fromkeys(name for row in rows for name in row if name not in ("picture", "twin"))
    return {name: float(np.nanmean([row[name] for row in rows if name in row])) for name in names}


def table_rows(weights: str, name: str, rows: Sequence[Row]) -> list[Row]:
    """The lines of the table for one set: all pictures, and those without a twin where some have
    one."""
    parts: list[tuple[str, Callable[[Row], bool]]] = [("all", lambda row: True)]
    if any(row.get("twin") for row in rows) and not all(row["twin"] for row in rows):
        parts.append(("no twin", lambda row: not row["twin"]))
    lines = []
    for part, wanted in parts:
        these = [row for row in rows if wanted(row)]
        lines.append(
            {"set": name, "weights": weights, "pictures": f"{len(these)} ({part})", **means(these)}
        )
    return lines


def cell(value: Any) -> str:
    """A value in a table, a dash for none."""
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def markdown(lines: Sequence[Row]) -> str:
    """A table of all that the lines hold."""
    names = list(dict.fromkeys(name for line in lines for name in line))
    body = [" | ".join(cell(line.get(name)) for name in names) for line in lines]
    return "\n".join(
        f"| {text} |" for text in [" | ".join(names), " | ".join(["---"] * len(names)), *body]
    )


def main() -> int:
    """Score all weights on all sets; write and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True)
    parser.add_argument("--weights", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--gamma", action="store_true", help="also score a gamma of 0.4")
    parser.add_argument("--pairs", action="append", default=[], metavar="NAME=LOW:HIGH")
    parser.add_argument("--unpaired", metavar="FOLDER")
    parser.add_argument("--size", default="native", metavar="HEIGHT,WIDTH")
    parser.add_argument(
        "--detail", type=int, default=15, help="pairs of each set that also get what takes long"
    )
    parser.add_argument(
        "--samples", type=int, default=8, help="samples behind the uncertainty; 0: leave it out"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    try:
        settings = read_all((ms.Config, ms.Use), None, arguments.set, ())
        size = read_size("--size", arguments.size)
        scorers = {
            name: Scorer(file, settings)
            for name, _, file in (text.partition("=") for text in arguments.weights)
        }
        scorers |= {"gamma 0.4": Scorer(None, settings)} if arguments.gamma else {}
        lines: list[Row] = []
        every: list[Row] = []
        for text in arguments.pairs:
            name, _, folders = text.partition("=")
            low, _, high = folders.partition(":")
            store = PairStore(find_pairs(low, high, "eval"), 2**30)
            for weights, scorer in scorers.items():
                rows = score_set(scorer, store, size, arguments.detail, arguments.samples)
                every += [{"set": name, "weights": weights} | row for row in rows]
                lines += table_rows(weights, name, rows)
                print(markdown(lines[-1:]).splitlines()[-1], flush=True)
        for weights, scorer in scorers.items() if arguments.unpaired else ():
            rows = score_unpaired(scorer, arguments.unpaired)
            every += [{"set": "unpaired", "weights": weights} | row for row in rows]
            lines += table_rows(weights, "unpaired", rows)
        folder = Path(arguments.out)
        write_csv(folder / "rows.csv", every)
        write_csv(folder / "table.csv", lines)
        write_bytes(folder / "table.md", (markdown(lines) + "\n").encode())
    except UserError as error:
        return complain(error)
    print(markdown(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
