"""Warnings: pictures that trained or chose the weights, folders that are one or swapped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_tools import (
    dark_picture,
    main_with,
    make_data,
    make_pairs,
    run_script,
    save_picture,
    target_picture,
    tiny_config,
    write_config,
)

import model_script as ms
from support import notices
from support.pairs import PairStore, find_pairs

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with weights trained on 5 pairs and chosen by 1, and with evaluation pairs: 2 new
    ones, the first training target and the validation target."""
    folder = make_data(tmp_path_factory.mktemp("shop"), evaluation=2)
    for name, seed in (("trained", 0), ("chose", 100)):
        high = target_picture(seed)
        for kind, pixels in (("high", high), ("low", dark_picture(high, 9))):
            save_picture(folder / "data" / "eval" / kind / f"{name}.png", pixels)
    assert main_with("train", tiny_config(folder, num_epochs=1)) == 0
    return folder


def summary_in(folder: Path) -> dict[str, Any]:
    """The summary of the one evaluation below `folder`."""
    (path,) = folder.glob("eval_*/summary.json")
    return json.loads(path.read_text(encoding="utf-8"))


def warned(text: str) -> list[str]:
    """The warnings that were printed."""
    lines = [line for line in text.splitlines() if line.startswith("warning: ")]
    return [line.removeprefix("warning: ") for line in lines]


def evaluated(
    shop: Path, folder: Path, capsys: pytest.CaptureFixture[str], **changes: Any
) -> tuple[list[str], str]:
    """(warnings, all that is printed) of an evaluation of the shop's weights."""
    settings = tiny_config(shop) | dict(results_dir=str(folder / "results")) | changes
    capsys.readouterr()
    assert main_with("evaluate", settings, "--checkpoint", shop / "ckpt" / "best_model.pth") == 0
    printed = capsys.readouterr().out
    assert warned(printed) == summary_in(folder / "results")["warnings"]
    return warned(printed), printed


