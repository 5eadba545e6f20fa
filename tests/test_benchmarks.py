"""Every benchmark starts and explains itself; the ones that train run to their end in small."""

from __future__ import annotations

import csv
import functools
import importlib
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
from cli_tools import assert_one_line_error, make_data, save_picture
from conftest import ROOT, write_pairs
from PIL import Image

import model_script as ms
from support.pairs import PairStore, find_pairs
from support.pictures import resize, to_tensor

FOLDER = ROOT / "benchmarks"
NAMES = sorted(
    path.stem for path in FOLDER.glob("*.py") if "def main(" in path.read_text(encoding="utf-8")
)


@pytest.fixture(autouse=True)
def beside_the_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """They import each other as scripts do."""
    monkeypatch.syspath_prepend(str(FOLDER))


def run(name: str, *arguments: str | Path) -> None:
    """The script's main with these arguments."""
    module = importlib.import_module(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        assert not module.main()


@pytest.mark.parametrize("name", NAMES)
def test_help_names_the_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(name, "--help")
    assert ended.value.code == 0
    assert f"python benchmarks/{name}.py" in capsys.readouterr().out


def test_every_mutant_is_still_a_line_of_the_script() -> None:
    import mutants

    assert len(mutants.MUTANTS) >= 30
    for mutant in mutants.MUTANTS:
        source = (ROOT / mutant.file).read_text(encoding="utf-8")
        assert source.count(mutant.before) == 1 and mutant.before != mutant.after, mutant.before
        assert (ROOT / "tests" / f"{mutant.tests}.py").is_file()


def test_a_mutant_under_which_the_tests_hang_is_killed(tmp_path: Path) -> None:
    import mutants

    (tmp_path / "tests").mkdir()
    code = "import model_script\n\n\ndef test_work() -> None:\n    model_script.work()\n"
    (tmp_path / "tests" / "test_loop.py").write_text(code)
    bodies = {"pass": None, "raise ValueError": None, "import time; time.sleep(100)": 2.0}
    verdicts = []
    for body, patience in bodies.items():
        (tmp_path / "model_script.py").write_text(f"def work():\n    {body}\n")
        verdicts.append(mutants.verdict(tmp_path, {"test_loop"}, patience))
    assert verdicts == [mutants.PASSED, mutants.FAILED, mutants.HUNG]


def test_a_soak_ends_badly_where_memory_grows(capsys: pytest.CaptureFixture[str]) -> None:
    soak = importlib.import_module("soak")
    soak.judge([1000.0, 1001.0] * 20)
    assert "+0.0 %" in capsys.readouterr().out
    for samples in ([1000.0 + place for place in range(40)], [1000.0] * 19):
        with pytest.raises(SystemExit, match=r"grew by 3\.59 %|too few"):
            soak.judge(samples)


def test_a_soak_refuses_a_folder_that_holds_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "best_model.pth").touch()
    with pytest.raises(SystemExit) as ended:
        run("soak", "--set", f"checkpoint_dir={tmp_path}")
    assert_one_line_error(
        int(str(ended.value.code)), capsys.readouterr().err, str(tmp_path / "best_model.pth")
    )


def test_by_turns_warms_up_and_waits_for_every_call() -> None:
    told: list[str] = []
    works = {name: functools.partial(told.append, name) for name in ("ours", "theirs")}
    found = importlib.import_module("bench").by_turns(works, 2, 0, lambda: told.append("waited"))
    assert told == ["ours", "waited", "theirs", "waited"] * 3 and found.keys() == works.keys()


def test_the_stand_in_trains_where_its_pictures_are() -> None:
    low = torch.rand(1, 3, 16, 16, device="meta")
    assert importlib.import_module("train_speed").StandIn().to("meta").loss(low, low).is_meta


def test_a_bench_that_breaks_keeps_what_it_has_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = importlib.import_module("bench")

    def breaks(*_: object) -> Iterator[list[dict[str, object]]]:
        yield [bench.row("sizes", "0.1", 2.0, "s")]
        raise RuntimeError("in the next part")

    monkeypatch.setattr(bench, "measured", breaks)
    with pytest.raises(RuntimeError, match="in the next part"):
        run("bench", "--results", tmp_path)
    (table,) = tmp_path.glob("bench_*/bench.csv")
    assert "sizes,0.1,2.0,s" in table.read_text()


