"""Every speed in one run: `make bench`, or

    python benchmarks/bench.py [--rounds 5] [--largest 24] [--seconds 3] \\
        [--checkpoint FILE] [--peer NAME=FILE ...] [--results FOLDER] [--page docs/cost.md]

training     images a second, medians, by turns: of the published recipe (128x128), of the release
             recipe, of each baseline's recipe, and of the stand-in with the published layer sizes
             (train_speed.py), on pictures of equal size; the release recipe also under
             torch.compile, and in torch's own memory layout in place of channels_last
enhancement  seconds for one 600x400 picture in memory, the same systems, the fast weights and each
             --peer (see peer_speed.py), by turns; baselines with random weights
sizes        seconds that --mode enhance prints (start-up left out) and the peak memory of its
             process, 0.1 to 24 megapixels, by the released and the fast weights
clip         frames a second of a clip of 640x360 by the fast weights, reading and writing included
scaling      training images a second of torchrun with 1 and 2 processes of one thread each, and
             with 1 of two threads, with the same total batch
roofline     counted floating point operations a second of the release recipe, as a share of what
             large matrix products reach here; by turns with the training

Writes results/bench_*/: bench.csv after every part, then bench.md and bench.png. --page puts the
table between the two marks of a Markdown file. On a machine with a GPU, training, enhancement and
roofline run on it. CUDA_VISIBLE_DEVICES= keeps them on the processor.
"""

from __future__ import annotations

import argparse
import functools
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from enhance_speed import MEGAPIXELS, write_picture
from footprint import HEIGHT, ROOT, SCRIPT, WIDTH, run, write_pairs
from PIL import Image

sys.path.insert(0, str(ROOT))
from support import files
from support.settings import UserError, complain

RELEASE = "configs/november_stage3.json"
RELEASED = f"ConditionalFlow, {Path(RELEASE).stem}"
COMPILED, PLAIN = "torch.compile", "contiguous layout"
MARKS = ("<!-- bench -->", "<!-- end of bench -->")  # of a page
SMALL = 128  # side of the published protocol's pictures
Row = dict[str, Any]


def row(part: str, name: str, value: float, unit: str, note: str = "") -> Row:
    """A measurement: printed, and a line of bench.csv."""
    found = {"part": part, "name": name, "value": float(f"{value:.4g}"), "unit": unit, "note": note}
    print("  ".join(str(text) for text in found.values()), flush=True)
    return found


def sizes(part: str, checkpoint: str, largest: float, folder: Path) -> list[Row]:
    """Seconds and peak memory by megapixels, each in a process of its own."""
    rows = []
    for megapixels in (size for size in MEGAPIXELS if size <= largest):
        height = round((megapixels * 1e6 / 1.5) ** 0.5)
        source = write_picture(folder / "one.png", round(1.5 * height), height)
        common = ["--mode", "enhance", "--checkpoint", checkpoint, "--input", str(source)]
        done = run([*common, "--output", str(folder / "out.png")])
        seconds = float(done.output.split(" s on ")[0].split()[-1])
        each = f"{seconds / megapixels:.2f} s a megapixel"
        rows += [
            row(part, f"{megapixels:g}", seconds, "s", each),
            row(part, f"{megapixels:g}", done.megabytes, "MiB"),
        ]
    return rows