def test_pictures_that_trained_or_chose_the_weights_are_told(shop: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, **tiny_config(shop, results_dir=str(tmp_path / "results")))
    weights = shop / "ckpt" / "best_model.pth"
    done = run_script(
        *("--mode", "evaluate", "--checkpoint", weights, "--config", config), cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    told = warned(done.stdout)
    assert len(told) == 2 and told == summary_in(tmp_path / "results")["warnings"]
    assert told[0].startswith("1 of 4 pairs trained these weights")
    assert told[1].startswith("1 of 4 pairs chose these weights")


def test_new_pictures_give_no_warning_and_one_block_of_scores(
    shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told, printed = evaluated(shop, tmp_path, capsys, scenes="1, 0")
    assert told == [] and "no twin in training" not in printed
    assert summary_in(tmp_path / "results")["without_twins"] is None
    assert "evaluating 2 of 4 pairs (scenes=1,0), resized to 32x32" in printed


def test_twins_give_a_second_block_of_scores(
    shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, printed = evaluated(shop, tmp_path, capsys)
    assert "evaluating 4 pairs, resized" in printed and "no twin in training (3): " in printed
    assert summary_in(tmp_path / "results")["without_twins"]["num_images"] == 3


def test_a_folder_of_twins_alone_has_no_scores_without_them(
    shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, printed = evaluated(shop, tmp_path, capsys, scenes="trained")
    assert "no twin in training" not in printed
    assert summary_in(tmp_path / "results")["without_twins"] is None


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        ("high", "high", "eval_low_dir and eval_high_dir are one folder"),
        ("high/../high", "high", "eval_low_dir and eval_high_dir are one folder"),
        ("high", "low", "low is brighter than high in 2 of 2 pairs; eval_low_dir and"),
    ],
)
def test_folders_that_are_one_or_swapped(
    shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], low: str, high: str, words: str
) -> None:
    where = {
        f"eval_{kind}_dir": str(shop / "data" / "eval" / name)
        for kind, name in (("low", low), ("high", high))
    }
    (told,), _ = evaluated(shop, tmp_path, capsys, **where, scenes="0,1")
    assert told.startswith(words)


def test_validation_by_the_evaluation_folders_is_told_at_once_and_in_evaluation(
    tmp_path: Path,
) -> None:
    make_data(tmp_path)
    inside = {f"val_{kind}_dir": f"data/eval/{kind}" for kind in ("low", "high")}
    config = write_config(tmp_path, num_epochs=1, **inside)
    done = run_script("--mode", "train", "--config", config, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (told,) = warned(done.stdout)
    assert told.startswith("val_low_dir and val_high_dir: evaluation folder as well")
    folders = [f"--eval_{kind}_dir={tmp_path / 'data/eval' / kind}" for kind in ("low", "high")]
    weights = ("--checkpoint", "ckpt/best_model.pth", "--device", "cpu")
    done = run_script("--mode", "evaluate", *weights, *folders, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    chose, folder = warned(done.stdout)
    assert chose.startswith("1 of 1 pairs chose these weights")
    assert folder.startswith("the checkpoint's val_low_dir and val_high_dir: evaluation folder")


def test_a_training_tells_swapped_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_data(tmp_path)
    train = tmp_path / "data" / "train"
    swapped = dict(train_low_dir=str(train / "high"), train_high_dir=str(train / "low"))
    assert main_with("train", tiny_config(tmp_path, num_epochs=1, **swapped)) == 0
    (told,) = warned(capsys.readouterr().out)
    assert told.startswith("low is brighter than high in 5 of 5 pairs; train_low_dir and")


def test_split_off_pairs_chose_the_weights_and_did_not_train_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_data(tmp_path)
    split = dict(val_low_dir="", val_high_dir="", val_fraction=0.4)
    train = {f"eval_{kind}_dir": str(tmp_path / "data/train" / kind) for kind in ("low", "high")}
    settings = tiny_config(tmp_path, num_epochs=1) | split | train
    assert main_with("train", settings) == 0
    assert warned(capsys.readouterr().out) == []
    weights = tmp_path / "ckpt" / "best_model.pth"
    assert main_with("evaluate", settings, "--checkpoint", weights) == 0
    trained, chose = warned(capsys.readouterr().out)
    assert trained.startswith("3 of 5 pairs trained") and chose.startswith("2 of 5 pairs chose")
    # weights of before know the pictures of the folder alone
    content = torch.load(weights, weights_only=True)
    assert content.pop("validation_thumbnails").shape == (2, 16, 16, 3)
    torch.save(content, tmp_path / "old.pth")
    shutil.rmtree(tmp_path / "results")
    assert main_with("evaluate", settings, "--checkpoint", tmp_path / "old.pth") == 0
    (told,) = warned(capsys.readouterr().out)
    assert told.startswith("5 of 5 pairs trained")


def test_sources_have_folders_of_their_own(tmp_path: Path) -> None:
    folder = make_pairs(tmp_path / "a", 3)
    pairs = [
        pair._replace(name=f"near/{pair.name}")
        for pair in find_pairs(str(folder / "high"), str(folder / "high"), "train")
    ]
    store = PairStore(pairs, 2**20)
    (told,) = notices.pair_notices(store, "train")
    assert told.startswith("low_dir and high_dir of source near are one folder")
    # well-exposed photographs may be their own targets
    assert notices.pair_notices(store, "train", {"near"}) == []
    source = dict(name="near", val_low_dir=f"{folder}/low", val_high_dir=f"{folder}/./high")
    use = ms.Use(eval_low_dir="elsewhere", eval_high_dir=str(folder / "high"))
    found = notices.held_out_for_scores({"sources": [source]}, use)
    assert found == ["val_high_dir of source near"]


@pytest.mark.parametrize("odd", [5, "text", [7], None, {"name": 1}])
def test_odd_sources_of_a_checkpoint_are_passed_over(odd: Any) -> None:
    assert notices.held_out_for_scores({"sources": odd}, ms.Use()) == []
    assert notices.held_out_for_scores({"sources": [{"val_low_dir": odd}]}, ms.Use()) == []


def test_long_lists_of_scenes_are_cut(tmp_path: Path) -> None:
    folder = make_pairs(tmp_path, 3)
    where = dict(eval_low_dir=str(folder / "low"), eval_high_dir=str(folder / "high"))
    use = ms.Use(**where, scenes=",".join(str(number) for number in range(100)))
    told = notices.counted(3, use)
    assert told.startswith("3 of 3 pairs (scenes=0,1,2") and told.endswith("...)")
    assert notices.counted(3, ms.Use(**where, scenes=" , ")) == "3 pairs"
