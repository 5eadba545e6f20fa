"""Adapting a network to a few pairs: every pair is scored unseen, and no change is called one."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import adapt
import numpy as np
import pytest
import torch
from cli_tools import TINY, assert_one_line_error, environment, files_under, save_picture
from cli_tools import target_picture as picture
from conftest import ROOT

import model_script as ms
from support.checkpoints import load_checkpoint, save_checkpoint
from support.settings import UserError

SMALL = {key: TINY[key] for key in ("flow_channels", "num_flow_blocks", "thumbnail_size")}


@pytest.fixture
def task(tmp_path: Path) -> adapt.Task:
    """Six pairs of six scenes, a fresh network to start from, a recipe of seconds."""
    for seed in range(6):
        high = picture(seed)
        save_picture(tmp_path / "high" / f"{seed}.png", high)
        save_picture(tmp_path / "low" / f"{seed}.png", high // 5)
    torch.manual_seed(0)
    config = ms.Config(**SMALL)
    content = {"config": dataclasses.asdict(config), "run_id": "start", "epoch": 1}
    content |= {"model": ms.ConditionalFlow(config).state_dict()}
    content |= {"training_thumbnails": torch.zeros(2, 16, 16, 3, dtype=torch.uint8)}
    save_checkpoint(tmp_path / "start.pth", content)
    recipe = {"image_size": [32, 32], "batch_size": 2, "learning_rate": 5e-3, "ema_decay": 0.9}
    recipe |= {"crop_size": 32, "crop_scales": [0.0]}  # the start was trained on whole pictures
    recipe |= {"device": "cpu", "warmup_steps": 2, "exposure_gain": 0.0, "num_epochs": 25}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    return adapt.read_command_line(words(tmp_path))


def words(folder: Path) -> list[str]:
    """The command line of `task`."""
    named = {"low": "low", "high": "high", "output": "mine.pth", "checkpoint": "start.pth"}
    named |= {"config": "recipe.json"}
    argv = [word for key, name in named.items() for word in (f"--{key}", str(folder / name))]
    return [*argv, "--minutes", "9", "--folds", "3"]


def test_folds_hold_whole_scenes_and_every_pair_once() -> None:
    rng = np.random.default_rng(0)
    scenes = rng.integers(0, 256, (5, 16, 16, 3), np.uint8)
    thumbnails = scenes[[0, 1, 2, 0, 3, 4, 0, 1]]
    folds = adapt.folds_of(thumbnails, 0.85, 3)
    assert sorted(i for fold in folds for i in fold) == list(range(8)) and len(folds) == 3
    assert any({0, 3, 6} <= set(fold) for fold in folds)
    assert any({1, 7} <= set(fold) for fold in folds)
    assert len(adapt.folds_of(scenes[:2], 0.85, 3)) == 2
    with pytest.raises(UserError, match="one scene"):
        adapt.folds_of(scenes[[1, 1, 1]], 0.85, 3)


def row(psnr: float) -> dict[str, float]:
    return {"psnr": psnr, "psnr_gt_mean": psnr, "ssim": 0.5, "ciede2000": 9.0}


def test_the_verdict_wants_more_than_chance() -> None:
    before = [row(20.0)] * 4
    assert adapt.verdict(before, [row(21.0), row(21.5), row(20.5), row(21.0)])
    assert not adapt.verdict(before, [row(24.0), row(19.0), row(19.5), row(20.0)])
    assert not adapt.verdict(before, before)
    assert not adapt.verdict(before, [row(19.0)] * 4)


def test_it_learns_what_is_easy_to_learn(task: adapt.Task, tmp_path: Path) -> None:
    report = adapt.adapt(task)
    assert report["adapted"] and report["folds"] == 3
    assert sorted(entry["pair"] for entry in report["pairs"]) == list("012345")
    gain = np.mean([entry["after"]["psnr"] - entry["before"]["psnr"] for entry in report["pairs"]])
    assert gain > 3  # a fresh network gives back the dark picture
    assert json.loads((tmp_path / "mine.json").read_text()) == report
    start, mine = (load_checkpoint(str(tmp_path / f"{n}.pth")) for n in ("start", "mine"))
    assert len(mine["training_thumbnails"]) == 8 and "training" not in mine
    assert str(tmp_path) not in str(mine["config"]) and mine["config"]["crop_size"] == 32
    assert not all(torch.equal(start["model"][k], mine["model"][k]) for k in start["model"])
    model = ms.load_model(str(tmp_path / "mine.pth"), {"device": "cpu"}, ms.ConditionalFlow).model
    low = torch.from_numpy(picture(1) // 5).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        assert float(model.enhance(low).mean()) > 2 * float(low.mean())
    assert {path.name for path in tmp_path.iterdir()} == {
        *("low", "high", "mine.pth", "mine.json", "start.pth", "recipe.json")
    }


def test_what_does_not_help_is_not_kept(
    task: adapt.Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    trained = []

    def nothing(self: adapt.Adapter, name: str, indices: list[int], minutes: float) -> str:
        trained.append((name, tuple(indices)))
        return task.checkpoint

    monkeypatch.setattr(adapt.Adapter, "train", nothing)
    report = adapt.adapt(task)
    assert not report["adapted"] and "did not help" in capsys.readouterr().out
    assert [name for name, _ in trained] == ["fold0", "fold1", "fold2"]
    assert all(len(indices) == 4 for _, indices in trained)
    start, mine = (load_checkpoint(str(tmp_path / f"{n}.pth")) for n in ("start", "mine"))
    assert all(torch.equal(start["model"][k], mine["model"][k]) for k in start["model"])


def test_each_fold_is_scored_by_a_network_that_has_not_seen_it(
    task: adapt.Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, set[int]] = {}
    scored: list[tuple[str, set[int]]] = []
    last = []

    def train(self: adapt.Adapter, name: str, indices: list[int], minutes: float) -> str:
        seen[name] = set(indices)
        last.append(name)
        return task.checkpoint

    def scores(self: adapt.Adapter, model: Any, indices: list[int]) -> list[dict[str, float]]:
        if model is not self.start:
            scored.append((last[-1], set(indices)))
        return [row(20.0)] * len(indices)

    monkeypatch.setattr(adapt.Adapter, "train", train)
    monkeypatch.setattr(adapt.Adapter, "scores", scores)
    adapt.adapt(task)
    assert len(scored) == 3 and set().union(*(fold for _, fold in scored)) == set(range(6))
    for name, fold in scored:
        assert seen[name] == set(range(6)) - fold


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (["--output", "mine.txt"], [".pth"]),
        (["--low", "nowhere"], ["--low", "nowhere"]),
        (["--high", "nowhere"], ["--high", "nowhere"]),
        (["--checkpoint", "nowhere.pth"], ["nowhere.pth"]),
        (["--folds", "1"], ["--folds"]),
        (["--minutes", "0"], ["--minutes"]),
        (["--config", "none.json"], ["none.json"]),
        (["--set", "flow_channels=16"], ["flow_channels"]),
        (["--set", "learning_rate=fast"], ["learning_rate"]),
    ],
)
def test_bad_input_is_one_line(
    changed: list[str], told: list[str], task: adapt.Task, tmp_path: Path, capsys: Any
) -> None:
    before = files_under(tmp_path)
    status = adapt.main([*words(tmp_path), *changed])
    assert_one_line_error(status, capsys.readouterr().err, *told)
    assert files_under(tmp_path) == before


def test_the_command_line_runs(task: adapt.Task, tmp_path: Path) -> None:
    argv = [sys.executable, str(ROOT / "tools" / "adapt.py"), *words(tmp_path), "--folds", "2"]
    argv += ["--set", "num_epochs=1"]
    found = subprocess.run(argv, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "unseen pairs" in found.stdout and "psnr_gt_mean" in found.stdout
    assert (tmp_path / "mine.pth").is_file()
