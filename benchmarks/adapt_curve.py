"""How much a camera's own pairs are worth: adapted to 0, 4, 8, ... pairs, scored on other pictures.

    python benchmarks/adapt_curve.py --low LOL/our485/low --high LOL/our485/high \\
        --eval_low LOL/eval15/low --eval_high LOL/eval15/high --set camera=infrared

For every count and draw, pairs of so many different scenes are drawn from --low and --high, and
tools/adapt.py adapts the released weights to them. The result is scored on the evaluation pairs, at
their own size. A drawn pair looks like no evaluation target. What the cross-validation of adapt.py
said is in the table beside what came of it, so that the two can be compared.

Writes curve.csv, curve.md and curve.png (with matplotlib) under --out, and keeps the adapted
weights there. A run that is started again goes on with what is missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tools"))

from adapt import SCORES, lay_out, worth  # noqa: E402

import model_script as ms  # noqa: E402
from support.commands import run  # noqa: E402
from support.files import write_bytes, write_csv  # noqa: E402
from support.pairs import PairStore, find_pairs  # noqa: E402
from support.processes import progress_style  # noqa: E402
from support.scenes import find_scenes, seen_scenes  # noqa: E402
from support.settings import UserError, read_all  # noqa: E402

Row = dict[str, Any]
LOOKS_ALIKE = 0.98


def draw_pairs(
    thumbnails: np.ndarray, others: np.ndarray, count: int, similarity: float, seed: int
) -> list[int]:
    """Indices of `count` of (N, 16, 16, 3) thumbnails, each of a scene of its own and none like one
    of `others`. Raises UserError where there are too few scenes."""
    rng = np.random.default_rng(seed)
    free = ~seen_scenes(thumbnails, others, LOOKS_ALIKE)
    scenes = [[i for i in scene if free[i]] for scene in find_scenes(thumbnails, similarity)]
    scenes = [scene for scene in scenes if scene]
    if len(scenes) < count:
        raise UserError(f"--counts {count}: --low shows only {len(scenes)} different scenes")
    order = rng.permutation(len(scenes))[:count]
    return sorted(int(rng.choice(scenes[place])) for place in order)


def score(loaded: ms.Loaded, store: PairStore) -> list[Row]:
    """The scores of every pair of `store`, by the network that `loaded` chooses."""
    rows = []
    for index in tqdm(range(len(store)), desc="scoring", **progress_style()):
        low, high = store[index]
        model = loaded.choose(low)[0]
        row = ms.score_pair(model, low, high, None, loaded.use, loaded.runtime, index).row
        rows.append({name: row[name] for name in SCORES})
    return rows


def means(rows: Sequence[Row]) -> Row:
    """The mean of every score."""
    return {name: float(np.mean([row[name] for row in rows])) for name in SCORES}


def adapt_once(
    arguments: argparse.Namespace, pairs: PairStore, indices: list[int], to: Path
) -> Row:
    """Adapt to the pairs of `indices`, unless that is done; returns adapt.py's report."""
    if not to.with_suffix(".json").exists():
        chosen = to.with_suffix("")
        if not chosen.exists():
            lay_out([pairs.pairs[index] for index in indices], chosen)
        command = [sys.executable, str(ROOT / "tools" / "adapt.py"), "--output", str(to)]
        command += ["--low", str(chosen / "low"), "--high", str(chosen / "high")]
        command += ["--minutes", str(arguments.minutes), "--checkpoint", arguments.checkpoint]
        for setting in arguments.set:
            command += ["--set", setting]
        subprocess.run(command, check=True)
    return json.loads(to.with_suffix(".json").read_text())


