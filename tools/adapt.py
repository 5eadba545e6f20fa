"""Adapt a network to your own camera from a few pairs, and say whether that helped.

    python tools/adapt.py --low MINE/low --high MINE/high --output checkpoints/mine.pth

So few pairs leave none to spare for validation. So the pairs are divided into folds, whole scenes
each. For each fold a network is trained on the other pairs and scored on this fold's, which it has
not seen, beside the network that it started from. Where that helped by more than chance, a last
training on all pairs makes the output; where it did not, the output is the network from the start.
MINE.json, beside the output, holds every score.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from repository import ROOT, load_any

import model_script as ms
from support import checkpoints, files, known, settings
from support.commands import run, shipped
from support.pairs import Pair, PairStore, find_pairs
from support.scenes import find_scenes
from support.settings import OneLineParser, UserError

SCORES = ("psnr", "psnr_gt_mean", "ssim", "ciede2000")


class Task(NamedTuple):
    """What the command line asks for, checked."""

    low: Path
    high: Path
    output: Path
    checkpoint: str
    config: str
    folds: int
    minutes: float
    given: dict[str, Any]  # settings over those of the config


def read_command_line(argv: Sequence[str] | None) -> Task:
    """Raises UserError."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--low", required=True, help="folder of dark photographs")
    parser.add_argument("--high", required=True, help="their targets, paired by file stem")
    parser.add_argument("--output", required=True, help="the adapted network, a .pth")
    weights = "what to start from: a file, or released (the default) or fast"
    parser.add_argument("--checkpoint", type=shipped, default=str(ms.RELEASED), help=weights)
    parser.add_argument("--config", default=str(ROOT / "configs" / "adapt.json"), help="recipe")
    parser.add_argument("--folds", type=int, default=3, help="at most so many (default 3)")
    parser.add_argument("--minutes", type=float, default=9.0, help="of all trainings together")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    found = parser.parse_args(argv)
    if Path(found.output).suffix != ".pth":
        raise UserError(f"--output {found.output}: the suffix must be .pth")
    if found.folds < 2 or not 0 < found.minutes < 1e6:
        raise UserError("--folds must be at least 2 and --minutes above 0")
    for option in ("low", "high"):
        if not Path(getattr(found, option)).is_dir():
            raise UserError(f"--{option} {getattr(found, option)}: no such folder; name another")
    given = settings.read_all((ms.Config, ms.Use), found.config, found.set, ())
    paths = (Path(found.low), Path(found.high), Path(found.output), found.checkpoint, found.config)
    return Task(*paths, found.folds, found.minutes, given)


def folds_of(thumbnails: np.ndarray, similarity: float, most: int) -> list[list[int]]:
    """The indices of (N, 16, 16, 3) thumbnails in at most `most` folds of about one size, whole
    scenes each. Raises UserError where there are too few scenes."""
    scenes = sorted(find_scenes(thumbnails, similarity), key=len, reverse=True)
    if len(scenes) < 2:  # one to train on, one to score
        raise UserError("--low: all pairs show one scene; add pairs of at least one other")
    folds: list[list[int]] = [[] for _ in range(min(most, len(scenes)))]
    for scene in scenes:
        min(folds, key=len).extend(scene)
    return [sorted(fold) for fold in folds]


def lay_out(pairs: Sequence[Pair], folder: Path) -> dict[str, str]:
    """Links to (or copies of) the pairs in folder/low and folder/high, which are returned."""
    for kind in ("low", "high"):
        (folder / kind).mkdir(parents=True)
        for pair in pairs:
            source = (pair.low if kind == "low" else pair.high).resolve()
            target = folder / kind / f"{pair.name}{source.suffix}"
            try:
                target.symlink_to(source)
            except OSError:  # some systems allow links to administrators alone
                shutil.copy(source, target)
    return {f"{kind}_dir": str(folder / kind) for kind in ("low", "high")}


class Adapter:
    """Trainings that share a start, a recipe and a scratch folder."""

    def __init__(self, task: Task, released: ms.Loaded, store: PairStore, folder: Path) -> None:
        self.task, self.store, self.folder = task, store, folder
        self.system = type(released.model)
        cameras = [released.choose(store[index][0])[1] for index in range(len(store))]
        # most of the pictures decide, as one network is adapted
        self.camera = max(set(cameras), key=cameras.count)
        infrared = self.camera == "infrared"
        self.start = released.infrared if infrared else released.model
        self.runtime = released.runtime
        self.stored = released.checkpoint

    def train(self, name: str, indices: Sequence[int], minutes: float) -> str:
        """Train on the pairs of `indices`; returns the checkpoint of the last step."""
        place = self.folder / name
        chosen = [self.store.pairs[index] for index in indices]
        folders = lay_out(chosen, place / "train")
        # the trainer wants to validate; nothing is chosen by that, so one known pair will do
        shown = lay_out(chosen[:1], place / "shown")
        # these two load_model leaves as the start was trained; the recipe's count here
        recipe = {k: v for k, v in self.task.given.items() if k in ("crop_size", "image_size")}
        values = dataclasses.asdict(self.start.config) | recipe
        values |= {f"train_{key}": value for key, value in folders.items()}
        values |= {f"val_{key}": value for key, value in shown.items()}
        values |= {"sources": [], "init_from": self.task.checkpoint, "max_minutes": minutes}
        values |= {"checkpoint_dir": str(place / "weights"), "log_dir": str(place / "logs")}
        values |= {"val_freq": 10**6, "save_freq": 10**6}  # at the end, which no other point is
        config = settings.build(self.system.config_class, values, self.task.config)
        use = settings.build(ms.Use, {**self.task.given, "camera": self.camera or "auto"}, "--set")
        if status := ms.Trainer(config, use, self.system).fit():
            sys.exit(status)
        return str(checkpoints.newest_checkpoint(place / "weights"))

    def scores(self, model: ms.System, indices: Sequence[int]) -> list[dict[str, float]]:
        """The rows of `score_pair` for the pairs of `indices`, at their own size."""
        rows = []
        for index in indices:
            low, high = self.store[index]
            row = ms.score_pair(model, low, high, None, ms.Use(), self.runtime, index).row
            rows.append({name: row[name] for name in SCORES})
        return rows

    def load(self, path: str) -> ms.System:
        """The model of a checkpoint that `train` wrote."""
        device = self.task.given.get("device", "auto")
        return ms.load_model(path, {"device": device}, self.system).model


