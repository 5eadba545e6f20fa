"""What enhancement costs in seconds and memory.

    python benchmarks/enhance_speed.py [--checkpoint FILE] [--largest 24] [--rounds 5] \\
        [--set KEY=VALUE ...]

megapixels   one process of the real command line for each size, 0.1 to 24 megapixels: the seconds
             it prints (reading, enhancing, writing a PNG) and its peak resident memory
folder       median seconds a picture over a folder of 600x400 pictures, from its enhance.csv, the
             first left out
start        seconds of a whole process that enhances one 600x400 picture
stand-in     the deterministic pass of a model with the published layer sizes (see train_speed.py)
             at 600x400, by turns with ours in one process, so that other load falls on both

Pictures are generated: smooth colours, dark, with noise. Needs a POSIX system.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from footprint import HEIGHT, ROOT, WIDTH, run
from PIL import Image

MEGAPIXELS = (0.1, 0.24, 1, 3, 6, 12, 24)


def write_picture(path: Path, width: int, height: int, seed: int = 0) -> Path:
    """A dark, noisy picture of smooth colours."""
    rng = np.random.default_rng(seed)
    grid = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    smooth = np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC)) // 12
    noise = rng.integers(0, 4, (height, width, 1), dtype=np.uint8)
    Image.fromarray(smooth + noise).save(path, compress_level=1)
    return path


def scaling(common: list[str], folder: Path, largest: float) -> None:
    """Cost by size, each in a process of its own."""
    print("megapixels      size  seconds  seconds/megapixel  peak MiB")
    for megapixels in (size for size in MEGAPIXELS if size <= largest):
        height = round((megapixels * 1e6 / 1.5) ** 0.5)
        source = write_picture(folder / "one.png", round(1.5 * height), height)
        done = run([*common, "--input", str(source), "--output", str(folder / "out.png")])
        seconds = float(done.output.split(" s on ")[0].split()[-1])
        size = f"{round(1.5 * height)}x{height}"
        print(
            f"{megapixels:10g} {size:>9} {seconds:8.2f} {seconds / megapixels:18.2f}"
            f" {done.megabytes:9.0f}",
            flush=True,
        )


def folder_run(common: list[str], folder: Path, count: int = 20) -> None:
    """Seconds a picture in a folder, and of a process that enhances one."""
    (folder / "many").mkdir()
    for place in range(count):
        write_picture(folder / "many" / f"{place}.png", WIDTH, HEIGHT, place)
    run([*common, "--input", str(folder / "many"), "--output", str(folder / "done")])
    with open(folder / "done" / "enhance.csv", newline="", encoding="utf-8") as stream:
        seconds = [float(row["seconds"]) for row in csv.DictReader(stream)]
    print(
        f"folder of {count} at {WIDTH}x{HEIGHT}: median {statistics.median(seconds[1:]):.3f} s a"
        " picture",
        flush=True,
    )
    whole = []
    for _ in range(3):
        started = time.perf_counter()
        run(
            [
                *common,
                "--input",
                str(folder / "many" / "0.png"),
                "--output",
                str(folder / "first.png"),
            ]
        )
        whole.append(time.perf_counter() - started)
    print(
        f"start to first enhanced {WIDTH}x{HEIGHT} picture, process included:"
        f" {statistics.median(whole):.2f} s",
        flush=True,
    )


def against_stand_in(checkpoint: str, assignments: list[str], rounds: int) -> None:
    """Alternating passes at 600x400: the work on pixels alone, without files."""
    sys.path.insert(0, str(ROOT))
    import torch
    from train_speed import StandIn

    import model_script as ms
    from support.pictures import to_tensor
    from support.settings import read_all

    given = read_all((ms.Config, ms.Use), None, assignments, ())
    model, use, runtime = ms.load_model(checkpoint, given, ms.ConditionalFlow)[:3]
    stand_in = StandIn().eval()
    pixels = np.random.default_rng(0).integers(0, 40, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    low = to_tensor(pixels)[None]

    def timed(work: Callable[[], object]) -> float:
        started = time.perf_counter()
        with torch.no_grad():
            work()
        return time.perf_counter() - started

    ours, theirs = [], []
    for turn in range(rounds + 1):
        ours.append(timed(lambda: ms.enhance_pixels(model, pixels, use, runtime)))
        theirs.append(timed(lambda: stand_in.enhance(low)))
        if turn:  # the first warms both up
            print(
                f"round {turn}: ours {ours[-1]:.3f} s ({runtime}), stand-in {theirs[-1]:.2f} s",
                flush=True,
            )
    ratio = statistics.median(b / a for a, b in zip(ours[1:], theirs[1:], strict=True))
    print(
        f"median: ours {statistics.median(ours[1:]):.3f} s, stand-in"
        f" {statistics.median(theirs[1:]):.2f} s, {ratio:.1f}x"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", default=str(ROOT / "checkpoints" / "released.pth"))
    parser.add_argument("--largest", type=float, default=24, help="megapixels")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    common = [
        "--mode",
        "enhance",
        "--checkpoint",
        arguments.checkpoint,
        *(f"--set={text}" for text in arguments.set),
    ]
    with tempfile.TemporaryDirectory() as name:
        folder_run(common, Path(name))
        # before torch is here: a child counts its parent's memory at birth
        scaling(common, Path(name), arguments.largest)
        against_stand_in(arguments.checkpoint, arguments.set, arguments.rounds)


if __name__ == "__main__":
    main()
