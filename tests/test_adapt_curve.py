"""benchmarks/adapt_curve.py: what is drawn, and the whole program on a few small pictures."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import model_script as ms
from support.checkpoints import save_checkpoint
from support.scenes import find_scenes
from support.settings import UserError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import adapt_curve


def test_a_draw_has_a_scene_of_its_own_for_each_pair_and_none_of_the_evaluation() -> None:
    rng = np.random.default_rng(0)
    looks = rng.integers(0, 256, (12, 16, 16, 3)).astype(np.uint8)
    thumbnails = looks.repeat(3, 0)  # three takes of each of twelve scenes
    others = looks[:4]
    for seed in range(5):
        drawn = adapt_curve.draw_pairs(thumbnails, others, 8, 0.85, seed)
        assert sorted({index // 3 for index in drawn}) == list(range(4, 12))
        assert len(find_scenes(thumbnails[drawn], 0.85)) == 8
    assert adapt_curve.draw_pairs(thumbnails, others, 3, 0.85, 0) != adapt_curve.draw_pairs(
        thumbnails, others, 3, 0.85, 1
    )
    with pytest.raises(UserError, match="only 8 different scenes"):
        adapt_curve.draw_pairs(thumbnails, others, 9, 0.85, 0)


def pictures(folder: Path, count: int, seed: int) -> dict[str, str]:
    """`count` pairs of 64x64 under folder/low and folder/high."""
    rng = np.random.default_rng(seed)
    for index in range(count):
        high = rng.integers(60, 256, (4, 4, 3)).astype(np.uint8).repeat(16, 0).repeat(16, 1)
        for kind, pixels in (("low", high // 8), ("high", high)):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / kind / f"{index}.png")
    return {kind: str(folder / kind) for kind in ("low", "high")}


def test_the_curve_scores_the_start_and_every_draw_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ms.Config(flow_channels=8, num_flow_blocks=1, thumbnail_size=32)
    save_checkpoint(
        tmp_path / "start.pth",
        {
            "model": ms.ConditionalFlow(config).state_dict(),
            "config": vars(config),
            "system": "ConditionalFlow",
        },
    )
    train, test = pictures(tmp_path / "train", 6, 0), pictures(tmp_path / "test", 2, 1)
    line = ["--low", train["low"], "--high", train["high"]]
    line += ["--eval_low", test["low"], "--eval_high", test["high"]]
    line += ["--counts", "3", "--draws", "2", "--minutes", "0.05", "--out", str(tmp_path / "out")]
    line += ["--checkpoint", str(tmp_path / "start.pth"), "--set", "crop_size=32"]
    assert adapt_curve.main(line) == 0
    rows = list(csv.DictReader((tmp_path / "out" / "curve.csv").open()))
    assert [row["pairs"] for row in rows] == ["0", "3", "3"]
    assert all(0 < float(row["psnr"]) < 60 for row in rows)
    for row in rows[1:]:
        kept = row["adapted"] == "False"
        assert (row["psnr"] == rows[0]["psnr"]) == kept
        assert (float(row["gain_found"]) == 0) == kept
    assert "| 3 | 1" in (tmp_path / "out" / "curve.md").read_text()

    def never(*_: object, **__: object) -> None:
        raise AssertionError("what is done was done again")

    monkeypatch.setattr(adapt_curve.subprocess, "run", never)
    assert adapt_curve.main(line) == 0


def test_counts_are_read_or_refused_in_one_line() -> None:
    assert adapt_curve.counts_of("32,4,8") == [4, 8, 32]
    for text in ("4,x", "1", ""):
        with pytest.raises(Exception, match="such as 4,8,16"):
            adapt_curve.counts_of(text)