def test_the_table_of_a_bench_goes_between_the_marks_of_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = importlib.import_module("bench")
    page = tmp_path / "page.md"
    for text in ("no marks\n", "{1}\n{0}\n".format(*bench.MARKS)):
        page.write_text(text)
        with pytest.raises(SystemExit, match=r"page\.md: needs a line <!-- bench -->"):
            run("bench", "--results", tmp_path, "--page", page)
    monkeypatch.setattr(bench, "measured", lambda *_: [[bench.row("sizes", "0.1", 2.0, "s")]])
    page.write_text("before\n{}\nold\n{}\nafter\n".format(*bench.MARKS))
    for _ in range(2):  # the second run replaces the first one's table
        run("bench", "--results", tmp_path, "--page", page)
        text = page.read_text()
        assert text.startswith("before\n<!-- bench -->\n\n*")
        assert text.endswith("|\n\n<!-- end of bench -->\nafter\n") and "old" not in text
        assert text.count("| sizes | 0.1 | 2.0 | s |  |") == 1 and torch.__version__[:4] in text


def test_a_clip_is_made_and_timed(tmp_path: Path) -> None:
    pytest.importorskip("av")
    (found,) = importlib.import_module("bench").clip(tmp_path, count=3)
    assert found["unit"] == "frames/s" and found["value"] > 0
    assert (tmp_path / "light.mp4").stat().st_size > 1000


def test_without_av_a_bench_leaves_the_clip_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    assert importlib.import_module("bench").clip(tmp_path) == []
    assert "pip install av" in capsys.readouterr().out


