"""Scores by optional packages: what we make of them, and every way in which they can be missing.

A stand-in plays pyiqa where the behaviour is ours. Where pyiqa or stlpips_pytorch is installed,
their own numbers are compared, by metrics that need no download.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_tools import (
    assert_one_line_error,
    dark_picture,
    files_under,
    run_script,
    save_picture,
    target_picture,
)

import model_script as ms
from support.decoding import read_image
from support.extra_metrics import extra_scores, load_extra
from support.metrics import match_mean
from support.pictures import to_tensor
from support.settings import UserError

CPU = torch.device("cpu")


class Measure(torch.nn.Module):
    """A metric of the stand-in: the mean distance to the target, or the mean."""

    lower_better = True

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, enhanced: torch.Tensor, high: torch.Tensor | None = None) -> torch.Tensor:
        if self.name == "breaks":
            raise AssertionError("the picture is too small\nby far")
        if self.name == "nan":
            return enhanced.mean() * float("nan")
        return enhanced.mean() if high is None else (enhanced - high).abs().mean()


def create_metric(name: str, device: torch.device) -> Measure:
    """The stand-in's metrics, of which one cannot fetch its weights."""
    print("Loading pretrained model")
    print("Downloading", file=sys.stderr)
    if name == "offline":
        raise OSError("<urlopen error Name or service not known>")
    return Measure(name)


def list_models(metric_mode: str | None = None) -> list[str]:
    known = {"FR": ["distance"], "NR": ["mean", "offline", "breaks", "nan"]}
    return known[metric_mode] if metric_mode else [*known["FR"], *known["NR"]]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """pyiqa's interface, with metrics that can be computed by hand."""
    module = types.SimpleNamespace(create_metric=create_metric, list_models=list_models)
    monkeypatch.setitem(sys.modules, "pyiqa", module)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """low/, high/ and out/, 0.png to 2.png each."""
    folder = tmp_path_factory.mktemp("data")
    for place in range(3):
        high = target_picture(place, 64, 72)
        noise = np.random.default_rng(place).normal(0, 6, high.shape)
        ours = np.rint(np.clip(0.7 * high + noise, 0, 255)).astype(np.uint8)
        for kind, pixels in (("high", high), ("low", dark_picture(high)), ("out", ours)):
            save_picture(folder / kind / f"{place}.png", pixels)
    return folder


def words_of(data: Path, results: Path, extra: str, **changes: str | Path) -> list[str]:
    """The command line of an evaluation of out/."""
    given = {"eval_low_dir": data / "low", "eval_high_dir": data / "high", "device": "cpu"}
    given |= {"outputs_dir": data / "out", "results_dir": results, "extra_metrics": extra}
    given |= changes
    pairs = [word for key, value in given.items() for word in ("--set", f"{key}={value}")]
    return ["--mode", "evaluate", *pairs]


