"""What the script computes, as one fingerprint a job: run it before and after a change that must
not alter results.

    python tests/pins.py > before.txt       # then change the code
    python tests/pins.py | diff before.txt -

Every job goes through the command line, on one thread in fp32, so the lines are equal bit for bit
on one machine and one PyTorch. On other machines they differ in the last digits: `test_pins.py`
compares numbers there, with a tolerance.
"""

from __future__ import annotations

import csv
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
RELEASED = next(
    path
    for name in ("november", "released", "best_model")
    if (path := ROOT / "checkpoints" / f"{name}.pth").exists()
)


def scene(seed: int, height: int = 150, width: int = 202) -> np.ndarray:
    """(height, width, 3) uint8: a smooth picture with edges; two seeds give pictures that do not
    correlate."""
    rng = np.random.default_rng((5, seed))
    coarse = Image.fromarray(rng.integers(20, 256, (7, 9, 3), dtype=np.uint8))
    picture = np.array(coarse.resize((width, height), Image.Resampling.BICUBIC))
    picture[height // 3 : height // 2, width // 4 : width // 2] = rng.integers(0, 256, 3)
    return picture


def darkened(high: np.ndarray, seed: int) -> np.ndarray:
    """(H, W, 3) uint8: dark, noisy and red."""
    rng = np.random.default_rng((6, seed))
    low = high * np.array([0.12, 0.07, 0.09]) + rng.normal(4, 2, high.shape)
    return np.clip(np.rint(low), 0, 255).astype(np.uint8)


def large_low() -> np.ndarray:
    """(300, 340, 3) uint8: so large that tile_size=64 makes four tiles of it."""
    return darkened(scene(0, 300, 340), 0)


def write_pairs(folder: Path, count: int, first: int) -> None:
    """`count` pairs under folder/low and folder/high."""
    for part in ("low", "high"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for place in range(first, first + count):
        high = scene(place)
        for kind, pixels in (("high", high), ("low", darkened(high, place))):
            Image.fromarray(pixels).save(folder / kind / f"{place}.png")


def run(folder: Path, mode: str, *arguments: str) -> None:
    """One mode of the script in `folder`, on one thread."""
    command = [sys.executable, str(ROOT / "model_script.py"), "--mode", mode, *arguments]
    quiet = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(
        [*command, "--set", "device=cpu"],
        cwd=folder,
        env=quiet,
        check=True,
        capture_output=True,
        text=True,
    )


def settings(values: dict[str, Any]) -> list[str]:
    """--set KEY=VALUE for each."""
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]


def trained(folder: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """The weights after three steps of training on the pairs in folder/train: losses, gradients and
    optimizer in one."""
    tiny = dict(
        image_size="48,64",
        flow_channels=16,
        thumbnail_size=32,
        batch_size=2,
        num_epochs=1,
        warmup_steps=2,
    )
    output = dict(
        checkpoint_dir="run", log_dir="run", val_fraction=0.2, learning_rate=0.01, ema_decay=0.5
    )
    folders = dict(train_low_dir="train/low", train_high_dir="train/high")
    run(folder, "train", *settings(tiny | output | folders | changes))
    weights = torch.load(folder / "run" / "best_model.pth", weights_only=True)["model"]
    for path in (folder / "run").glob("*.pth"):
        path.unlink()
    return weights


def enhanced(folder: Path, **changes: Any) -> dict[str, np.ndarray]:
    """Name -> pixels of all that enhancing `large_low` with the released weights writes."""
    target = folder / "enhanced"
    Image.fromarray(large_low()).save(folder / "large.png")
    files = [
        "--checkpoint",
        str(RELEASED),
        "--input",
        "large.png",
        "--output",
        "enhanced/a.png",
    ]
    run(folder, "enhance", *files, *settings(changes))
    written = [path for path in sorted(target.glob("*.png")) if not path.stem.endswith("_view")]
    found = {path.name: np.asarray(Image.open(path)) for path in written}
    for path in target.glob("*.png"):
        path.unlink()
    return found


def scored(folder: Path) -> list[dict[str, str]]:
    """metrics.csv, less the seconds, of the released weights on the pairs in folder/train."""
    where = dict(eval_low_dir="train/low", eval_high_dir="train/high", results_dir="results")
    run(folder, "evaluate", "--checkpoint", str(RELEASED), *settings(where))
    with open(next((folder / "results").glob("eval_*/metrics.csv"))) as stream:
        return [
            {key: cell for key, cell in row.items() if key != "seconds"}
            for row in csv.DictReader(stream)
        ]


def fingerprint(value: Any) -> str:
    """The first 16 digits of the sha256 of arrays, tensors or texts, by sorted name."""
    digest = hashlib.sha256()
    for name, part in sorted(value.items()) if isinstance(value, dict) else enumerate(value):
        content = part if isinstance(part, dict) else np.ascontiguousarray(part)
        digest.update(f"{name} ".encode())
        digest.update(repr(content).encode() if isinstance(content, dict) else content.tobytes())
    return digest.hexdigest()[:16]


def main() -> None:
    """Print a line a job."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pairs(folder / "train", 6, 0)
        print("three steps, resized pictures", fingerprint(trained(folder)))
        print("three steps, crops", fingerprint(trained(folder, crop_size=64, accumulate=2)))
        print("enhanced whole", fingerprint(enhanced(folder)))
        drawn = dict(samples=2, uncertainty="true", exposure=0.3)
        print("enhanced whole, temperature 1", fingerprint(enhanced(folder, **drawn)))
        print("enhanced in tiles", fingerprint(enhanced(folder, tile_size=64)))
        print(
            "enhanced in tiles, temperature 1", fingerprint(enhanced(folder, tile_size=64, **drawn))
        )
        print("evaluated", fingerprint(scored(folder)))


if __name__ == "__main__":
    main()
