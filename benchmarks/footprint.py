"""What the command line costs: memory, seconds of an enhancement, seconds until it says something.

    python benchmarks/footprint.py [--pairs 236] [--minutes 0.3] [--checkpoint FILE] [--repeats 5]

Every number is of a process of the real command line, on generated 600x400 pairs in a temporary
folder.

training     peak resident memory of the published recipe (cpu_train_config.json), stopped after
             --minutes
enhancement  the seconds that it prints itself, and its peak resident memory, for one 600x400
             picture; without --checkpoint by the weights that the training above left behind
             (flow_channels 96, 2 blocks)
start-up     seconds from process start to the first byte, on a terminal and in a pipe, where output
             is held back

Memory is ru_maxrss of that process alone. A child counts its parent's memory at birth, so this
script stays small and imports no torch. Needs a POSIX system.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import pty
import re
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = str(ROOT / "model_script.py")
RECIPE = str(ROOT / "cpu_train_config.json")
WIDTH, HEIGHT = 600, 400


class Finished(NamedTuple):
    """A process that ended well: what it printed and its peak resident memory."""

    output: str
    megabytes: float


def write_pairs(folder: Path, count: int) -> None:
    """Smooth pictures without noise, each its own scene.

    The target is a coarse random grid; `low` is the same, a twelfth as bright.
    """
    rng = np.random.default_rng(0)
    for kind in ("low", "high"):
        (folder / kind).mkdir()
    for name in range(count):
        grid = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
        high = grid.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        high.save(folder / "high" / f"{name}.png", compress_level=1)
        high.point(lambda level: level // 12).save(folder / "low" / f"{name}.png", compress_level=1)


def run(arguments: Sequence[str]) -> Finished:
    """Run the command line to its end in a process of its own.

    wait4 tells that process's memory from all others'.
    """
    with tempfile.TemporaryFile("w+") as stream:
        process = subprocess.Popen(
            [sys.executable, SCRIPT, *arguments], stdout=stream, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        stream.seek(0)
        output = stream.read()
    if process.returncode:
        sys.exit(f"{' '.join(arguments)} failed ({process.returncode}):\n{output}")
    return Finished(output, usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10))


def first_byte(arguments: Sequence[str], terminal: bool) -> tuple[float, str]:
    """(seconds, beginning of the text) until the process says anything; then it is stopped."""
    reader, writer = pty.openpty() if terminal else os.pipe()
    if terminal:  # a new one has no columns, in which no progress bar shows
        fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=writer,
        stderr=writer,
        close_fds=True,
    )
    os.close(writer)
    try:
        text = os.read(reader, 4096)
        return time.perf_counter() - started, " ".join(text.decode(errors="replace").split())[:40]
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()
        os.close(reader)


def print_table(rows: Sequence[tuple[str, str]]) -> None:
    """Two aligned columns."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:{width}}  {value}", flush=True)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--pairs", type=int, default=236, help="generated training pairs, at least 2"
    )
    parser.add_argument("--minutes", type=float, default=0.3, help="training time")
    parser.add_argument("--checkpoint", help="weights to enhance with")
    parser.add_argument("--repeats", type=int, default=5, help="runs behind each median")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pairs(folder, arguments.pairs)
        settings = dict(
            train_low_dir=folder / "low",
            train_high_dir=folder / "high",
            max_minutes=arguments.minutes,
        )
        settings |= dict(checkpoint_dir=folder / "weights", log_dir=folder / "logs")
        train = [
            "--mode",
            "train",
            "--config",
            RECIPE,
            *(f"--set={key}={value}" for key, value in settings.items()),
        ]
        weights = arguments.checkpoint or str(folder / "weights" / "best_model.pth")
        enhance = [
            "--mode",
            "enhance",
            "--checkpoint",
            weights,
            "--output",
            str(folder / "out.png"),
        ]
        enhance += ["--input", str(folder / "low" / "0.png")]

        training = run(train)
        print_table(
            [
                (
                    f"training, {arguments.pairs} pairs, {arguments.minutes:g} min",
                    f"{training.megabytes:.0f} MiB peak",
                )
            ]
        )
        runs = [run(enhance) for _ in range(arguments.repeats)]
        seconds = [float(re.findall(r"([\d.]+) s on ", finished.output)[0]) for finished in runs]
        print_table(
            [
                (f"enhance {WIDTH}x{HEIGHT}, printed", f"{statistics.median(seconds):.2f} s"),
                (
                    f"enhance {WIDTH}x{HEIGHT}, memory",
                    f"{max(finished.megabytes for finished in runs):.0f} MiB peak",
                ),
            ]
        )
        wrong = ["--mode", "train", "--config", RECIPE, "--set", "batch_size=0"]
        for label, command in (("enhance", enhance), ("train", train), ("config error", wrong)):
            for terminal in (True, False):
                measured = [first_byte(command, terminal) for _ in range(arguments.repeats)]
                seconds = [elapsed for elapsed, _ in measured]
                where = "terminal" if terminal else "pipe"
                shown = f"{statistics.median(seconds):.2f} s  {measured[-1][1]!r}"
                print_table([(f"first byte, {label}, {where}", shown)])


if __name__ == "__main__":
    main()