def measure(arguments: argparse.Namespace, settings: dict[str, Any], out: Path) -> list[Row]:
    """A row for the start and for every count and draw."""
    pairs = PairStore(find_pairs(arguments.low, arguments.high, "train"), 2**28)
    store = PairStore(find_pairs(arguments.eval_low, arguments.eval_high, "eval"), 2**28)
    similarity = ms.Config().scene_similarity
    plan = [(count, draw) for count in arguments.counts for draw in range(arguments.draws)]
    drawn = {
        (count, draw): draw_pairs(
            pairs.thumbnails, store.thumbnails, count, similarity, 1000 * draw + count
        )
        for count, draw in plan
    }
    start = score(ms.load_model(arguments.checkpoint, settings, ms.ConditionalFlow), store)
    rows: list[Row] = [{"pairs": 0, "draw": "", "adapted": False} | means(start)]
    for count, draw in plan:
        to = out / f"pairs{count}_draw{draw}.pth"
        report = adapt_once(arguments, pairs, drawn[count, draw], to)
        found = start
        if report["adapted"]:
            alone = {key: value for key, value in settings.items() if key != "camera"}
            found = score(ms.load_model(str(to), alone, ms.ConditionalFlow), store)
        said = [worth(pair["after"]) - worth(pair["before"]) for pair in report["pairs"]]
        came = [worth(b) - worth(a) for a, b in zip(start, found, strict=True)]
        row = {"pairs": count, "draw": draw, "adapted": report["adapted"]} | means(found)
        row |= {"gain_expected": float(np.mean(said)), "gain_found": float(np.mean(came))}
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        rows.append(row)
    return rows


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a table."""
    lines = ["| pairs | draw | PSNR | GT-mean | SSIM | CIEDE2000 |", "|---|---|---|---|---|---|"]
    for row in rows:
        scores = f"{row['psnr']:.2f} | {row['psnr_gt_mean']:.2f} | {row['ssim']:.3f}"
        draw = f"{row['draw']}{'' if row['adapted'] or not row['pairs'] else ' (start kept)'}"
        lines.append(f"| {row['pairs']} | {draw} | {scores} | {row['ciede2000']:.2f} |")
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[Row], path: Path) -> None:
    """PSNR, with and without the target's mean, and SSIM against the number of pairs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6))
    counts = sorted({row["pairs"] for row in rows})
    places = {count: place for place, count in enumerate(counts)}  # evenly: the counts double
    lines = [
        (axes[0], "psnr", "PSNR", "tab:blue"),
        (axes[0], "psnr_gt_mean", "PSNR, GT-mean", "tab:orange"),
        (axes[1], "ssim", "SSIM", "tab:blue"),
    ]
    for axis, key, label, colour in lines:
        x, y = [places[row["pairs"]] for row in rows], [row[key] for row in rows]
        middle = [np.mean([row[key] for row in rows if row["pairs"] == c]) for c in counts]
        axis.plot(range(len(counts)), middle, "-", color=colour, label=label)
        axis.plot(x, y, "o", color=colour, alpha=0.6)
        axis.set_xticks(range(len(counts)), [str(count) for count in counts])
        axis.set_xlabel("pairs of the new camera")
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0].set_ylabel("dB")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def counts_of(text: str) -> list[int]:
    """4,8,16 -> [4, 8, 16]. Raises ArgumentTypeError."""
    try:
        counts = sorted({int(part) for part in text.split(",")})
    except ValueError:
        counts = [0]
    if counts[0] < 2:
        raise argparse.ArgumentTypeError(f"give numbers from 2 on, such as 4,8,16, not {text!r}")
    return counts


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write and print the curve."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for option in ("low", "high", "eval_low", "eval_high"):
        parser.add_argument(f"--{option}", required=True, metavar="FOLDER")
    parser.add_argument("--counts", type=counts_of, default=[4, 8, 16, 32])
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=9.0, help="of each adaptation")
    parser.add_argument("--checkpoint", default=str(ms.RELEASED))
    parser.add_argument("--out", default=str(ROOT / "results" / "adapt_curve"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args(argv)

    def work() -> int:
        settings = read_all((ms.Config, ms.Use), None, arguments.set, ())
        own = {key.name for key in dataclasses.fields(ms.Use)}
        use = {key: value for key, value in settings.items() if key in own}
        out = Path(arguments.out)
        rows = measure(arguments, use, out)
        write_csv(out / "curve.csv", rows)
        write_bytes(out / "curve.md", markdown(rows).encode())
        print(markdown(rows))
        try:
            plot(rows, out / "curve.png")
        except ImportError:
            print("curve.png is left out: `pip install matplotlib` draws it")
        return 0

    return run(work)


if __name__ == "__main__":
    sys.exit(main())
