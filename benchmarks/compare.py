"""One table for every system: the same data, budget, machine and evaluator.

    python benchmarks/compare.py [--minutes 20] [--weights SYSTEM=FILE ...] [--only SYSTEM ...] [--set KEY=VALUE ...]

Systems: ConditionalFlow (this project's, by the published recipe), RetinexNet, UPTFlow and AnlightenDiff (baselines/), and
two floors without training, gamma 0.4 and histogram equalisation as scikit-image does them. A system without --weights is
trained for --minutes by its own CPU recipe. Every one is scored on the evaluation pairs by `score_pairs`, at 128x128
unless --set eval_size says otherwise; --set reaches every system's config (data folders, device, ...).

Writes results/comparison_*/: comparison.csv, comparison.md, a strip of pictures for every scene, the trained weights.
Seconds are what `--mode enhance` reports for one 600x400 picture, reading and writing included, the median of three
processes; MiB is the largest of their peak memories.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import skimage.exposure  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor  # noqa: E402

import model_script as ms  # noqa: E402
from baselines import SYSTEMS, classes  # noqa: E402

METRICS = ("psnr", "ssim", "ciede2000", "psnr_gt_mean", "ssim_grey_gt_mean", "lpips", "bits_per_dim")


class Floor(ms.System):
    """A classical method on (1, 3, H, W) pictures in [0, 1], behind the models' interface."""

    def __init__(self, name: str, config: ms.Config) -> None:
        super().__init__(config)
        self.name = name

    def enhance(self, low: Tensor, temperature: float = 0.0) -> Tensor:
        image = low[0].permute(1, 2, 0).double().cpu().numpy()
        if self.name == "gamma 0.4":
            image = skimage.exposure.adjust_gamma(image, 0.4)
        else:  # each channel by itself: that takes the infrared tint away, too
            image = np.stack([skimage.exposure.equalize_hist(channel) for channel in image.transpose(2, 0, 1)], axis=-1)
        return torch.from_numpy(image).permute(2, 0, 1)[None].float()


def train(system: str, minutes: float, folder: Path, overrides: dict[str, Any]) -> Path:
    """The best weights of a run of `minutes` by the system's own recipe."""
    model_class, config_class = classes(system)
    settings = ms.read_config_file(str(ROOT / SYSTEMS[system][3])) | overrides
    settings |= dict(max_minutes=minutes, num_epochs=100_000, checkpoint_dir=str(folder), log_dir=str(folder / "logs"))
    ms.Trainer(ms.apply_settings(config_class(), settings, system), model_class).fit()
    return folder / "best_model.pth"


def training_speed(weights: Path, batch_size: int) -> float:
    """Training images a second, as the newest checkpoint beside the weights tells; nan where none is."""
    checkpoints = sorted(weights.parent.glob("checkpoint_epoch_*.pth"), key=lambda path: path.stat().st_mtime)
    if not checkpoints:
        return float("nan")
    training = torch.load(checkpoints[-1], weights_only=True)["training"]
    return training["step"] * batch_size / (60 * training["minutes"])


