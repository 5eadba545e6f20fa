"""Evaluations without targets, through the command line as a user meets it."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_tools import (
    assert_one_line_error,
    dark_picture,
    files_under,
    make_data,
    run_script,
    save_picture,
    target_picture,
    tiny_config,
    write_config,
)
from PIL import Image

from support.decoding import read_image
from support.no_reference import scores_without_target

STEMS = ("2", "3", "4", "5", "6", "twelve")
BLIND = ["clipped_new", "black_new", "brightness", "colourfulness", "noise_flat"]


class Evaluation:
    """What one evaluation wrote and printed."""

    def __init__(self, results: Path, printed: str) -> None:
        (self.folder,) = results.glob("eval_*")
        self.printed = printed
        self.summary: dict[str, Any] = json.loads((self.folder / "summary.json").read_text())
        self.brief: dict[str, Any] = json.loads((results / "evaluation_results.json").read_text())
        with open(self.folder / "metrics.csv", newline="", encoding="utf-8") as stream:
            self.rows = list(csv.DictReader(stream))

    def picture(self, name: str) -> np.ndarray:
        """(H, W, 3) uint8 of images/NAME."""
        return read_image(self.folder / "images" / name)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one epoch."""
    folder = make_data(tmp_path_factory.mktemp("weights"))
    write_config(folder, **tiny_config(Path("."), num_epochs=1))
    done = run_script("--mode", "train", "--config", "config.json", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "ckpt" / "best_model.pth"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """low/ and high/ of the STEMS, which nothing writes to."""
    folder = tmp_path_factory.mktemp("pairs")
    for place, stem in enumerate(STEMS):
        high = target_picture(50 + place, 64, 72)
        save_picture(folder / "high" / f"{stem}.png", high)
        save_picture(folder / "low" / f"{stem}.png", dark_picture(high, place))
    return folder


def evaluate(pairs: Path, cwd: Path, *arguments: str | Path, **changes: str | Path) -> Any:
    """The finished process of --mode evaluate, which writes to cwd/results."""
    given = {"device": "cpu", "eval_low_dir": pairs / "low", "eval_high_dir": pairs / "high"}
    words = [word for k, v in (given | changes).items() for word in ("--set", f"{k}={v}")]
    return run_script("--mode", "evaluate", *arguments, *words, cwd=cwd)


def evaluated(pairs: Path, cwd: Path, *arguments: str | Path, **changes: str | Path) -> Evaluation:
    """What an evaluation that works has written."""
    done = evaluate(pairs, cwd, *arguments, **changes)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr and "Traceback" not in done.stderr
    return Evaluation(cwd / "results", done.stdout)


# without targets ----------------------------------------------------------------------------------


def test_a_model_is_scored_without_targets(weights: Path, pairs: Path, tmp_path: Path) -> None:
    found = evaluated(
        pairs, tmp_path, "--checkpoint", weights, eval_high_dir="", eval_size="native"
    )
    assert list(found.rows[0]) == ["filename", *BLIND, "seconds"]
    assert {row["filename"] for row in found.rows} == {f"{stem}.png" for stem in STEMS}
    for row in found.rows:
        low = read_image(pairs / "low" / row["filename"])
        expected = scores_without_target(found.picture(row["filename"]) / 255.0, low / 255.0)
        assert {name: float(row[name]) for name in BLIND} == pytest.approx(expected, abs=1e-9)
    assert found.summary["metrics"].keys() == {*BLIND, "seconds"}
    assert "psnr" not in found.summary and "psnr" not in found.brief
    assert found.summary["without_twins"] is None
    assert found.brief["num_test_samples"] == 6 and found.brief["checkpoint"] == str(weights)
    assert "6 pictures without targets" in found.printed
    assert "clipped_new" in found.printed and "noise_flat" in found.printed
    assert "twin" not in found.printed


def test_strips_without_targets_have_two_pictures(
    weights: Path, pairs: Path, tmp_path: Path
) -> None:
    found = evaluated(pairs, tmp_path, "--checkpoint", weights, eval_high_dir="", scenes="2,3")
    width, _ = Image.open(found.folder / "images" / "2_viz.png").size
    assert width == 2 * 200 + 4
    assert Image.open(found.folder / "overview.png").width >= 1200
    assert [row["filename"] for row in found.rows] == ["2.png", "3.png"]


@pytest.mark.parametrize("kind", ["missing", "empty", "scene"])
def test_mistakes_without_targets_are_one_line(
    weights: Path, pairs: Path, tmp_path: Path, kind: str
) -> None:
    (tmp_path / "none").mkdir()
    before = files_under(tmp_path)
    changes: dict[str, str | Path] = {
        "missing": {"eval_low_dir": tmp_path / "nowhere"},
        "empty": {"eval_low_dir": tmp_path / "none"},
        "scene": {"scenes": "2,9"},
    }[kind]
    words = {"missing": "eval_low_dir", "empty": "no picture", "scene": "stem 9"}[kind]
    done = evaluate(pairs, tmp_path, "--checkpoint", weights, eval_high_dir="", **changes)
    assert_one_line_error(done.returncode, done.stderr, words)
    assert files_under(tmp_path) == before
