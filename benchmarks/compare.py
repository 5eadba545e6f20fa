"""One table for every system: the same data, budget, machine and evaluator.

    python benchmarks/compare.py [--minutes 20] [--weights SYSTEM=FILE ...] \\
        [--only SYSTEM ...] [--outputs NAME=FOLDER ...] [--apart SIMILARITY] [--set KEY=VALUE ...]

Systems: ConditionalFlow (this project's, by the published recipe), RetinexNet, UPTFlow and
AnlightenDiff (baselines/), and three methods without training, gamma 0.4, histogram equalisation
and CLAHE as scikit-image does them. --outputs adds a row of pictures that another method made: the
FOLDER holds one for every pair, of the target's size or eval_size, with the stem of the dark
picture. --only none trains and loads no system. A system without --weights is trained for --minutes
by its own CPU recipe. Every one is scored on the evaluation pairs by the script's evaluator, at
128x128 unless --set eval_size says otherwise. --set reaches every system's config (data folders,
device, ...). psnr_no_twin leaves out targets that are training targets, too; with --apart 0.98 also
those that are another take of a training scene.

Writes results/comparison_*/: comparison.csv, comparison.md, a strip of pictures for every scene,
the trained weights. Seconds are what `--mode enhance` reports for one 600x400 picture, reading and
writing included, the median of three processes. MiB is the largest of their peak memories, with
what they took of a GPU.
"""

from __future__ import annotations

import argparse
import copy
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import skimage.exposure  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor  # noqa: E402

import model_script as ms  # noqa: E402
from baselines import SYSTEMS, system_class  # noqa: E402
from support import settings  # noqa: E402
from support.checkpoints import load_checkpoint, newest_checkpoint  # noqa: E402
from support.extra_metrics import ExtraMetric, load_extra  # noqa: E402
from support.files import atomic_path, results_folder, write_csv  # noqa: E402
from support.outputs import check_outputs, with_outputs  # noqa: E402
from support.pairs import evaluation_pairs  # noqa: E402
from support.pictures import write_image  # noqa: E402
from support.runtime import choose_runtime  # noqa: E402
from support.scenes import known_thumbnails, seen_scenes, training_twins  # noqa: E402
from support.settings import OneLineParser, UserError, complain  # noqa: E402

# by --minutes and the results folder
GIVEN = ("max_minutes", "num_epochs", "checkpoint_dir", "log_dir")
FLOORS = ("gamma 0.4", "histogram equalisation", "CLAHE")
METRICS = (
    "psnr",
    "ssim",
    "ciede2000",
    "psnr_gt_mean",
    "ssim_grey_gt_mean",
    "bits_per_dim",
)


class Floor(ms.System):
    """A classical method on (1, 3, H, W) pictures in [0, 1], behind the models' interface."""

    def __init__(self, name: str, config: ms.Config) -> None:
        super().__init__(config)
        self.kind = name

    def enhance(self, low: Tensor, temperature: float = 0.0) -> Tensor:
        image = low[0].permute(1, 2, 0).double().cpu().numpy()
        if self.kind == "gamma 0.4":
            image = skimage.exposure.adjust_gamma(image, 0.4)
        elif self.kind == "CLAHE":  # of the value channel: hue and saturation stay
            image = skimage.exposure.equalize_adapthist(image)
        else:  # each channel by itself: that takes the infrared tint away, too
            image = np.stack(
                [skimage.exposure.equalize_hist(channel) for channel in image.transpose(2, 0, 1)],
                axis=-1,
            )
        return torch.from_numpy(image).permute(2, 0, 1)[None].float()


class Task(NamedTuple):
    """What the command line asks for, checked."""

    minutes: float
    weights: dict[str, Path]
    only: list[str]
    overrides: dict[str, Any]
    config: ms.Config
    use: ms.Use
    outputs: dict[str, str]
    apart: float

    def store(self) -> ms.PairStore:
        """The pairs to score."""
        room, skip = self.use.cache_megabytes * 2**20, self.use.on_bad_file == "skip"
        return ms.PairStore(evaluation_pairs(self.use), room, skip)


