"""Every benchmark starts and explains itself; the ones that train run to their end in small."""

from __future__ import annotations

import csv
import importlib
import sys
from pathlib import Path

import pytest
from cli_tools import make_data
from conftest import ROOT

FOLDER = ROOT / "benchmarks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if "def main(" in path.read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def beside_the_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """They import each other as scripts do."""
    monkeypatch.syspath_prepend(str(FOLDER))


def run(name: str, *arguments: str | Path) -> None:
    """The script's main with these arguments."""
    module = importlib.import_module(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        module.main()


@pytest.mark.parametrize("name", NAMES)
def test_help_names_the_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(name, "--help")
    assert ended.value.code == 0
    assert f"python benchmarks/{name}.py" in capsys.readouterr().out


def test_every_mutant_is_still_a_line_of_the_script() -> None:
    import mutants

    source = (ROOT / "model_script.py").read_text(encoding="utf-8")
    assert len(mutants.MUTANTS) >= 30
    for mutant in mutants.MUTANTS:
        assert source.count(mutant.before) == 1 and mutant.before != mutant.after, mutant.before
        assert (ROOT / "tests" / f"{mutant.tests}.py").is_file()


def folders(data: Path) -> list[str]:
    """--set arguments that name tiny training and evaluation pairs, and write below `data`."""
    pairs = [
        f"{part}_{kind}_dir={data / 'data' / part / kind}" for part in ("train", "val", "eval") for kind in ("low", "high")
    ]
    places = [f"results_dir={data / 'results'}", f"log_dir={data / 'logs'}", "cache_megabytes=64"]
    return [text for pair in pairs + places for text in ("--set", pair)]


@pytest.mark.slow
def test_comparison_trains_scores_and_shows_every_system(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_data(tmp_path, train=6, evaluation=2)
    run("compare", "--minutes", "0.001", *folders(tmp_path), "--set", "eval_size=64,64", "--set", "image_size=64,64")
    (results,) = (tmp_path / "results").glob("comparison_*")
    with open(results / "comparison.csv", newline="") as stream:
        rows = {row["system"]: row for row in csv.DictReader(stream)}
    systems = {"ConditionalFlow", "RetinexNet", "UPTFlow", "AnlightenDiff"}
    assert rows.keys() == systems | {"gamma 0.4", "histogram equalisation"}
    for name, row in rows.items():
        assert 0 < float(row["psnr"]) < 60 and -1 <= float(row["ssim"]) <= 1
        costs = ("parameters_M", "train_images_per_s", "seconds_600x400", "MiB_600x400")
        assert all(float(row[key]) > 0 for key in costs) if name in systems else not any(row[key] for key in costs)
    assert len(list((results / "strips").iterdir())) == 2
    table = (results / "comparison.md").read_text()
    assert table.count("\n| ") == 6 and table in capsys.readouterr().out


@pytest.mark.slow
def test_retinexnet_findings_trains_and_measures_every_variant(tmp_path: Path) -> None:
    make_data(tmp_path, train=4, evaluation=2)
    small = ["--set", "image_size=32,32", "--set", "batch_size=2"]
    run("retinexnet_findings", "--minutes", "0.001", *folders(tmp_path), *small)
    (results,) = (tmp_path / "results").glob("retinexnet_findings_*")
    with open(results / "findings.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["variant"] for row in rows] == list(importlib.import_module("retinexnet_findings").VARIANTS)
    assert all(float(row["plain noise"]) > 0 and 0 <= float(row["white"]) <= 1 for row in rows)
    assert float(rows[-1]["relit"]) == 1.0  # ignore_ienhance: the illumination is left out
    assert len(list(results.glob("*.png"))) == len(rows)


def test_ablation_adds_a_line_for_every_run(tmp_path: Path) -> None:
    make_data(tmp_path, train=6)
    small = ["flow_channels=8", "thumbnail_size=32", "crop_size=32", "image_size=32,32", "batch_size=1"]
    chosen = [text for pair in small for text in ("--set", pair)]
    variants = ["recipe", "without global branch", "without flow (direct regression)", "input itself"]
    for variant in variants:
        run("ablation", variant, "--minutes", "0.001", *folders(tmp_path), *chosen)
    with open(tmp_path / "results" / "ablation.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["variant"] for row in rows] == variants
    assert all(0 < float(row["psnr"]) < 60 and (float(row["steps"]) >= 1) == (row["variant"] != variants[3]) for row in rows)
    assert rows[2]["bits_per_dim"] == "nan" and float(rows[0]["bits_per_dim"]) > 0
