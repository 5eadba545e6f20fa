"""Resuming with other settings: what is told, what is refused, a run with nothing left to do."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_tools import (
    assert_one_line_error,
    differing,
    main_with,
    make_data,
    make_pairs,
    run_script,
    tiny_config,
)

import model_script as ms
from support.resumes import data_folders, differences

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, a copy of it under other/, and a run of two epochs in ckpt/."""
    folder = make_data(tmp_path_factory.mktemp("run"), train=3)
    shutil.copytree(folder / "data", folder / "other")
    assert main_with("train", tiny_config(folder)) == 0
    return folder


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A copy of the run's checkpoints."""
    shutil.copytree(run / "ckpt", tmp_path / "ckpt")
    return tmp_path / "ckpt"


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file below `folder`, with its content and the time of its last change."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def words(settings: dict[str, Any]) -> list[str]:
    """--set KEY=VALUE for each."""
    return [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]


def resume(checkpoint: Path, log_dir: Path, **changes: Any) -> int:
    """--mode train --resume with `changes`, in this process."""
    given = words({"log_dir": log_dir, "device": "cpu"} | changes)
    return ms.main(["--mode", "train", "--resume", str(checkpoint), *given])


def test_what_changed_is_one_line(copy: Path, run: Path, tmp_path: Path) -> None:
    given = words(dict(num_epochs=3, learning_rate=0.0005, log_dir=run / "logs", l1_weight=10))
    done = run_script("--mode", "train", "--resume", copy, *given, "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (line,) = [text for text in done.stdout.splitlines() if text.startswith("changed settings")]
    parts = {"num_epochs: 2 -> 3", "learning_rate: 0.001 -> 0.0005"}
    parts |= {f'checkpoint_dir: "{run / "ckpt"}" -> "{copy}"'}
    assert set(line.removeprefix("changed settings: ").split(", ")) == parts
    assert (copy / "checkpoint_epoch_3.pth").exists()


def test_unchanged_settings_are_no_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The config of the start, by other names of the same folders."""
    own = tiny_config(run)
    turns = {k: f"{v}/../{Path(v).name}" for k, v in own.items() if str(k).endswith("_dir")}
    capsys.readouterr()
    assert main_with("train", own | turns, "--resume", run / "ckpt/checkpoint_epoch_1.pth") == 0
    assert "changed settings" not in capsys.readouterr().out


def test_nothing_left_to_do_is_said_and_no_file_is_touched(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, logs = snapshot(copy.parent), copy.parent / "logs"
    told = "nothing to do: 2 epochs are trained, num_epochs is {}; raise it to go on"
    command = ("--mode", "train", "--resume", copy, "--device", "cpu", "--log_dir", logs)
    done = run_script(*command, "--num_epochs", "1", cwd=copy.parent)
    assert done.returncode == 0 and told.format(1) in done.stdout, done.stderr
    assert resume(copy, logs) == 0
    assert told.format(2) in capsys.readouterr().out
    assert snapshot(copy.parent) == before and not logs.exists()


@pytest.mark.parametrize("changes", [{"seed": 5}, {"image_size": "24,32"}])
def test_refusals_are_one_line_of_the_command_line(
    copy: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    before = snapshot(tmp_path)
    given = words(changes | {"num_epochs": 3, "log_dir": "logs"})
    done = run_script("--mode", "train", "--resume", copy, *given, cwd=tmp_path)
    (key,) = changes
    assert_one_line_error(done.returncode, done.stderr, f"error: {key}: cannot change", "init_from")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"val_fraction": 0.2},
        {"scene_similarity": 0.9},
        {"val_pairs": 1},
        {"image_size": "32,40"},
        {"crop_size": 32},
        {"train_low_dir": "other/train/low"},
        {"train_high_dir": "other/train/high"},
        {"val_low_dir": "other/val/low", "val_high_dir": "other/val/high"},
        {"val_low_dir": "", "val_high_dir": ""},
        {"global_rate": 0.5},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_makes_it_another_run_is_refused(
    run: Path, copy: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any]
) -> None:
    before = snapshot(copy)
    key = next(iter(changes))
    given = {k: run / v if str(v).startswith("other") else v for k, v in changes.items()}
    capsys.readouterr()
    status = resume(copy, copy.parent / "logs", num_epochs=3, **given)
    told = capsys.readouterr().err
    assert_one_line_error(status, told, f"{key}: cannot change", "start a new run", "init_from")
    assert snapshot(copy) == before and not (copy.parent / "logs").exists()


@pytest.mark.parametrize("rates", [(0.5, 1), (0.5, 0.25)])
def test_the_global_rate_changes_between_values_of_one_kind(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rates: tuple[float, float]
) -> None:
    outputs = {f"{kind}_dir": str(tmp_path / kind) for kind in ("checkpoint", "log", "results")}
    settings = tiny_config(run, num_epochs=1, global_rate=rates[0]) | outputs
    assert main_with("train", settings) == 0
    capsys.readouterr()
    changes = dict(global_rate=rates[1], num_epochs=2)
    status = resume(tmp_path / "checkpoint", tmp_path / "log", **changes)
    printed = capsys.readouterr()
    if rates[1] == 1:
        assert_one_line_error(status, printed.err, "global_rate: cannot change from 0.5 to 1")
    else:
        assert status == 0 and "global_rate: 0.5 -> 0.25" in printed.out


def test_weights_to_start_from_do_nothing_to_a_resumed_run(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = resume(copy, copy.parent / "logs", init_from=copy / "best_model.pth")
    assert_one_line_error(status, capsys.readouterr().err, "init_from: does nothing with --resume")


def test_the_way_that_refusals_name_works(run: Path, copy: Path, tmp_path: Path) -> None:
    start = str(copy / "checkpoint_epoch_2.pth")
    outputs = {f"{kind}_dir": str(tmp_path / kind) for kind in ("checkpoint", "log", "results")}
    settings = tiny_config(run, seed=5, image_size=[24, 32], init_from=start, num_epochs=1)
    assert main_with("train", settings | outputs) == 0


# moved and changed pictures -----------------------------------------------------------------------


def moved_run(folder: Path) -> Path:
    """A run whose data were moved afterwards from data/ to moved/; returns its checkpoints."""
    make_data(folder, train=3)
    assert main_with("train", tiny_config(folder, num_epochs=2, keep_checkpoints=9)) == 0
    (folder / "data").rename(folder / "moved")
    return folder / "ckpt"


def places(folder: Path) -> dict[str, str]:
    """The keys of the training and validation folders below `folder`."""
    return {
        f"{part}_{kind}_dir": str(folder / part / kind)
        for part in ("train", "val")
        for kind in ("low", "high")
    }


def test_pictures_that_moved_may_be_named_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = moved_run(tmp_path)
    first, again = weights / "checkpoint_epoch_1.pth", tmp_path / "again"
    capsys.readouterr()
    status = resume(first, tmp_path / "logs", checkpoint_dir=again)
    told = capsys.readouterr().err
    assert_one_line_error(status, told, "train_low_dir", "is not here; name where it is now")
    new = places(tmp_path / "moved")
    assert resume(first, tmp_path / "logs", checkpoint_dir=again, **new) == 0
    assert "train_low_dir: " in capsys.readouterr().out
    ends = [torch.load(p / "checkpoint_epoch_2.pth", weights_only=True) for p in (weights, again)]
    assert not differing(ends[0]["model"], ends[1]["model"])


@pytest.mark.parametrize("part", ["train", "val"])
def test_other_pictures_under_the_new_name_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str
) -> None:
    weights = moved_run(tmp_path)
    shutil.rmtree(tmp_path / "moved" / part)
    make_pairs(tmp_path / "moved" / part, 3, first_seed=50)
    capsys.readouterr()
    new = places(tmp_path / "moved")
    status = resume(weights / "checkpoint_epoch_1.pth", tmp_path / "logs", **new)
    name = {"train": "training", "val": "validation"}[part]
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert_one_line_error(status, "\n".join(lines), f"its {name} targets were other pictures")


def test_a_picture_more_would_redraw_the_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_data(tmp_path, train=4)
    split = dict(val_low_dir="", val_high_dir="", val_fraction=0.25)
    assert main_with("train", tiny_config(tmp_path) | split) == 0
    make_pairs(tmp_path / "data" / "train", 5)
    capsys.readouterr()
    status = resume(tmp_path / "ckpt", tmp_path / "logs", num_epochs=3)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert_one_line_error(status, "\n".join(lines), "4 then, 5 now", "init_from")


def test_sources_may_change_their_shares_and_not_their_folders() -> None:
    near = dict(name="near", low_dir="a", high_dir="b", val_low_dir="c", val_high_dir="d")
    near |= dict(share=1.0, darken=0.0)
    old, new = {"sources": [near]}, {"sources": [near | {"share": 0.5}]}
    assert data_folders(old) == data_folders(new)
    assert differences(old, new) == ["share of source near: 1.0 -> 0.5"]
    other = {"sources": [near | {"low_dir": "elsewhere"}]}
    assert data_folders(other)["low_dir of source near"] == "elsewhere"
    assert differences({"sources": []}, {"sources": []}) == []