def read_command_line(
    description: str | None,
    minutes: float,
    systems: dict[str, str],
    take_outputs: bool = False,
    **defaults: Any,
) -> Task:
    """--minutes, --weights NAME=FILE, --only NAME, --set KEY=VALUE and, where `take_outputs`,
    --outputs NAME=FOLDER.

    `systems` says whose weights NAME's are. Raises UserError, before hours of training, for what
    cannot work.
    """
    parser = OneLineParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=minutes, help="training of each")
    parser.add_argument(
        "--weights", action="append", default=[], metavar="NAME=FILE", help="do not train this one"
    )
    nobody = ["none"] if take_outputs else []
    choices = [*systems, *nobody]
    parser.add_argument("--only", action="append", choices=choices, help="default: all")
    if take_outputs:
        parser.add_argument(
            "--outputs",
            action="append",
            default=[],
            metavar="NAME=FOLDER",
            help="pictures to score",
        )
        parser.add_argument(
            "--apart",
            type=float,
            default=0.0,
            metavar="SIMILARITY",
            help="twins: also targets that correlate so much with a training target, such as 0.98",
        )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="for all of them"
    )
    arguments = parser.parse_args()
    if not arguments.minutes > 0:
        raise UserError(f"--minutes must be above 0, got {arguments.minutes:g}")
    overrides = settings.read_all((ms.Config, ms.Use), None, arguments.set, ())
    for key in GIVEN:
        if key in overrides:
            raise UserError(f"--set {key}: --minutes and results_dir say that here; leave it out")
    if "outputs_dir" in overrides:
        raise UserError("--set outputs_dir: a comparison takes --outputs NAME=FOLDER instead")
    config = settings.build(ms.Config, defaults | overrides, "--set")
    use = settings.build(ms.Use, defaults | overrides, "--set")
    weights = {}
    for name, _, path in (text.partition("=") for text in arguments.weights):
        if name not in systems:
            raise UserError(
                f"--weights {name}={path}: write NAME=FILE with one of the names"
                f" {'; '.join(systems)}"
            )
        ms.load_model(path, overrides, system_class(systems[name]))
        weights[name] = Path(path)
    only = [name for name in arguments.only or systems if name not in nobody]
    outputs = named_folders(arguments.outputs, systems) if take_outputs else {}
    apart = arguments.apart if take_outputs else 0.0
    if not 0 <= apart <= 1:
        raise UserError(f"--apart must be in [0, 1], got {apart:g}")
    return Task(arguments.minutes, weights, only, overrides, config, use, outputs, apart)


def named_folders(texts: Sequence[str], systems: Collection[str]) -> dict[str, str]:
    """{'net': 'folder'} of ['net=folder'], the words after --outputs. Raises UserError."""
    found: dict[str, str] = {}
    for text in texts:
        name, _, folder = text.partition("=")
        if not (name.strip() and folder):
            raise UserError(f"--outputs {text}: write NAME=FOLDER")
        if name in found or name in (*systems, *FLOORS):
            raise UserError(f"--outputs {text}: another row has the name {name}; choose another")
        found[name] = folder
    return found


def train(system: str, task: Task, folder: Path, changes: dict[str, Any] | None = None) -> Path:
    """The best weights of a run by the system's own recipe, the task's settings and the `changes`.

    Ctrl-C ends it all.
    """
    kind = system_class(system)
    kinds = (kind.config_class, ms.Use)
    chosen = settings.read_all(kinds, str(ROOT / SYSTEMS[system][2]), [], kind.unused)
    chosen |= {"device": task.use.device} | task.overrides
    chosen |= {"max_minutes": task.minutes, "num_epochs": 100_000, **(changes or {})}
    chosen |= {"checkpoint_dir": str(folder), "log_dir": str(folder / "logs")}
    config, use = (settings.build(kind, chosen, system) for kind in kinds)
    status = ms.Trainer(config, use, kind).fit()
    if status:
        sys.exit(status)
    return folder / "best_model.pth"


def training_speed(weights: Path) -> float:
    """Training images a second, by the newest checkpoint beside the weights; nan without one."""
    path = newest_checkpoint(weights.parent)
    if path is None:
        return float("nan")
    newest = load_checkpoint(path)
    return (
        newest["training"]["step"]
        * newest["config"]["batch_size"]
        / (60 * newest["training"]["minutes"])
    )


def enhance_cost(system: str, weights: Path, device: str) -> tuple[float, float]:
    """(seconds, peak MiB) of enhancing one 600x400 picture in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        low = Path(name) / "low.png"
        Image.fromarray(
            np.random.default_rng(0).integers(0, 40, (400, 600, 3), dtype=np.uint8)
        ).save(low)
        code = "import resource, sys, torch; from {0} import {1}; import model_script as ms; "
        code += "status = ms.main(sys.argv[1:], {1}); gpu = torch.cuda.max_memory_allocated(); "
        code += (
            "print('PEAK', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, gpu);"
            " sys.exit(status)"
        )
        arguments = [
            "--mode",
            "enhance",
            "--checkpoint",
            str(weights.resolve()),
            "--input",
            str(low),
        ]
        arguments += ["--output", f"{name}/out.png", "--set", f"device={device}"]
        command = ["-c", code.format(*SYSTEMS[system][:2]), *arguments]
        # as a shell's child: a process counts at birth the memory of the one that forked it, which
        # holds torch here
        done = subprocess.run(
            ["/bin/sh", "-c", '"$0" "$@"; exit $?', sys.executable, *command],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
    if done.returncode:
        sys.exit(f"{system}: {done.stderr}")
    memory, gpu = map(int, done.stdout.split("PEAK")[1].split())
    scale = 2**20 if sys.platform == "darwin" else 2**10
    return float(re.findall(r"([\d.]+) s on ", done.stdout)[0]), memory / scale + gpu / 2**20


def score(
    loaded: ms.Loaded,
    store: ms.PairStore,
    twins: Sequence[bool | None],
    extra: Sequence[ExtraMetric] = (),
) -> tuple[dict[str, float], dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """(mean metrics, low, enhanced and high pictures by name)."""
    rows, low, enhanced, high = [], {}, {}, {}
    for scored in ms.score_pairs(loaded, store, twins, extra):
        name = Path(scored.row["filename"]).stem
        rows.append(scored.row)
        low[name], enhanced[name], high[name] = scored.strip
    names = [*METRICS, *(column for metric in extra for column in metric.columns)]
    means = {name: float(np.mean([row[name] for row in rows])) for name in names if name in rows[0]}
    # outputs have no twins of their own: those of the other rows' training are left out of all
    fresh = [row for row, twin in zip(rows, twins, strict=True) if not twin] or rows
    return (
        means | {"psnr_no_twin": float(np.mean([row["psnr"] for row in fresh]))},
        low,
        enhanced,
        high,
    )


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a table."""
    head = list(rows[0])
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return (
        "\n".join(
            [*lines, *("| " + " | ".join(str(row[key]) for key in head) + " |" for row in rows)]
        )
        + "\n"
    )


