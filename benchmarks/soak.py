"""Does a long training's memory grow? Resident memory of a real run, sampled every half minute.

    python benchmarks/soak.py [--minutes 120] [--config configs/november_stage3.json] \\
        [--pairs 236] [--set KEY=VALUE ...]

Without --set train_low_dir=... it trains on generated 600x400 pairs. Without --set
checkpoint_dir=... it trains into a folder that it removes. With both it is a training like any
other, watched. Its folder of weights must not hold a best_model.pth: the appearance of that file
tells that the first validation is over.

Prints the median over the first tenth of the samples from then on, the median over the last tenth,
and the growth between them. The exit status is 1 where the growth is 2 % or more. Whether the cache
of decoded pictures holds cache_megabytes cannot be seen from outside: tests/test_data.py counts
what it holds. Needs a POSIX system with `ps`.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from footprint import ROOT, SCRIPT, write_pairs

ALLOWED = 2.0  # percent


def resident_megabytes(process: int) -> float:
    """What `ps` says of a process; 0 when it has ended."""
    done = subprocess.run(["ps", "-o", "rss=", "-p", str(process)], capture_output=True, text=True)
    return float(done.stdout.strip() or 0) / 1024


def watch(command: Sequence[str], best: Path, every: float) -> list[float]:
    """Run `command` to its end.

    Returns its resident memory in MiB every `every` seconds from when the file `best` is there.
    """
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    samples: list[float] = []
    while process.poll() is None:
        time.sleep(every)
        if best.exists() and (now := resident_megabytes(process.pid)):
            samples.append(now)
    if process.returncode:
        sys.exit(f"the training ended with status {process.returncode}")
    return samples


def judge(samples: Sequence[float]) -> None:
    """Print the growth; exit with status 1 where it is too large or the samples cannot tell."""
    if len(samples) < 20:
        sys.exit(f"{len(samples)} samples: too few to tell; raise --minutes")
    tenth = len(samples) // 10
    first, last = statistics.median(samples[:tenth]), statistics.median(samples[-tenth:])
    growth = 100 * (last / first - 1)
    print(
        f"{len(samples)} samples after the first validation: {first:.0f} MiB, at the end"
        f" {last:.0f} MiB",
        end="",
    )
    print(f", {growth:+.1f} %; largest {max(samples):.0f} MiB")
    if growth >= ALLOWED:
        sys.exit(f"memory grew by {growth:.2f} %; less than {ALLOWED:g} % is allowed")


def main() -> None:
    """Train, sample, compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--config", default=str(ROOT / "configs" / "november_stage3.json"))
    parser.add_argument("--pairs", type=int, default=236, help="generated pairs")
    parser.add_argument("--every", type=float, default=30, help="seconds between samples")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        given = dict(text.partition("=")[::2] for text in arguments.set)
        best = Path(given.get("checkpoint_dir", folder / "weights")) / "best_model.pth"
        if best.exists():
            print(
                f"error: {best} is there already; name another checkpoint_dir, or move it away",
                file=sys.stderr,
            )
            sys.exit(2)
        settings = dict(
            max_minutes=arguments.minutes, num_epochs=1_000_000, val_freq=1, keep_checkpoints=1
        )
        settings |= dict(checkpoint_dir=best.parent, log_dir=folder / "logs", init_from="")
        if "train_low_dir" not in given:
            write_pairs(folder, arguments.pairs)
            settings |= dict(train_low_dir=folder / "low", train_high_dir=folder / "high")
        ours = [f"--set={key}={value}" for key, value in settings.items() if key not in given]
        chosen = ours + [f"--set={text}" for text in arguments.set]
        command = [sys.executable, SCRIPT, "--mode", "train", "--config", arguments.config, *chosen]
        samples = watch(command, best, arguments.every)
    judge(samples)


if __name__ == "__main__":
    main()