def enhance_cost(system: str, weights: Path, device: str) -> tuple[float, float]:
    """(seconds, peak MiB) of enhancing one 600x400 picture in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        low = Path(name) / "low.png"
        Image.fromarray(np.random.default_rng(0).integers(0, 40, (400, 600, 3), dtype=np.uint8)).save(low)
        code = "import resource, sys; from {0} import *; import model_script as ms; "
        code += "status = ms.main(sys.argv[1:], {1}, {2}); print('PEAK', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); "
        code += "sys.exit(status)"
        arguments = ["--mode", "enhance", "--checkpoint", str(weights.resolve()), "--input", str(low)]
        arguments += ["--output", f"{name}/out.png", "--set", f"device={device}"]
        command = ["-c", code.format(*SYSTEMS[system][:3]), *arguments]
        # exec from a shell: a child counts at birth the memory of the process that forked it, which holds torch here
        done = subprocess.run(
            ["/bin/sh", "-c", 'exec "$0" "$@"', sys.executable, *command], cwd=ROOT, capture_output=True, text=True
        )
    if done.returncode:
        sys.exit(f"{system}: {done.stderr}")
    scale = 2**20 if sys.platform == "darwin" else 2**10
    return float(re.findall(r"([\d.]+) s on ", done.stdout)[0]), int(done.stdout.split("PEAK")[1]) / scale


def score(
    model: ms.System, config: ms.Config, runtime: ms.Runtime, store: ms.PairStore, twins: list[bool | None]
) -> tuple[dict[str, float], dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """(mean metrics, low, enhanced and high pictures by name)."""
    rows, low, enhanced, high = [], {}, {}, {}
    for scored in ms.score_pairs(model, store, config, runtime, twins):
        name = Path(scored.row["filename"]).stem
        rows.append(scored.row)
        low[name], enhanced[name], high[name] = scored.low, scored.enhanced, scored.high
    fresh = [row for row in rows if not row["twin_in_training"]] or rows
    means = {metric: float(np.mean([row[metric] for row in rows])) for metric in METRICS if metric in rows[0]}
    return means | {"psnr_no_twin": float(np.mean([row["psnr"] for row in fresh]))}, low, enhanced, high


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a table."""
    head = list(rows[0])
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(str(row[key]) for key in head) + " |" for row in rows)]) + "\n"


def main() -> None:
    """Train or load, score, and write the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--weights", action="append", default=[], metavar="SYSTEM=FILE")
    parser.add_argument("--only", action="append", choices=SYSTEMS, help="systems to compare; default: all")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    overrides = dict(ms.parse_assignment(text, ms.Config) for text in arguments.set)
    weights = {system: Path(path) for system, _, path in (text.partition("=") for text in arguments.weights)}
    base = ms.apply_settings(ms.Config(), {"eval_size": "128,128", **overrides}, "--set")
    store = ms.PairStore(ms.find_pairs(base.eval_low_dir, base.eval_high_dir, "eval"), base)
    folder = ms.results_folder(base.results_dir, "comparison")
    rows: list[dict[str, Any]] = []
    shown: dict[str, dict[str, Tensor]] = {}
    twins: list[bool | None] = [None] * len(store)
    for system in arguments.only or SYSTEMS:
        if system not in weights:
            weights[system] = train(system, arguments.minutes, folder / "weights" / system, overrides)
        model, config, runtime, checkpoint = ms.load_model(
            str(weights[system]), {"eval_size": base.eval_size, "device": base.device}, *classes(system)
        )
        twins = ms.training_twins(store, checkpoint)
        means, low, shown[system], high = score(model, config, runtime, store, twins)
        costs = [enhance_cost(system, weights[system], base.device) for _ in range(3)]
        seconds, memory = statistics.median(cost[0] for cost in costs), max(cost[1] for cost in costs)
        size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        rows.append({"system": system, **{k: round(v, 4) for k, v in means.items()}, "parameters_M": round(size, 2)})
        speed = training_speed(weights[system], config.batch_size)
        rows[-1] |= {"train_images_per_s": round(speed, 2), "seconds_600x400": seconds, "MiB_600x400": round(memory)}
        print(rows[-1], flush=True)
        ms.write_csv(folder / "comparison.csv", rows)
    for name in ("gamma 0.4", "histogram equalisation"):
        means, low, shown[name], high = score(Floor(name, base), base, ms.choose_runtime(base), store, twins)
        rows.append({"system": name, **{k: round(v, 4) for k, v in means.items()}})
    keys = list(dict.fromkeys(key for row in rows for key in row))
    rows = [{key: row.get(key, "") for key in keys} for row in rows]
    for name in high:
        strip = ms.triptych(
            [low[name], *(pictures[name] for pictures in shown.values()), high[name]], ["input", *shown, "target"]
        )
        ms.write_image(folder / "strips" / f"{name}.png", strip)
    ms.write_csv(folder / "comparison.csv", rows)
    with ms.atomic_path(folder / "comparison.md") as temporary:
        temporary.write_text(markdown(rows), encoding="utf-8")
    print(markdown(rows))
    print(f"{folder}: comparison.csv, comparison.md, strips/")


if __name__ == "__main__":
    main()