@pytest.mark.slow
def test_bench_measures_every_part(tmp_path: Path) -> None:
    run("bench", "--rounds", "1", "--seconds", "0.01", "--largest", "0.1", "--results", tmp_path)
    (results,) = tmp_path.glob("bench_*")
    with open(results / "bench.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    parts = [part for part, _ in itertools.groupby(row["part"] for row in rows)]
    assert parts == [
        *("sizes", "sizes, fast", "clip", "scaling", "training", "roofline", "enhancement")
    ]
    assert all(float(row["value"]) > 0 for row in rows)
    for part in ("training", "enhancement"):
        names = {row["name"].split(",")[0] for row in rows if row["part"] == part}
        assert names >= {"ConditionalFlow", "RetinexNet", "UPTFlow", "AnlightenDiff", "stand-in"}
    assert (results / "bench.md").read_text().count("\n| ") == len(rows)


def test_twins_of_a_comparison_may_be_other_takes_of_a_scene() -> None:
    compare = importlib.import_module("compare")
    rng = np.random.default_rng(0)
    looks = torch.from_numpy(rng.integers(40, 200, (2, 16, 16, 3)).astype(np.uint8))
    targets = np.concatenate([looks[:1].numpy() // 2, 255 - looks[1:].numpy()])
    trained = {"training_thumbnails": looks}
    assert compare.twins_of(targets, trained, 0.98) == [True, False]
    assert compare.twins_of(targets, trained, 0.0) == [False, False]
    assert compare.twins_of(targets, {}, 0.98) == [None, None]


def folders(data: Path) -> list[str]:
    """--set arguments that name tiny training and evaluation pairs, and write below `data`."""
    pairs = [
        f"{part}_{kind}_dir={data / 'data' / part / kind}"
        for part in ("train", "val", "eval")
        for kind in ("low", "high")
    ]
    places = [f"results_dir={data / 'results'}", "cache_megabytes=64"]
    return [text for pair in pairs + places for text in ("--set", pair)]


@pytest.mark.slow
def test_comparison_trains_scores_and_shows_every_system(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_data(tmp_path, train=6, evaluation=2)
    run(
        "compare",
        "--minutes",
        "0.001",
        *folders(tmp_path),
        "--set",
        "eval_size=64,64",
        "--set",
        "image_size=64,64",
    )
    (results,) = (tmp_path / "results").glob("comparison_*")
    with open(results / "comparison.csv", newline="") as stream:
        rows = {row["system"]: row for row in csv.DictReader(stream)}
    systems = {"ConditionalFlow", "RetinexNet", "UPTFlow", "AnlightenDiff"}
    assert rows.keys() == systems | {"gamma 0.4", "histogram equalisation", "CLAHE"}
    for name, row in rows.items():
        assert 0 < float(row["psnr"]) < 60 and -1 <= float(row["ssim"]) <= 1
        costs = ("parameters_M", "train_images_per_s", "seconds_600x400", "MiB_600x400")
        assert (
            all(float(row[key]) > 0 for key in costs)
            if name in systems
            else not any(row[key] for key in costs)
        )
    assert len(list((results / "strips").iterdir())) == 2
    table = (results / "comparison.md").read_text()
    assert table.count("\n| ") == 7 and table in capsys.readouterr().out

    weights = next((results / "weights" / "ConditionalFlow").glob("best_model.pth"))
    evaluate = [
        "--mode",
        "evaluate",
        "--checkpoint",
        str(weights),
        *folders(tmp_path),
        "--set",
        "eval_size=64,64",
    ]
    assert ms.main(evaluate) == 0
    (summary,) = (tmp_path / "results").glob("eval_*/summary.json")
    scores = json.loads(summary.read_text())["metrics"]
    for metric in ("psnr", "ssim", "ciede2000"):
        assert float(rows["ConditionalFlow"][metric]) == pytest.approx(
            scores[metric]["mean"], abs=1e-3
        )
    expected = []
    for path in sorted((tmp_path / "data" / "eval" / "low").iterdir()):
        low, high = (
            to_tensor(np.asarray(Image.open(p)))[None]
            for p in (path, path.parent.parent / "high" / path.name)
        )
        low, high = (resize(image, [64, 64], quantise=True).double() for image in (low, high))
        expected.append(float(-10 * ((low**0.4 - high) ** 2).mean().log10()))
    # the evaluator's is of 8 bits
    assert float(rows["gamma 0.4"]["psnr"]) == pytest.approx(np.mean(expected), abs=0.02)


def test_folders_of_pictures_are_rows_of_the_comparison(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_data(tmp_path, train=1, evaluation=3)
    data, expected = tmp_path / "data" / "eval", list[float]()
    for path in sorted((data / "high").iterdir()):
        high = np.asarray(Image.open(path))
        ours = np.clip(high.astype(int) + 9, 0, 255).astype(np.uint8)
        save_picture(tmp_path / "net" / f"{path.stem}_out.png", ours)
        save_picture(tmp_path / "perfect" / path.name, high)
        score = skimage.metrics.peak_signal_noise_ratio(high, ours, data_range=255)
        expected.append(float(score))
    named = [f"{name}={tmp_path / name}" for name in ("net", "perfect")]
    outputs = [word for text in named for word in ("--outputs", text)]
    native = ["--set", "eval_size=native", "--set", "device=cpu"]
    run("compare", "--only", "none", *outputs, *folders(tmp_path), *native)
    (results,) = (tmp_path / "results").glob("comparison_*")
    with open(results / "comparison.csv", newline="") as stream:
        rows = {row["system"]: row for row in csv.DictReader(stream)}
    assert list(rows) == ["net", "perfect", "gamma 0.4", "histogram equalisation", "CLAHE"]
    assert float(rows["net"]["psnr"]) == pytest.approx(np.mean(expected), abs=1e-4)
    assert float(rows["perfect"]["psnr"]) == 100.0
    costs = ("parameters_M", "train_images_per_s", "seconds_600x400", "MiB_600x400", "bits_per_dim")
    assert not any(row.get(key) for row in rows.values() for key in costs)
    scores = []
    for path in sorted((data / "low").iterdir()):
        low, high = (np.asarray(Image.open(data / k / path.name)) for k in ("low", "high"))
        ours = np.rint(255 * skimage.exposure.equalize_adapthist(low / 255.0)) / 255
        scores.append(skimage.metrics.peak_signal_noise_ratio(high / 255.0, ours, data_range=1))
    assert float(rows["CLAHE"]["psnr"]) == pytest.approx(np.mean(scores), abs=0.02)
    strips = sorted((results / "strips").iterdir())
    assert len(strips) == 3 and Image.open(strips[0]).width == 7 * 204 - 4
    assert "| net |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--outputs", "net=nowhere"], ["outputs_dir", "nowhere"]),
        (["--outputs", "net={some}"], ["--outputs", "1 of 2 pairs have no output", "add them"]),
        (["--outputs", "net={small}"], ["0.png", "is 20x20", "48x40"]),
        (["--outputs", "net"], ["--outputs net", "NAME=FOLDER"]),
        (["--outputs", "CLAHE=a"], ["--outputs CLAHE=a", "another row"]),
        (["--outputs", "a={some}", "--outputs", "a={some}"], ["another row has the name a"]),
        (["--set", "outputs_dir={some}"], ["outputs_dir", "--outputs NAME=FOLDER"]),
        (["--set", "eval_high_dir="], ["eval_high_dir", "no folder"]),
    ],
)
def test_bad_folders_of_pictures_are_one_line(
    arguments: list[str],
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compare = importlib.import_module("compare")
    make_data(tmp_path, train=1, evaluation=2)
    save_picture(tmp_path / "some" / "0.png", np.zeros((40, 48, 3), np.uint8))
    for stem in "01":
        save_picture(tmp_path / "small" / f"{stem}.png", np.zeros((20, 20, 3), np.uint8))
    places = {name: str(tmp_path / name) for name in ("some", "small")}
    given = [*folders(tmp_path), *(argument.format(**places) for argument in arguments)]
    monkeypatch.setattr(sys, "argv", ["compare.py", "--only", "none", *given])
    status = compare.main()
    told = capsys.readouterr().err.replace("\r", "\n").splitlines()[-1]
    assert_one_line_error(status, told, *words)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--minutes", "0"], ["--minutes", "above 0"]),
        (["--set", "max_minutes=3"], ["max_minutes", "leave it out"]),
        (["--set", "trainig=join"], ["unknown key trainig"]),
        (["--set", "eval_low_dir=nowhere"], ["nowhere"]),
        (["--weights", "UPT-Flow=x.pth"], ["UPT-Flow", "UPTFlow"]),
        (["--weights", "UPTFlow=x.pth"], ["x.pth"]),
        (["--only", "Nobody"], ["Nobody"]),
    ],
)
def test_mistakes_are_one_line_before_any_training(
    arguments: list[str],
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compare = importlib.import_module("compare")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare.ms, "Trainer", lambda *arguments: pytest.fail("it trains"))
    monkeypatch.setattr(sys, "argv", ["compare.py", *arguments])
    assert_one_line_error(compare.main(), capsys.readouterr().err, *words)
    assert not list(tmp_path.iterdir())