def worth(row: dict[str, float]) -> float:
    """What decides: as for the best weights of several sources, see metrics.validation_means."""
    return (row["psnr"] + row["psnr_gt_mean"]) / 2 + 20 * row["ssim"]


def verdict(before: Sequence[dict[str, float]], after: Sequence[dict[str, float]]) -> bool:
    """Whether unseen pairs gained by more than one standard error of the mean gain."""
    gains = np.array([worth(b) - worth(a) for a, b in zip(before, after, strict=True)])
    return bool(gains.mean() > gains.std(ddof=1) / np.sqrt(len(gains)))


def table(before: Sequence[dict[str, float]], after: Sequence[dict[str, float]]) -> Iterator[str]:
    """Lines that compare the means on unseen pairs."""
    yield f"{'unseen pairs':14} {'before':>8} {'after':>8} {'gain':>8}   pairs that gained"
    for name in SCORES:
        old, new = (np.array([row[name] for row in rows]) for rows in (before, after))
        sign = -1 if name == "ciede2000" else 1
        better = int((sign * (new - old) > 0).sum())
        means = f"{old.mean():8.3f} {new.mean():8.3f} {(new - old).mean():+8.3f}"
        yield f"{name:14} {means}   {better} of {len(old)}"


@contextmanager
def scratch(output: Path) -> Iterator[Path]:
    """A temporary folder beside the output, which is gone afterwards."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.stem}_", dir=output.parent) as name:
        yield Path(name)


def adapt(task: Task) -> dict[str, Any]:
    """Cross-validate, decide, write `task.output` and the report beside it, which is returned."""
    released = load_any(task.checkpoint, task.given)
    pairs = find_pairs(str(task.low), str(task.high), "train")
    use = settings.build(ms.Use, task.given, "--set")
    store = PairStore(pairs, use.cache_megabytes * 2**20, use.on_bad_file == "skip")
    similarity = settings.build(ms.Config, task.given, task.config).scene_similarity
    folds = folds_of(store.thumbnails, similarity, task.folds)
    minutes = task.minutes / (len(folds) + 1)
    with scratch(task.output) as folder:
        adapter = Adapter(task, released, store, folder)
        network = f"the {adapter.camera} network of " if adapter.camera else ""
        print(f"{len(store)} pairs in {len(folds)} folds, from {network}{task.checkpoint}")
        before, after, places = [], [], []
        for number, fold in enumerate(folds):
            rest = sorted(set(range(len(store))) - set(fold))
            weights = adapter.train(f"fold{number}", rest, minutes)
            before += adapter.scores(adapter.start, fold)
            after += adapter.scores(adapter.load(weights), fold)
            places += fold
        better = verdict(before, after)
        for line in table(before, after):
            print(line)
        if better:
            weights = adapter.train("all", range(len(store)), minutes)
            found = checkpoints.load_checkpoint(weights)
            print(f"{task.output}: adapted, trained on all {len(store)} pairs")
        else:
            print(f"{task.output}: the network from the start, as adapting it did not help")
            found = {k: v for k, v in adapter.stored.items() if k != "cameras"}
            found["model"] = adapter.start.state_dict()
        write(task, adapter, found)
    names = [store.pairs[place].name for place in places]
    rows = [
        {"pair": name, "before": old, "after": new}
        for name, old, new in zip(names, before, after, strict=True)
    ]
    report = {"adapted": better, "checkpoint": task.checkpoint, "camera": adapter.camera}
    report |= {"pairs": rows, "folds": len(folds), "minutes": task.minutes}
    files.write_json(task.output.with_suffix(".json"), report)
    return report


def write(task: Task, adapter: Adapter, found: dict[str, Any]) -> None:
    """The output, without what only a training needs and without this machine's folders."""
    content = {k: v for k, v in found.items() if k not in ("training", "format_version")}
    emptied = ("_low_dir", "_high_dir", "init_from")
    kept = {k: "" if k.endswith(emptied) else v for k, v in content["config"].items()}
    content["config"] = kept | {"checkpoint_dir": "checkpoints", "log_dir": "logs"}
    seen = [torch.from_numpy(adapter.store.thumbnails), adapter.stored.get("training_thumbnails")]
    content["training_thumbnails"] = torch.cat([part for part in seen if part is not None])
    similarity = settings.build(ms.Config, task.given, task.config).scene_similarity
    own = known.looks_in(adapter.store, similarity)
    looks = known.extended(adapter.stored.get("known"), *own)
    content |= {} if looks is None else {"known": looks}
    checkpoints.save_checkpoint(task.output, content)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""

    def work() -> int:
        adapt(read_command_line(argv))
        return 0

    return run(work)


if __name__ == "__main__":
    sys.exit(main())
