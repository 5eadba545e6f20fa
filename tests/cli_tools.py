"""Helpers of the integration tests: run the script as a user would, make tiny pairs of pictures."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import model_script as ms
from support import commands, journal

SCRIPT = Path(ms.__file__).resolve()
TINY = {
    "device": "cpu",
    "image_size": [32, 32],
    "flow_channels": 8,
    "num_flow_blocks": 1,
    "thumbnail_size": 32,
    "batch_size": 1,
    "num_epochs": 2,
    "warmup_steps": 2,
    "learning_rate": 1e-3,
}


def command(*arguments: str | Path) -> list[str]:
    """The command line that runs the script with this Python."""
    return [sys.executable, str(SCRIPT), *map(str, arguments)]


def parsed(argv: Sequence[str], system: type[ms.System] = ms.ConditionalFlow) -> argparse.Namespace:
    """The arguments of a command line, as `ms.main` reads them."""
    kinds = (system.config_class, ms.Use)
    return commands.parse(argv, ms.MODES, kinds, system, system.released)


def environment(threads: int | None = 1) -> dict[str, str]:
    """No accelerator and `threads` threads; None for as many as the tests themselves may use."""
    chosen = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    return os.environ | chosen | {"CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}


def run_script(
    *arguments: str | Path, cwd: Path, timeout: float = 120, threads: int | None = 1
) -> subprocess.CompletedProcess[str]:
    """The finished process; stdout and stderr as text."""
    return subprocess.run(
        command(*arguments),
        cwd=cwd,
        env=environment(threads),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def run_tool(name: str, *arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The finished process of a program in tools/."""
    words = [sys.executable, str(SCRIPT.parent / "tools" / name), *map(str, arguments)]
    given: dict[str, Any] = {"cwd": cwd, "env": environment(), "text": True, "timeout": 120}
    return subprocess.run(words, capture_output=True, **given)


def start_script(*arguments: str | Path, cwd: Path) -> subprocess.Popen[str]:
    """A running process whose stdout and stderr share one pipe."""
    return subprocess.Popen(
        command(*arguments),
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def stop_when(
    process: subprocess.Popen[str], path: Path, number: signal.Signals, timeout: float = 60
) -> str:
    """Send a signal as soon as `path` exists; returns all that the process printed."""
    ends = time.monotonic() + timeout
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < ends, f"{path} did not appear"
        time.sleep(0.005)
    process.send_signal(number)
    return process.communicate(timeout=timeout)[0]


def target_picture(seed: int, height: int = 40, width: int = 48) -> np.ndarray:
    """(height, width, 3) uint8: colour ramps, a disc and stripes, all drawn by the seed."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = [
        0.5 + 0.3 * np.sin(rng.uniform(1, 9) * x + rng.uniform(1, 9) * y + rng.uniform(0, 6))
        for _ in range(3)
    ]
    picture = np.stack(waves, axis=-1)
    disc = (x - rng.uniform(0.2, 0.6)) ** 2 + (y - rng.uniform(0.2, 0.6)) ** 2 < rng.uniform(
        0.01, 0.05
    )
    picture[disc] = rng.uniform(0.1, 0.9, 3)
    return np.rint(picture.clip(0, 1) * 255).astype(np.uint8)


def dark_picture(high: np.ndarray, seed: int = 0) -> np.ndarray:
    """`high` under-exposed, with a reddish veil and a little noise."""
    rng = np.random.default_rng(seed)
    veiled = (
        high / 255 * np.array([0.16, 0.1, 0.12])
        + np.array([0.06, 0.02, 0.03])
        + rng.normal(0, 0.003, high.shape)
    )
    return np.rint(veiled.clip(0, 1) * 255).astype(np.uint8)


def save_picture(path: Path, pixels: np.ndarray, **options: Any) -> Path:
    """Write (H, W, 3) uint8 pixels; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def make_pairs(
    folder: Path, count: int, height: int = 40, width: int = 48, first_seed: int = 0
) -> Path:
    """`count` pairs NAME.png under folder/low and folder/high; returns the folder."""
    for place in range(count):
        high = target_picture(first_seed + place, height, width)
        save_picture(folder / "high" / f"{place}.png", high)
        save_picture(folder / "low" / f"{place}.png", dark_picture(high, place))
    return folder


def tiny_config(folder: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a tiny run with data in folder/data/{train,val,eval} and output in `folder`."""
    data = folder / "data"
    dirs = {
        f"{part}_{kind}_dir": str(data / part / kind)
        for part in ("train", "val", "eval")
        for kind in ("low", "high")
    }
    outputs = {
        f"{kind}_dir": str(folder / name)
        for kind, name in (("checkpoint", "ckpt"), ("log", "logs"), ("results", "results"))
    }
    return TINY | dirs | outputs | changes


def make_data(folder: Path, train: int = 5, val: int = 1, evaluation: int = 1) -> Path:
    """Train, validation and evaluation pairs under folder/data; returns `folder`."""
    for part, count, seed in (("train", train, 0), ("val", val, 100), ("eval", evaluation, 200)):
        make_pairs(folder / "data" / part, count, first_seed=seed)
    return folder


def write_config(folder: Path, **changes: Any) -> Path:
    """folder/config.json with the tiny settings."""
    path = folder / "config.json"
    path.write_text(json.dumps(tiny_config(folder, **changes)), encoding="utf-8")
    return path


def main_with(
    mode: str,
    settings: dict[str, Any],
    *arguments: str | Path,
    system: type[ms.System] = ms.ConditionalFlow,
) -> int:
    """Run a mode in this process; returns its exit status."""
    path = Path(settings["results_dir"]).parent / "settings.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings), encoding="utf-8")
    return ms.main(["--mode", mode, "--config", str(path), *map(str, arguments)], system)


def differing(a: Any, b: Any, place: str = "") -> list[str]:
    """Where two trees of dicts, lists, tensors and plain values differ; tensors bit for bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [place]
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [f"{place}: {sorted(map(str, a.keys() ^ b.keys()))}"]
        return [found for key in a for found in differing(a[key], b[key], f"{place}/{key}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        if len(a) != len(b):
            return [place]
        return [
            found
            for i, (x, y) in enumerate(zip(a, b, strict=True))
            for found in differing(x, y, f"{place}/{i}")
        ]
    return [] if type(a) is type(b) and a == b else [f"{place}: {a!r} {b!r}"]


def assert_one_line_error(status: int, stderr: str, *words: str, expected: int = 2) -> None:
    """What every mistake promises: the status, and one line that starts with error:, no traceback.

    The line names `words`.
    """
    lines = [line for line in stderr.splitlines() if line.strip()]
    assert status == expected, stderr
    assert len(lines) == 1 and lines[0].startswith("error: "), stderr
    assert "Traceback" not in stderr
    for word in words:
        assert word in lines[0], lines[0]


def files_under(folder: Path) -> set[str]:
    """Every file and folder, hidden ones too, relative to `folder`; but no journal of outputs."""
    found = {path for path in folder.rglob("*") if path.name != journal.NAME}
    return {str(path.relative_to(folder)) for path in found}