def test_weights_of_another_system_are_told_before_any_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    findings = importlib.import_module("retinexnet_findings")
    given = f"split, transposed={ms.RELEASED}"
    monkeypatch.setattr(
        sys,
        "argv",
        ["retinexnet_findings.py", "--weights", given, *folders(make_data(tmp_path, 2, 1))],
    )
    assert_one_line_error(findings.main(), capsys.readouterr().err, "ConditionalFlow", "RetinexNet")
    assert not (tmp_path / "results").exists()


def test_an_interrupted_training_ends_the_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare = importlib.import_module("compare")
    monkeypatch.setattr(compare.ms.Trainer, "fit", lambda self: 130)
    monkeypatch.setattr(sys, "argv", ["compare.py", *folders(make_data(tmp_path, 6, 1))])
    with pytest.raises(SystemExit) as ended:
        compare.main()
    assert ended.value.code == 130


def test_findings_on_hand_made_pictures() -> None:
    findings = importlib.import_module("retinexnet_findings")
    image = np.zeros((40, 50, 3))
    image[:10, :, :] = 0.95
    image[:10, :25, 2] = 0.5  # yellow is not white
    assert findings.white_share(image) == pytest.approx(0.25 * 0.5)
    rng = np.random.default_rng(0)
    target = np.repeat(rng.random((40, 50, 1)), 3, axis=2)
    target[:20] = 0.5  # the plain half
    zones = findings.plain_zones(target)
    assert zones[:4].all() and not zones[12:].any() and zones.mean() == pytest.approx(0.2, abs=0.02)
    assert np.abs(findings.detail(np.full((9, 9, 3), 0.3))).max() < 1e-12
    noise = rng.normal(0, 0.1, (200, 200, 3))
    # of white noise's variance: 1 - 2 g(0) + sum of g^2
    left = 1 - 2 / (2 * np.pi * 4) + 1 / (4 * np.pi * 4)
    assert findings.detail(noise).std() == pytest.approx(0.1 * left**0.5, rel=0.02)
    ramp = np.linspace(0, 1, 200)[None, :, None].repeat(9, 0).repeat(3, 2)
    assert np.abs(findings.detail(ramp)[:, 20:-20]).max() < 1e-9