def rows_in(results: Path) -> list[dict[str, str]]:
    (path,) = results.glob("eval_*/metrics.csv")
    with open(path, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_columns_and_the_worst_file(
    stand_in: None, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ms.main(words_of(data, tmp_path, "mean, distance,mean")) == 0
    told = capsys.readouterr()
    assert "Loading" not in told.out and "Downloading" not in told.err
    rows = rows_in(tmp_path)
    assert list(rows[0])[-3:] == ["mean", "distance", "distance_gt_mean"]
    for row in rows:
        ours, high = (read_image(data / kind / row["filename"]) / 255 for kind in ("out", "high"))
        assert float(row["mean"]) == pytest.approx(ours.mean(), abs=1e-6)
        assert float(row["distance"]) == pytest.approx(np.abs(ours - high).mean(), abs=1e-6)
        matched = np.abs(match_mean(ours, high) - high).mean()
        assert float(row["distance_gt_mean"]) == pytest.approx(matched, abs=1e-6)
    (path,) = tmp_path.glob("eval_*/summary.json")
    scores = json.loads(path.read_text())["metrics"]
    assert scores["distance_gt_mean"]["uses_ground_truth"] is True
    for name in ("mean", "distance", "distance_gt_mean"):  # lower is better
        assert scores[name]["worst"] == max(float(row[name]) for row in rows)


def test_nothing_is_said_of_extra_metrics_unless_asked(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    monkeypatch.setitem(sys.modules, "lpips", None)
    assert ms.main(words_of(data, tmp_path, "")) == 0
    printed = capsys.readouterr().out.lower()
    assert "lpips" not in printed and "pip install" not in printed


@pytest.mark.parametrize(
    ("extra", "changes", "words"),
    [
        ("meen", {}, ("unknown metric meen", "mean")),
        (
            "offline",
            {},
            ("offline", "could not load its weights", "Name or service", "leave it out"),
        ),
        ("mean,offline", {}, ("offline", "go online once")),
        ("psnr", {}, ("psnr", "every evaluation has")),
        ("distance", {"eval_high_dir": ""}, ("distance", "eval_high_dir is empty", "leave it out")),
        ("st_lpips", {"eval_high_dir": ""}, ("st_lpips", "eval_high_dir is empty")),
        ("breaks", {}, ("breaks cannot score", "the picture is too small", "0.png, 72x64")),
        ("nan", {}, ("nan gives no finite number", "0.png")),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    stand_in: None,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    extra: str,
    changes: dict[str, str],
    words: tuple[str, ...],
) -> None:
    status = ms.main(words_of(data, tmp_path / "r", extra, **changes))
    told = capsys.readouterr().err
    last = told.replace("\r", "\n").splitlines()[-1]  # after the progress bars
    assert_one_line_error(status, last, "extra_metrics", *words)
    assert "Traceback" not in told and "by far" not in told
    assert files_under(tmp_path) <= {"r"}  # an empty folder at most


@pytest.mark.parametrize(
    ("name", "module", "install"),
    [
        ("niqe", "pyiqa", "pip install pyiqa"),
        ("lpips", "pyiqa", "pip install pyiqa"),
        ("st_lpips", "stlpips_pytorch", "pip install stlpips_pytorch"),
    ],
)
def test_a_missing_package_says_what_to_install(
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    module: str,
    install: str,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "stlpips_pytorch.stlpips", raising=False)
    status = ms.main(words_of(data, tmp_path / "r", name))
    assert_one_line_error(status, capsys.readouterr().err, "extra_metrics", install, name)
    assert files_under(tmp_path) == set()


def test_a_package_that_breaks_on_import_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "pyiqa.py").write_text("raise RuntimeError('built for another torch')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "pyiqa", raising=False)
    with pytest.raises(UserError, match=r"pyiqa cannot be imported \(built for another torch\)"):
        load_extra("niqe", True, CPU)


def test_through_the_command_line_without_the_package(data: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("pyiqa"):
        pytest.skip("pyiqa is installed here")
    done = run_script(*words_of(data, tmp_path / "r", "niqe"), cwd=tmp_path)
    assert_one_line_error(done.returncode, done.stderr, "extra_metrics", "pip install pyiqa")
    assert files_under(tmp_path) == set()


# with the packages themselves ---------------------------------------------------------------------


def picture(data: Path, kind: str) -> torch.Tensor:
    return to_tensor(read_image(data / kind / "1.png"))


def test_numbers_are_those_of_pyiqa(data: Path, tmp_path: Path) -> None:
    pyiqa = pytest.importorskip("pyiqa", reason="pyiqa is not installed")
    names = {"gmsd": True, "vif": False, "entropy": False}  # no downloads; whether lower is better
    done = run_script(*words_of(data, tmp_path, ",".join(names)), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    row = next(row for row in rows_in(tmp_path) if row["filename"] == "1.png")
    ours, high = picture(data, "out")[None], picture(data, "high")[None]
    (path,) = tmp_path.glob("eval_*/summary.json")
    summary = json.loads(path.read_text())["metrics"]
    for name, lower in names.items():
        metric = pyiqa.create_metric(name, device=CPU)
        given = (ours,) if name == "entropy" else (ours, high)
        assert float(row[name]) == pytest.approx(float(metric(*given)), rel=1e-5)
        values = [float(one[name]) for one in rows_in(tmp_path)]
        assert summary[name]["worst"] == (max if lower else min)(values)
    assert "entropy_gt_mean" not in row and "vif_gt_mean" in row


def test_st_lpips_needs_no_download(data: Path) -> None:
    module = pytest.importorskip(
        "stlpips_pytorch.stlpips", reason="stlpips_pytorch or torchsummary is not installed"
    )
    (metric,) = load_extra("st_lpips", True, CPU)
    ours, high = picture(data, "out"), picture(data, "high")
    scores = extra_scores([metric], ours, high, "1.png")
    network: Callable[..., Any] = module.LPIPS(net="alex", variant="shift_tolerant", verbose=False)
    with torch.no_grad():
        expected = float(network(ours[None] * 2 - 1, high[None] * 2 - 1))
    assert scores["st_lpips"] == pytest.approx(expected, rel=1e-5)
    assert extra_scores([metric], high, high, "1.png")["st_lpips"] == pytest.approx(0, abs=1e-6)
    assert 0 < scores["st_lpips_gt_mean"] < 2