def clip(folder: Path, count: int = 50) -> list[Row]:
    """A dark clip of 640x360 whose picture wanders, enhanced by the command line."""
    try:
        import av
    except ImportError:
        print("clip is left out: `pip install av` reads and writes it")
        return []

    still = np.asarray(Image.open(write_picture(folder / "still.png", 700, 420)))
    rng = np.random.default_rng(0)
    with av.open(folder / "dark.mp4", "w") as container:
        stream = container.add_stream("h264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 640, 360, "yuv420p"
        for place in range(count):
            seen = still[place : place + 360, place : place + 640]
            frame = seen + rng.integers(0, 4, seen.shape, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    command = [sys.executable, str(ROOT / "tools" / "enhance_video.py"), "--checkpoint", "fast"]
    command += ["--input", str(folder / "dark.mp4"), "--output", str(folder / "light.mp4")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"clip: {done.stderr}")
    seconds = float(done.stdout.split(" s on ")[0].split()[-1])
    return [row("clip", "fast, 640x360", count / seconds, "frames/s")]


def scaling(folder: Path, seconds: float) -> list[Row]:
    """Training speed by 1 and 2 processes of one thread, and by 1 of two, as torchrun starts them.

    "1,1" is one thread, and one at a nested level. The script takes a plain 1 under several
    processes for torchrun's default, and widens it where there are cores to spare.
    """
    import torch

    write_pairs(folder, 16)
    rows = []
    for count, threads in ((1, 1), (2, 1), (1, 2)):
        weights = folder / f"scaling_{count}_{threads}"
        settings = dict(
            train_low_dir=folder / "low",
            train_high_dir=folder / "high",
            checkpoint_dir=weights,
            device="cpu",
        )
        settings |= dict(
            log_dir=folder / "logs", batch_size=4, max_minutes=5 * seconds / 60, num_epochs=10_000
        )
        settings |= dict(val_freq=10_000, save_freq=10_000, init_from="")
        launch = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={count}",
            SCRIPT,
        ]
        train = [
            "--mode",
            "train",
            "--config",
            str(ROOT / RELEASE),
            *(f"--set={k}={v}" for k, v in settings.items()),
        ]
        few = {"OMP_NUM_THREADS": f"{threads},1", "MKL_NUM_THREADS": f"{threads}"}
        few["CUDA_VISIBLE_DEVICES"] = ""  # scaling is about the processor's cores
        done = subprocess.run(
            [*launch, *train], env=os.environ | few, capture_output=True, text=True
        )
        if done.returncode or f"({threads} threads)" not in done.stdout:
            told = f"{done.stdout}{done.stderr}"
            sys.exit(f"scaling: {launch[-2]} did not train with {threads} threads each\n{told}")
        (newest,) = weights.glob("checkpoint_epoch_*.pth")
        training = torch.load(newest, weights_only=True)["training"]
        speed = training["step"] * 4 / (60 * training["minutes"])
        name = f"{count} x {threads} thread{'s' * (threads > 1)}"
        rows.append(row("scaling", name, speed, "images/s", "release recipe, batch 4"))
    one, two, threaded = (found["value"] for found in rows)
    rows += [row("scaling", "efficiency", two / one / 2, "of 1")]
    return [*rows, row("scaling", "2 x 1 thread over 1 x 2 threads", two / threaded, "times")]


@functools.cache
def compiles() -> bool:
    """Whether torch.compile has the C++ compiler that it needs; says so when not."""
    from support.runtime import cpp_compiler

    found = bool(shutil.which(cpp_compiler()))
    if not found:
        print(f"{COMPILED} is left out: it needs a C++ compiler")
    return found


def waiter(device: str) -> Callable[[], object]:
    """What returns when the device has done all that it was given.

    A GPU's work is only launched when a call returns.
    """
    import torch

    waits: dict[str, Callable[[], object]] = {
        "cuda": torch.cuda.synchronize,
        "mps": torch.mps.synchronize,
    }
    return waits.get(device, lambda: None)


def by_turns(
    works: dict[str, Callable[[], object]], rounds: int, seconds: float, wait: Callable[[], object]
) -> dict[str, float]:
    """Median seconds of one call of each and the `wait` after it, measured by turns.

    The first round warms up.
    """
    found: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            started, calls = time.perf_counter(), 0
            while calls == 0 or (turn and time.perf_counter() - started < seconds):
                work()
                wait()
                calls += 1
            if turn:
                found[name].append((time.perf_counter() - started) / calls)
    return {name: statistics.median(values) for name, values in found.items()}


def make_trainers(device: str, folder: Path) -> dict[str, Any]:
    """A Trainer by label: each system's recipe, and variants of the release recipe.

    All on small pictures of noise.
    """
    import torch
    from train_speed import trainer_on_noise

    from baselines import SYSTEMS

    small = {"image_size": [SMALL, SMALL]}
    wanted: dict[str, tuple[str, str, tuple[int, int], dict[str, Any]]] = {
        f"{system}, {Path(recipe).stem}": (system, recipe, (SMALL, SMALL), small)
        for system, (*_, recipe) in SYSTEMS.items()
    }
    wanted |= {
        label: ("ConditionalFlow", RELEASE, (HEIGHT, WIDTH), {})
        for label in (RELEASED, f"{RELEASED}, {PLAIN}")
    }
    if compiles():
        wanted[f"{RELEASED}, {COMPILED}"] = (
            "ConditionalFlow",
            RELEASE,
            (HEIGHT, WIDTH),
            {"compile": True},
        )
    made: dict[str, Any] = {}
    for place, (label, (system, recipe, size, changes)) in enumerate(wanted.items()):
        trainer = made[label] = trainer_on_noise(
            recipe, size, folder / str(place), system, device=device, **changes
        )
        trainer.model.train()
        if label.endswith(PLAIN):
            trainer.model.to(memory_format=torch.contiguous_format)
    return made


def training(trainers: dict[str, Any], device: str, rounds: int, seconds: float) -> list[Row]:
    """Images a second of every trainer and of the stand-in, and the roofline.

    All by turns, so that noise falls on all.
    """
    import torch
    from train_speed import StandIn, first_batch, stand_in_step

    batches = {label: first_batch(trainer) for label, trainer in trainers.items()}
    works: dict[str, Callable[[], object]] = {
        label: functools.partial(trainer._train_step, [(batches[label], 1.0)])
        for label, trainer in trainers.items()
    }
    stand_in = StandIn().to(device)
    adam = torch.optim.Adam(stand_in.parameters(), 1e-4)
    for side in sorted({batch.low.shape[-1] for batch in batches.values()}):
        low = torch.rand(1, 3, side, side, device=device)
        works[f"stand-in, {side}x{side}"] = functools.partial(
            stand_in_step, stand_in, adam, low, low
        )
    products = matrix_products(device, trainers[RELEASED].runtime.dtype)
    found = by_turns(
        works | {name: product for name, (product, _) in products.items()},
        rounds,
        seconds,
        waiter(device),
    )
    rows = []
    for label in works:
        if label not in batches:
            rows.append(row("training", label, 1 / found[label], "images/s", "fp32, batch 1"))
            continue
        count, side = len(batches[label].low), batches[label].low.shape[-1]
        times = count / found[label] * found[f"stand-in, {side}x{side}"]
        note = f"{times:.1f} times the stand-in at {side}x{side}, {trainers[label].runtime}"
        rows.append(row("training", label, count / found[label], "images/s", note))
    rates = {name: work / found[name] for name, (_, work) in products.items()}
    return rows + roofline(works[RELEASED], found[RELEASED], rates)


def matrix_products(device: str, used: Any) -> dict[str, tuple[Callable[[], object], float]]:
    """By name, a product of two large matrices and its GFLOP.

    That of the precision `used` comes first.
    """
    import torch

    side = 2048 if device == "cpu" else 8192  # as large as it takes to keep all units at work
    products: dict[str, tuple[Callable[[], object], float]] = {}
    for dtype in dict.fromkeys((used, torch.bfloat16, torch.float32)):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        name = f"{str(dtype).removeprefix('torch.')} {side}x{side} matrix product"
        products[name] = functools.partial(torch.matmul, a, b), 2 * side**3 / 1e9
    return products


def roofline(step: Callable[[], object], seconds: float, rates: dict[str, float]) -> list[Row]:
    """How near a training step that takes `seconds` comes to the first of the `rates`.

    In GFLOP a second.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        step()
    work = counter.get_total_flops() / 1e9
    peak = next(iter(rates))
    rows = [row("roofline", name, rate, "GFLOP/s") for name, rate in rates.items()]
    rows.append(
        row(
            "roofline",
            "release training step",
            work / seconds,
            "GFLOP/s",
            f"{work:.0f} GFLOP a step",
        )
    )
    return [
        *rows,
        row("roofline", "utilisation", work / seconds / rates[peak], "of 1", f"of the {peak}"),
    ]


def enhancement(
    trainers: dict[str, Any], checkpoint: str, device: str, rounds: int, peers: Sequence[str] = ()
) -> list[Row]:
    """Seconds of one picture in memory, by every system."""
    import torch
    from peer_speed import load_peer
    from train_speed import StandIn

    import model_script as ms
    from support.commands import shipped
    from support.pictures import to_tensor

    pixels = np.random.default_rng(0).integers(0, 40, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    low = to_tensor(pixels)[None].to(device)
    given = {"device": device}
    model, use, runtime = ms.load_model(shipped(checkpoint), given, ms.ConditionalFlow)[:3]
    fast = ms.load_model(shipped("fast"), given, ms.ConditionalFlow).model

    def passes(enhance: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], object]:
        def one() -> None:
            with torch.no_grad(), runtime.autocast():
                enhance(low)

        return one

    works: dict[str, Callable[[], object]] = {
        "ConditionalFlow": lambda: ms.enhance_pixels(model, pixels, use, runtime),
        "ConditionalFlow, fast": lambda: ms.enhance_pixels(fast, pixels, use, runtime),
        "stand-in": passes(StandIn().to(device).enhance),
    }
    if compiles():
        works[f"ConditionalFlow, {COMPILED}"] = passes(torch.compile(model.enhance))
    for label, trainer in trainers.items():
        if not label.startswith("ConditionalFlow"):
            works[label.split(",")[0]] = passes(trainer.averaged.eval().enhance)
    for label, _, network in map(load_peer, peers):
        works[label] = passes(network.to(device))
    found = by_turns(works, rounds, 0, waiter(device))
    return [
        row("enhancement", label, each, "s", f"{WIDTH}x{HEIGHT}, {runtime}")
        for label, each in found.items()
    ]


def measured(arguments: argparse.Namespace, folder: Path) -> Iterator[list[Row]]:
    """The rows of each part, as it is done."""
    yield sizes("sizes", arguments.checkpoint, arguments.largest, folder)
    yield sizes("sizes, fast", "fast", arguments.largest, folder)
    yield clip(folder)
    yield scaling(folder, arguments.seconds)

    from support.commands import keep_memory
    from support.runtime import choose_runtime

    keep_memory()  # as every command of ours does; the peers have it, too
    device = choose_runtime("auto", mixed=False).device.type
    trainers = make_trainers(device, folder)
    yield training(trainers, device, arguments.rounds, arguments.seconds)
    given = (arguments.checkpoint, device, arguments.rounds, arguments.peer)
    yield enhancement(trainers, *given)


def machine() -> str:
    """What measured, in a line."""
    import torch

    from support.runtime import choose_runtime

    facts = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", facts.read_text()) if facts.exists() else []
    name = names[0] if names else platform.processor() or platform.machine()
    runtime = choose_runtime("auto", mixed=True)
    return f"{name}, {runtime}, PyTorch {torch.__version__.split('+')[0]}"


def around_marks(page: str) -> tuple[str, str]:
    """What a Markdown file has up to the first of MARKS, and from the second on."""
    text = Path(page).read_text(encoding="utf-8") if Path(page).is_file() else ""
    before, mark, rest = text.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not mark or not end:
        sys.exit(f"--page {page}: needs a line {MARKS[0]} and below it {MARKS[1]}; add them")
    return before + mark, end + after


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
        points = [
            (float(r["name"]), r["value"])
            for r in rows
            if r["part"] == "sizes" and r["unit"] == unit
        ]
        axis.plot(*zip(*points, strict=True), "o-", color=colour)
        axis.set_ylabel("seconds" if unit == "s" else "peak MiB", color=colour)
    curves.set(
        xlabel="megapixels; seconds without start-up, memory of the whole process",
        xscale="log",
        yscale="log",
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure all parts, print them and write them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", default=str(ROOT / "checkpoints" / "released.pth"))
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="least time of one turn")
    parser.add_argument("--largest", type=float, default=24, help="megapixels")
    parser.add_argument(
        "--results", default=str(ROOT / "results"), help="where the folder bench_* goes"
    )
    parser.add_argument("--page", metavar="FILE", help="put the table between its marks, too")
    arguments = parser.parse_args()
    # before it takes long
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    for text in arguments.peer:
        if not zipfile.is_zipfile(text.partition("=")[2]):
            parser.error(f"--peer {text}: give NAME=FILE, a file of torch.export.save")
    around = around_marks(arguments.page) if arguments.page else ("", "")
    rows: list[Row] = []
    target: Path | None = None
    with tempfile.TemporaryDirectory() as name:
        for part in measured(arguments, Path(name)):
            target = target or files.results_folder(arguments.results, "bench")
            rows += part
            # what is known is kept, whatever comes of the next part
            files.write_csv(target / "bench.csv", rows)
    assert target
    lines = ["| part | what | value | unit | note |", "|---|---|---|---|---|"]
    lines += ["| " + " | ".join(str(value) for value in r.values()) + " |" for r in rows]
    files.write_bytes(target / "bench.md", ("\n".join(lines) + "\n").encode())
    if arguments.page:
        table = "\n".join([f"*{machine()}.*", "", *lines])
        files.write_bytes(Path(arguments.page), f"\n\n{table}\n\n".join(around).encode())
    try:
        plot(rows, target / "bench.png")
    except ImportError:
        print("bench.png is left out: `pip install matplotlib` draws it")
    print(f"{target}: bench.csv, bench.md, bench.png")


if __name__ == "__main__":
    try:
        main()
    except UserError as mistake:
        sys.exit(complain(mistake))
