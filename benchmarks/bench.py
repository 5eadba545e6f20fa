"""Every speed in one run: `make bench`, or

    python benchmarks/bench.py [--rounds 5] [--largest 24] [--seconds 3] [--checkpoint FILE]

training     images a second of the published recipe (128x128), of the release recipe and of each baseline's recipe, and of
             the stand-in with the published layer sizes (train_speed.py) on pictures of equal size; by turns, medians;
             the release recipe also under torch.compile, and in torch's own memory layout in place of channels_last
enhancement  seconds for one 600x400 picture in memory, the same systems, by turns; baselines with random weights
sizes        seconds and peak memory of a whole process, 0.1 to 24 megapixels
scaling      training images a second of torchrun with 1 and 2 processes of one thread each, same total batch
roofline     counted floating point operations a second, as a share of what large matrix products reach here

Writes results/bench_*/: bench.csv, bench.md, bench.png. On a machine with a GPU the in-process parts run on it.
"""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
from enhance_speed import MEGAPIXELS, write_picture
from footprint import HEIGHT, ROOT, SCRIPT, WIDTH, run, write_pairs

RELEASE = "release_train_config.json"
COMPILED, PLAIN = "torch.compile", "contiguous layout"
Row = dict[str, Any]


def row(part: str, name: str, value: float, unit: str, note: str = "") -> Row:
    """A measurement: printed, and a line of bench.csv."""
    found = {"part": part, "name": name, "value": float(f"{value:.4g}"), "unit": unit, "note": note}
    print("  ".join(str(text) for text in found.values()), flush=True)
    return found


def sizes(checkpoint: str, largest: float, folder: Path) -> list[Row]:
    """Seconds and peak memory by megapixels, each in a process of its own."""
    rows = []
    for megapixels in (size for size in MEGAPIXELS if size <= largest):
        height = round((megapixels * 1e6 / 1.5) ** 0.5)
        source = write_picture(folder / "one.png", round(1.5 * height), height)
        common = ["--mode", "enhance", "--checkpoint", checkpoint, "--input", str(source)]
        done = run([*common, "--output", str(folder / "out.png")])
        seconds = float(done.output.split(" s on ")[0].split()[-1])
        rows += [row("sizes", f"{megapixels:g}", seconds, "s"), row("sizes", f"{megapixels:g}", done.megabytes, "MiB")]
    return rows


