"""Whether a long training's memory grows: resident memory of a real run, sampled every half minute.

    python benchmarks/soak.py [--minutes 120] [--config release_train_config.json] [--pairs 236] [--set KEY=VALUE ...]

Without --set train_low_dir=... it trains on generated 600x400 pairs, without --set checkpoint_dir=... into a folder that it
removes; with both it is a training like any other, watched. Prints the median over the first tenth of the samples
after the first validation and over the last tenth, and the growth between them. Needs a POSIX system with `ps`.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from footprint import ROOT, SCRIPT, write_pairs


def resident_megabytes(process: int) -> float:
    """What `ps` says of a process; 0 when it has ended."""
    done = subprocess.run(["ps", "-o", "rss=", "-p", str(process)], capture_output=True, text=True)
    return float(done.stdout.strip() or 0) / 1024


def main() -> None:
    """Train, sample, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--config", default=str(ROOT / "release_train_config.json"))
    parser.add_argument("--pairs", type=int, default=236, help="generated pairs")
    parser.add_argument("--every", type=float, default=30, help="seconds between samples")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        given = dict(text.partition("=")[::2] for text in arguments.set)
        weights = Path(given.get("checkpoint_dir", folder / "weights"))
        settings = dict(max_minutes=arguments.minutes, num_epochs=1_000_000, val_freq=1, keep_checkpoints=1)
        settings |= dict(checkpoint_dir=weights, log_dir=folder / "logs")
        if "train_low_dir" not in given:
            write_pairs(folder, arguments.pairs)
            settings |= dict(train_low_dir=folder / "low", train_high_dir=folder / "high")
        command = [sys.executable, SCRIPT, "--mode", "train", "--config", arguments.config]
        ours = [f"--set={key}={value}" for key, value in settings.items() if key not in given]
        chosen = ours + [f"--set={text}" for text in arguments.set]
        process = subprocess.Popen([*command, *chosen], stdout=subprocess.DEVNULL)
        samples: list[float] = []
        while process.poll() is None:
            time.sleep(arguments.every)
            if (weights / "best_model.pth").exists() and (now := resident_megabytes(process.pid)):
                samples.append(now)
        if process.returncode or len(samples) < 20:
            sys.exit(f"status {process.returncode}, {len(samples)} samples: too few to tell; raise --minutes")
    tenth = len(samples) // 10
    first, last = statistics.median(samples[:tenth]), statistics.median(samples[-tenth:])
    print(f"{len(samples)} samples after the first validation: {first:.0f} MiB, at the end {last:.0f} MiB", end="")
    print(f", {100 * (last / first - 1):+.1f} %; largest {max(samples):.0f} MiB")


if __name__ == "__main__":
    main()