@pytest.mark.slow
def test_retinexnet_findings_trains_and_measures_every_variant(tmp_path: Path) -> None:
    make_data(tmp_path, train=4, evaluation=2)
    small = ["--set", "image_size=32,32", "--set", "batch_size=2"]
    run("retinexnet_findings", "--minutes", "0.001", *folders(tmp_path), *small)
    (results,) = (tmp_path / "results").glob("retinexnet_findings_*")
    with open(results / "findings.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["variant"] for row in rows] == list(
        importlib.import_module("retinexnet_findings").VARIANTS
    )
    assert all(float(row["plain noise"]) > 0 and 0 <= float(row["white"]) <= 1 for row in rows)
    assert float(rows[-1]["relit"]) == 1.0  # ignore_ienhance: the illumination is left out
    assert len(list(results.glob("*.png"))) == len(rows)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("likelihood", ["2 pairs, bits per dimension", "the right one is lower on"]),
        ("exposure", ["none", "gain", "light", "model"]),
        ("uncertainty", ["2 pairs: Spearman", "between pictures"]),
        ("limits", ["training", "validation", "coarser than sigma 32 from the target"]),
    ],
)
def test_the_released_weights_are_measured_on_pairs(
    name: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_data(tmp_path, train=2, evaluation=2)
    samples = ["--set", "samples=2"] if name == "uncertainty" else []
    run(name, *folders(tmp_path), "--set", "device=cpu", *samples)
    printed = capsys.readouterr().out
    assert all(word in printed for word in words) and "nan" not in printed, printed


def test_the_model_is_brought_to_a_mean_by_its_prior(tmp_path: Path) -> None:
    exposure = importlib.import_module("exposure")
    loaded = ms.load_model(str(ms.RELEASED), {"device": "cpu"}, ms.ConditionalFlow)
    low = np.random.default_rng(0).integers(0, 40, (37, 42, 3), dtype=np.uint8)
    store = PairStore(find_pairs(*map(str, write_pairs(tmp_path, 1)), "eval"), 0)
    bench = exposure.Bench(loaded, loaded.use, loaded.runtime, store)
    for mean in (0.2, 0.6):
        picture = exposure.through_the_model(bench, low, mean)
        assert picture.shape == low.shape and picture.mean() == pytest.approx(mean, abs=2e-3)


def test_ablation_adds_a_line_for_every_run(tmp_path: Path) -> None:
    make_data(tmp_path, train=6)
    small = [
        "flow_channels=8",
        "thumbnail_size=32",
        "crop_size=32",
        "image_size=32,32",
        "batch_size=1",
    ]
    chosen = [text for pair in small for text in ("--set", pair)]
    variants = [
        "recipe",
        "without global branch",
        "without flow (direct regression)",
        "input itself",
    ]
    for variant in [*variants, variants[0]]:  # one again: it gets a folder of its own
        run("ablation", variant, "--minutes", "0.001", *folders(tmp_path), *chosen)
    with open(tmp_path / "results" / "ablation.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["variant"] for row in rows] == [*variants, variants[0]]
    assert len(list((tmp_path / "results" / "ablation").iterdir())) == 4  # the input trains not
    assert all(
        0 < float(row["psnr"]) < 60
        and (float(row["steps"]) >= 1) == (row["variant"] != variants[3])
        for row in rows
    )
    assert rows[2]["bits_per_dim"] == "nan" and float(rows[0]["bits_per_dim"]) > 0