def store_of(store: ms.PairStore, folder: str, task: Task) -> ms.PairStore:
    """The store with the outputs in `folder`, all read once. Raises UserError where one is missing
    or bad: a mean over fewer pairs cannot be compared."""
    told: list[str] = []
    with_them = copy.copy(store)
    with_them.pairs = with_outputs(store.pairs, folder, told.append)
    if told:
        raise UserError(f"--outputs: {told[0].split('; ')[0]}; add them, or choose with scenes")
    check_outputs(with_them, task.use.size_to_score(task.config))
    return with_them


def twins_of(
    thumbnails: np.ndarray, checkpoint: dict[str, Any], apart: float
) -> Sequence[bool | None]:
    """For each target whether it trained these weights or, with `apart`, looks like one that did;
    None where that is not known."""
    past = known_thumbnails(checkpoint, "training_thumbnails")
    if not apart or past is None:
        return training_twins(thumbnails, checkpoint)
    return seen_scenes(thumbnails, past, apart).tolist()


def compare(task: Task) -> None:
    """Train or load, score, and write the comparison."""
    use, weights, store = task.use, task.weights, task.store()
    runtime = choose_runtime(use.device, False)
    extra = load_extra(use.extra_metrics, True, runtime.device)
    stores = {name: store_of(store, path, task) for name, path in task.outputs.items()}
    folder = results_folder(use.results_dir, "comparison")
    rows: list[dict[str, Any]] = []
    shown: dict[str, dict[str, Tensor]] = {}
    twins: Sequence[bool | None] = [None] * len(store)
    for system in task.only:
        if system not in weights:
            weights[system] = train(system, task, folder / "weights" / system)
        given = task.overrides | {"eval_size": use.eval_size}
        loaded = ms.load_model(str(weights[system]), given, system_class(system))
        twins = twins_of(store.thumbnails, loaded.checkpoint, task.apart)
        means, low, shown[system], high = score(loaded, store, twins, extra)
        costs = [enhance_cost(system, weights[system], use.device) for _ in range(3)]
        seconds, memory = (
            statistics.median(cost[0] for cost in costs),
            max(cost[1] for cost in costs),
        )
        size = sum(parameter.numel() for parameter in loaded.model.parameters()) / 1e6
        rows.append(
            {
                "system": system,
                **{k: round(v, 4) for k, v in means.items()},
                "parameters_M": round(size, 2),
            }
        )
        speed = training_speed(weights[system])
        rows[-1] |= {
            "train_images_per_s": round(speed, 2),
            "seconds_600x400": seconds,
            "MiB_600x400": round(memory),
        }
        print(rows[-1], flush=True)
        write_csv(folder / "comparison.csv", rows)
    stores |= dict.fromkeys(FLOORS, store)
    for name in stores:
        floor = ms.Loaded(Floor(name, task.config), use, runtime, {})
        means, low, shown[name], high = score(floor, stores[name], twins, extra)
        rows.append({"system": name, **{k: round(v, 4) for k, v in means.items()}})
    keys = list(dict.fromkeys(key for row in rows for key in row))
    rows = [{key: row.get(key, "") for key in keys} for row in rows]
    for name in high:
        strip = ms.triptych(
            [low[name], *(pictures[name] for pictures in shown.values()), high[name]],
            ["input", *shown, "target"],
        )
        write_image(folder / "strips" / f"{name}.png", strip)
    write_csv(folder / "comparison.csv", rows)
    with atomic_path(folder / "comparison.md") as temporary:
        temporary.write_text(markdown(rows), encoding="utf-8")
    print(markdown(rows))
    print(f"{folder}: comparison.csv, comparison.md, strips/")


def main() -> int:
    """The comparison that the command line asks for; returns the exit status."""
    try:
        compare(
            read_command_line(
                __doc__, 20, {name: name for name in SYSTEMS}, True, eval_size="128,128"
            )
        )
    except UserError as error:
        return complain(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