def scaling(folder: Path, seconds: float) -> list[Row]:
    """Training speed by 1 and 2 processes of one thread, as torchrun starts them."""
    import torch

    write_pairs(folder, 16)
    rows = []
    for count in (1, 2):
        weights = folder / f"scaling_{count}"
        settings = dict(train_low_dir=folder / "low", train_high_dir=folder / "high", checkpoint_dir=weights, device="cpu")
        settings |= dict(log_dir=folder / "logs", batch_size=4, max_minutes=5 * seconds / 60, num_epochs=10_000)
        settings |= dict(val_freq=10_000, save_freq=10_000)
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}", SCRIPT]
        train = ["--mode", "train", "--config", str(ROOT / RELEASE), *(f"--set={k}={v}" for k, v in settings.items())]
        # CUDA is hidden: this is about the processor's cores
        threads = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run([*launch, *train], env=threads, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        (newest,) = weights.glob("checkpoint_epoch_*.pth")
        training = torch.load(newest, weights_only=True)["training"]
        speed = training["step"] * 4 / (60 * training["minutes"])
        rows.append(row("scaling", f"{count} x 1 thread", speed, "images/s", "release recipe, batch 4"))
    return [*rows, row("scaling", "efficiency", rows[1]["value"] / rows[0]["value"] / 2, "of 1")]


def compiles() -> bool:
    """Whether torch.compile has the C++ compiler that it needs; says so when not."""
    found = bool(shutil.which("g++") or shutil.which("clang++"))
    if not found:
        print(f"{COMPILED} is left out: it needs a C++ compiler")
    return found


def by_turns(works: dict[str, Callable[[], object]], rounds: int, seconds: float) -> dict[str, float]:
    """Median seconds of one call of each, measured alternately; the first round warms up."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            started, calls = time.perf_counter(), 0
            while calls == 0 or (turn and time.perf_counter() - started < seconds):
                work()
                calls += 1
            if turn:
                found[name].append((time.perf_counter() - started) / calls)
    return {name: statistics.median(values) for name, values in found.items()}


def in_process(checkpoint: str, folder: Path, rounds: int, seconds: float) -> list[Row]:
    """Training, enhancement and roofline, all on the device that the recipes choose."""
    sys.path.insert(0, str(ROOT))
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from train_speed import StandIn, first_batch, stand_in_step, trainer_on_noise

    import model_script as ms
    from baselines import SYSTEMS

    def matrix_product(dtype: torch.dtype, side: int = 2048) -> Callable[[], object]:
        a, b = (torch.randn(side, side, device=runtime.device).to(dtype) for _ in range(2))
        return lambda: (a @ b)[0, 0].item()  # item waits for the device

    recipes = {name: spec[3] for name, spec in SYSTEMS.items()}
    trainers = {f"{name}, {Path(path).stem}": (name, path, 128) for name, path in recipes.items()}
    release = "ConditionalFlow, release_train_config"
    variants = [release, f"{release}, {PLAIN}"] + ([f"{release}, {COMPILED}"] if compiles() else [])
    trainers |= {label: ("ConditionalFlow", RELEASE, 0) for label in variants}
    works: dict[str, Callable[[], object]] = {}
    images, side_of, made = {}, {}, {}
    stand_in = StandIn()
    adam = torch.optim.Adam(stand_in.parameters(), 1e-4)
    for label, (system, recipe, side) in trainers.items():
        size = (side, side) if side else (HEIGHT, WIDTH)
        changes = {"image_size": list(size)} if side else {}
        trainer = made[label] = trainer_on_noise(recipe, size, folder / label.replace("/", "_"), system, **changes)
        trainer.model.train()
        if label.endswith(PLAIN):
            trainer.model.to(memory_format=torch.contiguous_format)
        if label.endswith(COMPILED):
            trainer.parallel = cast(torch.nn.Module, torch.compile(trainer.parallel))
        runtime, batch = trainer.runtime, first_batch(trainer)
        works[label] = functools.partial(trainer._train_step, [(batch, 1.0)])
        images[label], side_of[label] = len(batch.low), batch.low.shape[-1]
    stand_in = stand_in.to(runtime.device)
    for side in sorted(set(side_of.values())):
        label = f"stand-in, {side}x{side}"
        low = torch.rand(1, 3, side, side, device=runtime.device)
        works[label] = functools.partial(stand_in_step, stand_in, adam, low, low)
        images[label] = 1
    found = by_turns(works, rounds, seconds)
    rows = []
    for label, each in found.items():
        side = side_of.get(label, 0)
        theirs = images[label] / each * found.get(f"stand-in, {side}x{side}", float("nan"))
        note = f"{theirs:.1f} times the stand-in at {side}x{side}, {runtime if side else ''}" if side else "fp32, batch 1"
        rows.append(row("training", label, images[label] / each, "images/s", note))

    pixels = np.random.default_rng(0).integers(0, 40, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    low = ms.to_tensor(pixels)[None].to(runtime.device)
    model, config, runtime, _ = ms.load_model(checkpoint, {}, ms.ConditionalFlow, ms.Config)

    def passes(work: Callable[[], torch.Tensor]) -> Callable[[], object]:
        def one() -> None:
            with torch.no_grad(), runtime.autocast():
                work()[0, 0, 0, 0].item()

        return one

    turns: dict[str, Callable[[], object]] = {
        "ConditionalFlow": lambda: ms.enhance_pixels(model, pixels, config, runtime),
        "stand-in": passes(functools.partial(stand_in.enhance, low)),
    }
    if compiles():
        turns |= {f"ConditionalFlow, {COMPILED}": passes(functools.partial(torch.compile(model.enhance), low))}
    for label, trainer in made.items():
        if not label.startswith("ConditionalFlow"):
            other = trainer.averaged.eval()
            turns[label.split(",")[0]] = passes(functools.partial(other.enhance, low))
    for label, each in by_turns(turns, rounds, 0).items():
        rows.append(row("enhancement", label, each, "s", f"{WIDTH}x{HEIGHT}, {runtime}"))

    peak = by_turns({"bf16": matrix_product(torch.bfloat16), "fp32": matrix_product(torch.float32)}, rounds, seconds)
    rates = {name: 2 * 2048**3 / each / 1e9 for name, each in peak.items()}
    with FlopCounterMode(display=False) as counter:
        works[release]()
    work = counter.get_total_flops() / 1e9
    rows += [row("roofline", f"{name} matrix product", rate, "GFLOP/s", "2048x2048") for name, rate in rates.items()]
    rows.append(row("roofline", "release training step", work / found[release], "GFLOP/s", f"{work:.0f} GFLOP a step"))
    used = "bf16" if runtime.dtype == torch.bfloat16 else "fp32"
    rows.append(row("roofline", "utilisation", work / found[release] / rates[used], "of 1", f"of the {used} matrix product"))
    return rows


def plot(rows: list[Row], path: Path) -> None:
    """Training speeds as bars, seconds and memory against megapixels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (bars, curves) = pyplot.subplots(1, 2, figsize=(13, 4.5))
    training = [r for r in rows if r["part"] == "training"]
    bars.barh([r["name"] for r in training], [r["value"] for r in training])
    bars.set(xscale="log", xlabel="training images/s")
    for unit, colour in (("s", "tab:blue"), ("MiB", "tab:orange")):
        axis = curves if unit == "s" else curves.twinx()
        points = [(float(r["name"]), r["value"]) for r in rows if r["part"] == "sizes" and r["unit"] == unit]
        axis.plot(*zip(*points, strict=True), "o-", color=colour)
        axis.set_ylabel("seconds" if unit == "s" else "peak MiB", color=colour)
    curves.set(xlabel="megapixels, enhance, process included", xscale="log", yscale="log")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure all parts, print them and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=str(ROOT / "checkpoints" / "best_model.pth"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="least time of one turn")
    parser.add_argument("--largest", type=float, default=24, help="megapixels")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # processes first, before torch is here: a child counts its parent's memory at birth
        rows = sizes(arguments.checkpoint, arguments.largest, folder)
        rows += scaling(folder, arguments.seconds)
        rows += in_process(arguments.checkpoint, folder, arguments.rounds, arguments.seconds)

    import model_script as ms

    target = ms.results_folder(str(ROOT / "results"), "bench")
    ms.write_csv(target / "bench.csv", rows)
    lines = ["| part | what | value | unit | note |", "|---|---|---|---|---|"]
    lines += ["| " + " | ".join(str(value) for value in r.values()) + " |" for r in rows]
    ms.write_bytes(target / "bench.md", ("\n".join(lines) + "\n").encode())
    try:
        plot(rows, target / "bench.png")
    except ImportError:
        print("bench.png is left out: `pip install matplotlib` draws it")
    print(f"{target}: bench.csv, bench.md, bench.png")


if __name__ == "__main__":
    main()
