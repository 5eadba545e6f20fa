"""The command line as a user meets it: every mode, what it writes, one line for every mistake."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import pickle
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.metrics
import torch
from cli_tools import (
    TINY,
    assert_one_line_error,
    dark_picture,
    files_under,
    make_data,
    make_pairs,
    parsed,
    run_script,
    save_picture,
    target_picture,
    tiny_config,
    write_config,
)
from PIL import Image

import model_script as ms
from support.checkpoints import RETIRED
from support.commands import EXAMPLES
from support.decoding import read_image
from support.metrics import ciede2000_of
from support.pictures import resize, to_tensor, to_uint8

TWIN = "2"  # the evaluation pair whose target is also a training target


class Workshop:
    """A folder with data, a config with relative paths, and what train and evaluate made of
    them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoint = folder / "ckpt" / "best_model.pth"
        self.trained: subprocess.CompletedProcess[str]
        self.evaluated: subprocess.CompletedProcess[str]

    @property
    def results(self) -> Path:
        """The folder of the evaluation."""
        (found,) = (self.folder / "results").glob("eval_*")
        return found

    def rows(self) -> list[dict[str, str]]:
        """metrics.csv."""
        with open(self.results / "metrics.csv", newline="", encoding="utf-8") as stream:
            return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """Trained and evaluated through the command line, once for all tests."""
    shop = Workshop(make_data(tmp_path_factory.mktemp("workshop"), evaluation=2))
    twin = target_picture(0)  # the first training target
    for kind, pixels in (("high", twin), ("low", dark_picture(twin, 9))):
        save_picture(shop.folder / "data" / "eval" / kind / f"{TWIN}.png", pixels)
    write_config(shop.folder, **tiny_config(Path("."), num_epochs=1))
    shop.trained = run_script("--mode", "train", "--config", "config.json", cwd=shop.folder)
    assert shop.trained.returncode == 0, shop.trained.stderr
    evaluate = (
        "--mode",
        "evaluate",
        "--checkpoint",
        "ckpt/best_model.pth",
        "--config",
        "config.json",
    )
    shop.evaluated = run_script(*evaluate, cwd=shop.folder)
    assert shop.evaluated.returncode == 0, shop.evaluated.stderr
    return shop


def enhance(checkpoint: Path, source: Path, target: Path, *arguments: str) -> int:
    """--mode enhance in this process."""
    files = ["--checkpoint", str(checkpoint), "--input", str(source), "--output", str(target)]
    return ms.main(["--mode", "enhance", *files, "--set", "device=cpu", *arguments])


def pixels_of(path: Path) -> np.ndarray:
    """(H, W, 3) uint8."""
    return np.asarray(Image.open(path).convert("RGB"))


# train and evaluate -------------------------------------------------------------------------------


def test_train_says_what_it_does_and_writes_only_its_outputs(workshop: Workshop) -> None:
    assert "5 training and 1 validation pairs" in workshop.trained.stdout
    assert "ckpt/best_model.pth" in workshop.trained.stdout
    assert {path.name for path in (workshop.folder / "ckpt").glob("[!.]*")} == {
        "best_model.pth",
        "checkpoint_epoch_1.pth",
    }
    assert {path.name for path in workshop.folder.iterdir()} == {
        "data",
        "config.json",
        "ckpt",
        "logs",
        "results",
    }


def test_libraries_do_not_chatter(workshop: Workshop) -> None:
    assert "Warning" not in workshop.trained.stderr + workshop.evaluated.stderr


def test_evaluation_files(workshop: Workshop) -> None:
    rows = workshop.rows()
    assert list(rows[0])[:3] == ["filename", "psnr", "ssim"]
    assert [row["filename"] for row in rows] == ["0.png", "1.png", "2.png"]
    names = {f"{stem}{suffix}.png" for stem in "012" for suffix in ("", "_viz")}
    assert {path.name for path in (workshop.results / "images").iterdir()} == names
    assert {path.name for path in workshop.results.iterdir()} == {
        "metrics.csv",
        "summary.json",
        "overview.png",
        "images",
    }
    assert {path.name for path in (workshop.folder / "results").iterdir()} == {
        workshop.results.name,
        "evaluation_results.json",
    }
    for stem in "012":
        assert Image.open(workshop.results / "images" / f"{stem}.png").size == (32, 32)
        width, height = Image.open(workshop.results / "images" / f"{stem}_viz.png").size
        # three pictures enlarged for their captions
        assert width == 3 * 200 + 2 * 4 and 200 < height < 240
    overview = Image.open(workshop.results / "overview.png")
    assert 1200 <= overview.width <= 1220 and overview.height > 3 * 390


def test_scores_are_those_of_the_written_pictures(workshop: Workshop) -> None:
    for row in workshop.rows():
        enhanced = pixels_of(workshop.results / "images" / row["filename"]) / 255
        with Image.open(workshop.folder / "data" / "eval" / "high" / row["filename"]) as target:
            high = (
                ms.resize(to_tensor(np.asarray(target))[None], (32, 32), quantise=True)[0]
                .permute(1, 2, 0)
                .double()
                .numpy()
            )
        psnr = skimage.metrics.peak_signal_noise_ratio(high, enhanced, data_range=1)
        ssim = skimage.metrics.structural_similarity(high, enhanced, data_range=1, channel_axis=2)
        # nothing else is scored than the levels of the file
        assert float(row["psnr"]) == pytest.approx(psnr, abs=1e-5)
        assert float(row["ssim"]) == pytest.approx(ssim, abs=1e-6)
        assert float(row["ciede2000"]) == pytest.approx(ciede2000_of(enhanced, high), abs=1e-4)
        assert float(row["seconds"]) > 0


def test_twins_of_training_targets_are_flagged(workshop: Workshop) -> None:
    flags = {row["filename"]: row["twin_in_training"] for row in workshop.rows()}
    assert flags == {"0.png": "False", "1.png": "False", f"{TWIN}.png": "True"}
    summary = json.loads((workshop.results / "summary.json").read_text())
    alone = [float(row["psnr"]) for row in workshop.rows() if row["twin_in_training"] == "False"]
    assert summary["without_twins"]["num_images"] == 2
    assert summary["without_twins"]["metrics"]["psnr"]["mean"] == pytest.approx(np.mean(alone))


def test_summary_agrees_with_the_table(workshop: Workshop) -> None:
    summary = json.loads((workshop.results / "summary.json").read_text())
    assert set(summary) == {
        *(
            "num_images",
            "psnr",
            "ssim",
            "metrics",
            "without_twins",
            "protocol",
            "seconds_per_image",
            "checkpoint",
        ),
        *("checkpoint_sha256", "use", "device", "versions", "config", "warnings"),
        *("commit", "checkpoint_commit"),
    }
    rows = workshop.rows()
    assert summary["num_images"] == len(rows) == 3
    for name, entry in summary["metrics"].items():
        values = np.array([float(row[name]) for row in rows])
        assert entry["mean"] == pytest.approx(values.mean()), name
        assert entry["std"] == pytest.approx(values.std()), name
        assert entry["median"] == pytest.approx(np.median(values)), name
        assert entry["uses_ground_truth"] is name.endswith("gt_mean"), name
    worst = min(rows, key=lambda row: float(row["psnr"]))
    assert summary["metrics"]["psnr"]["worst_file"] == worst["filename"]
    assert (
        summary["psnr"] == summary["metrics"]["psnr"]["mean"]
        and summary["ssim"] == summary["metrics"]["ssim"]["mean"]
    )
    assert "32x32" in summary["protocol"]
    assert summary["config"]["flow_channels"] == TINY["flow_channels"]
    assert summary["use"]["device"] == "cpu" and "device" not in summary["config"]
    brief = json.loads((workshop.folder / "results" / "evaluation_results.json").read_text())
    assert brief["psnr"] == summary["psnr"] and brief["ssim"] == summary["ssim"]
    assert brief["num_test_samples"] == 3 and brief["checkpoint"] == "ckpt/best_model.pth"
    assert (workshop.folder / brief["results_dir"]) == workshop.results


def test_eval_size_native_scores_at_the_pictures_own_size(
    workshop: Workshop, tmp_path: Path
) -> None:
    settings = tiny_config(workshop.folder, results_dir=str(tmp_path), eval_size="native")
    config = tmp_path / "native.json"
    config.write_text(json.dumps(settings))
    assert (
        ms.main(
            [
                "--mode",
                "evaluate",
                "--checkpoint",
                str(workshop.checkpoint),
                "--config",
                str(config),
            ]
        )
        == 0
    )
    (results,) = tmp_path.glob("eval_*")
    summary = json.loads((results / "summary.json").read_text())
    assert summary["protocol"] == "native resolution"
    scores = []
    for name in ("0.png", "1.png", "2.png"):
        enhanced, high = (
            pixels_of(results / "images" / name) / 255,
            pixels_of(workshop.folder / "data/eval/high" / name) / 255,
        )
        assert enhanced.shape == (40, 48, 3)
        scores.append(skimage.metrics.peak_signal_noise_ratio(high, enhanced, data_range=1))
    assert summary["psnr"] == pytest.approx(np.mean(scores), abs=1e-5)
    resized = json.loads((workshop.results / "summary.json").read_text())
    assert summary["psnr"] != resized["psnr"]


def test_without_the_training_thumbnails_no_pair_is_flagged(
    workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = torch.load(workshop.checkpoint, weights_only=True)
    del content["training_thumbnails"]
    torch.save(content, tmp_path / "anonymous.pth")
    settings = tiny_config(workshop.folder, results_dir=str(tmp_path / "results"))
    (tmp_path / "config.json").write_text(json.dumps(settings))
    files = [
        "--checkpoint",
        str(tmp_path / "anonymous.pth"),
        "--config",
        str(tmp_path / "config.json"),
    ]
    assert ms.main(["--mode", "evaluate", *files]) == 0
    assert "no pair is flagged" in capsys.readouterr().out
    (path,) = (tmp_path / "results").glob("eval_*/metrics.csv")
    with open(path, newline="", encoding="utf-8") as stream:
        assert [row["twin_in_training"] for row in csv.DictReader(stream)] == ["", "", ""]


def test_chosen_scenes_are_evaluated_alone(
    workshop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [
        f"eval_{kind}_dir={workshop.folder / 'data/eval' / kind}" for kind in ("low", "high")
    ]
    common = [
        part
        for text in (*folders, f"results_dir={workshop.folder / 'some'}")
        for part in ("--set", text)
    ]
    arguments = ["--mode", "evaluate", "--checkpoint", str(workshop.checkpoint), *common]
    assert ms.main([*arguments, "--set", "scenes=2, 0"]) == 0
    (results,) = (workshop.folder / "some").glob("eval_*")
    with open(results / "metrics.csv", newline="", encoding="utf-8") as stream:
        found = {row["filename"]: row for row in csv.DictReader(stream)}
    assert list(found) == ["2.png", "0.png"]
    whole = {row["filename"]: row for row in workshop.rows()}
    assert all(found[name]["psnr"] == whole[name]["psnr"] for name in found)
    shutil.rmtree(workshop.folder / "some")
    capsys.readouterr()
    assert_one_line_error(
        ms.main([*arguments, "--set", "scenes=0,9"]),
        capsys.readouterr().err.split("\n")[-2],
        "scenes",
        "9",
    )
    assert not (workshop.folder / "some").exists()


def evaluation(checkpoint: Path, data: Path, results: Path, *arguments: str) -> Path:
    """The folder that --mode evaluate writes, in this process."""
    settings = tiny_config(data, results_dir=str(results))
    keys = ("device", "eval_low_dir", "eval_high_dir", "results_dir")
    given = [word for key in keys for word in ("--set", f"{key}={settings[key]}")]
    status = ms.main(["--mode", "evaluate", "--checkpoint", str(checkpoint), *given, *arguments])
    assert status == 0
    (found,) = results.glob("eval_*")
    return found


def scores_in(results: Path) -> dict[str, str]:
    """File name -> PSNR of an evaluation."""
    with open(results / "metrics.csv", newline="", encoding="utf-8") as stream:
        return {row["filename"]: row["psnr"] for row in csv.DictReader(stream)}


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("size", ["native", "32,32"])
def test_what_is_scored_is_what_the_user_gets(
    workshop: Workshop, tmp_path: Path, size: str, temperature: int
) -> None:
    """The evaluation's picture, the validation's and the file of --mode enhance: identical."""
    warm = ["--set", f"temperature={temperature}"]
    content = torch.load(workshop.checkpoint, weights_only=True)
    noise = torch.Generator().manual_seed(0)  # or a model so young would answer grey
    for weights in content["model"].values():
        weights += 0.05 * torch.randn(weights.shape, generator=noise)
    checkpoint = tmp_path / "lively.pth"
    torch.save(content, checkpoint)
    results = evaluation(
        checkpoint, workshop.folder, tmp_path / "r", "--set", f"eval_size={size}", *warm
    )
    loaded = ms.load_model(
        str(checkpoint),
        {"device": "cpu", "temperature": float(temperature)},
        ms.ConditionalFlow,
    )
    sides = None if size == "native" else (32, 32)
    for name in ("0.png", "1.png"):
        low, high = (
            read_image(workshop.folder / "data/eval" / kind / name) for kind in ("low", "high")
        )
        pair = (loaded.model, low, high, sides, loaded.use, loaded.runtime)
        validated = to_uint8(ms.score_pair(*pair).enhanced)
        if sides:
            low = to_uint8(resize(to_tensor(low)[None], sides)[0])
        source = save_picture(tmp_path / f"low_{name}", low)
        assert enhance(checkpoint, source, tmp_path / name, *warm) == 0
        enhanced = pixels_of(tmp_path / name)
        assert enhanced.std() > 1
        np.testing.assert_array_equal(pixels_of(results / "images" / name), enhanced)
        np.testing.assert_array_equal(validated, enhanced)


def test_how_a_training_was_used_does_not_stick_to_its_weights(
    workshop: Workshop, tmp_path: Path
) -> None:
    settings = tiny_config(workshop.folder, num_epochs=1) | {
        f"{kind}_dir": str(tmp_path / kind) for kind in ("checkpoint", "log", "results")
    }
    (tmp_path / "c.json").write_text(json.dumps(settings | {"scenes": "0,2"}))
    used = dict(temperature="1", eval_size="native", tile_size="64")
    given = [word for key, value in used.items() for word in ("--set", f"{key}={value}")]
    assert ms.main(["--mode", "train", "--config", str(tmp_path / "c.json"), *given]) == 0
    weights = tmp_path / "checkpoint" / "best_model.pth"
    stored = torch.load(weights, weights_only=True)["config"]
    assert stored.keys() == {key.name for key in dataclasses.fields(ms.Config)}
    results = evaluation(weights, workshop.folder, tmp_path / "results")
    assert scores_in(results) == {row["filename"]: row["psnr"] for row in workshop.rows()}


def test_a_checkpoint_of_november_is_read_without_how_it_was_used(
    workshop: Workshop, tmp_path: Path
) -> None:
    """They store how they were used, too; nothing of that may reach an evaluation."""
    content = torch.load(workshop.checkpoint, weights_only=True)
    used = ms.Use(scenes="1", temperature=1.0, eval_size="native", results_dir="elsewhere")
    content["config"] |= {key: getattr(used, key) for key in RETIRED}
    torch.save(content, tmp_path / "old.pth")
    results = evaluation(tmp_path / "old.pth", workshop.folder, tmp_path / "results")
    assert scores_in(results) == {row["filename"]: row["psnr"] for row in workshop.rows()}
    # what is no key of today or then is still a mistake
    content["config"]["brightness"] = 1
    torch.save(content, tmp_path / "odd.pth")
    low = workshop.folder / "data/eval/low/0.png"
    assert enhance(tmp_path / "odd.pth", low, tmp_path / "out.png") == 2


@pytest.mark.parametrize("mode", ["evaluate", "enhance"])
def test_the_trained_weights_before_any_training_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], mode: str
) -> None:
    monkeypatch.chdir(tmp_path)
    files = ["--checkpoint", "checkpoints/best_model.pth"]
    files += ["--input", "a.png", "--output", "b.png"] if mode == "enhance" else []
    status = ms.main(["--mode", mode, *files])
    missing = "checkpoints/best_model.pth: no such checkpoint"
    told = ("--mode train", "checkpoints/released.pth")
    assert_one_line_error(status, capsys.readouterr().err, missing, *told)
    assert files_under(tmp_path) == set()


# enhance ------------------------------------------------------------------------------------------


def test_enhance_turns_an_odd_sized_photograph_upright(workshop: Workshop, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    source = save_picture(tmp_path / "low.jpg", dark_picture(target_picture(3, 37, 51)), exif=exif)
    files = ("--checkpoint", workshop.checkpoint, "--input", source, "--output", "sub/out.png")
    done = run_script("--mode", "enhance", *files, "--set", "device=cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "sub/out.png" in done.stdout and "37x51" in done.stdout
    with Image.open(tmp_path / "sub" / "out.png") as out:
        assert out.size == (37, 51) and out.mode == "RGB"
        assert out.getexif().get(0x0112, 1) == 1
    assert files_under(tmp_path) == {"low.jpg", "sub", "sub/out.png"}


@pytest.mark.parametrize(
    ("suffix", "expected"),
    [
        (".png", "PNG"),
        (".jpg", "JPEG"),
        (".JPEG", "JPEG"),
        (".bmp", "BMP"),
        (".tif", "TIFF"),
        (".webp", "WEBP"),
    ],
)
def test_the_output_suffix_decides_the_format(
    workshop: Workshop, tmp_path: Path, suffix: str, expected: str
) -> None:
    out = tmp_path / f"out{suffix}"
    assert enhance(workshop.checkpoint, workshop.folder / "data/eval/low/0.png", out) == 0
    with Image.open(out) as picture:
        assert picture.format == expected and picture.size == (48, 40)


def test_enhance_repeats_itself_and_the_temperature_is_heard(
    workshop: Workshop, tmp_path: Path
) -> None:
    low = workshop.folder / "data/eval/low/0.png"
    variants = {
        "a": [],
        "b": [],
        "warm": ["--set", "temperature=1"],
        "warm_again": ["--set", "temperature=1"],
        "other": ["--set", "temperature=1", "--set", "seed=1"],
    }
    for name, arguments in variants.items():
        assert enhance(workshop.checkpoint, low, tmp_path / f"{name}.png", *arguments) == 0
    found = {name: pixels_of(tmp_path / f"{name}.png") for name in variants}
    assert np.array_equal(found["a"], found["b"])
    assert np.array_equal(found["warm"], found["warm_again"])
    assert not np.array_equal(found["a"], found["warm"])
    assert not np.array_equal(found["warm"], found["other"])


def test_enhance_replaces_an_existing_output(workshop: Workshop, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    out.write_bytes(b"older")
    assert enhance(workshop.checkpoint, workshop.folder / "data/eval/low/0.png", out) == 0
    assert Image.open(out).size == (48, 40)


# mistakes -----------------------------------------------------------------------------------------


class Bomb:
    """Makes a file as soon as it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


BAD_CHECKPOINTS = (
    *(
        "text",
        "empty",
        "pickle",
        "torch_pickle",
        "truncated",
        "version",
        "nan",
        "missing",
        "folder",
        "list",
        "misfit",
    ),
    *("config_list", "config_value", "config_key", "weights_list"),
)


def bad_checkpoint(kind: str, good: Path, folder: Path) -> Path:
    """A file that is no usable checkpoint; folder/exploded exists after its code has run."""
    path = folder / "bad.pth"
    if kind == "text":
        path.write_text("these are not weights\n")
    elif kind == "empty":
        path.touch()
    elif kind == "pickle":
        path.write_bytes(
            pickle.dumps({"format_version": 1, "config": {}, "model": Bomb(folder / "exploded")})
        )
    elif kind == "torch_pickle":
        torch.save({"format_version": 1, "config": {}, "model": Bomb(folder / "exploded")}, path)
    elif kind == "truncated":
        path.write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    elif kind == "folder":
        path.mkdir()
    elif kind == "list":
        torch.save([1, 2, 3], path)
    elif kind != "missing":
        content = torch.load(good, weights_only=True)
        name = next(iter(content["model"]))
        if kind == "version":
            content["format_version"] = 999
        elif kind == "nan":
            content["model"][name] = torch.full_like(content["model"][name], float("nan"))
        elif kind == "misfit":
            content["model"] = {name: content["model"][name]}
        elif kind == "weights_list":
            content["model"] = [1, 2]
        elif kind == "config_list":
            content["config"] = [1, 2]
        elif kind == "config_value":
            content["config"]["flow_channels"] = "many"
        elif kind == "config_key":
            content["config"][3] = 4
        torch.save(content, path)
    return path


@pytest.mark.parametrize("kind", BAD_CHECKPOINTS)
def test_bad_checkpoints_are_refused_in_one_line(
    workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    path = bad_checkpoint(kind, workshop.checkpoint, tmp_path)
    before = files_under(tmp_path)
    status = enhance(path, workshop.folder / "data/eval/low/0.png", tmp_path / "out.png")
    assert_one_line_error(status, capsys.readouterr().err, str(path))
    assert files_under(tmp_path) == before
    settings = tiny_config(
        workshop.folder, results_dir=str(tmp_path / "r"), checkpoint_dir=str(tmp_path / "c")
    )
    (tmp_path / "config.json").write_text(json.dumps(settings | {"log_dir": str(tmp_path / "l")}))
    for arguments in (["--mode", "evaluate", "--checkpoint"], ["--mode", "train", "--resume"]):
        status = ms.main([*arguments, str(path), "--config", str(tmp_path / "config.json")])
        assert_one_line_error(status, capsys.readouterr().err, str(path))
        assert files_under(tmp_path) == before | {"config.json"}


def test_a_hostile_checkpoint_never_runs_its_code(workshop: Workshop, tmp_path: Path) -> None:
    for kind in ("pickle", "torch_pickle"):
        path = bad_checkpoint(kind, workshop.checkpoint, tmp_path)
        with open(path, "rb") as stream:
            assert b"mkdir" in stream.read()  # the code is there
        before = files_under(tmp_path)
        files = (
            "--checkpoint",
            path,
            "--input",
            workshop.folder / "data/eval/low/0.png",
            "--output",
            "out.png",
        )
        done = run_script("--mode", "enhance", *files, cwd=tmp_path)
        assert_one_line_error(done.returncode, done.stderr, str(path))
        assert done.stdout.startswith("enhance: ") and done.stdout.count("\n") == 1
        assert files_under(tmp_path) == before


@pytest.mark.parametrize("kind", ["text", "empty", "missing", "truncated", "folder", "small"])
def test_bad_pictures_are_refused_in_one_line(
    workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    good = workshop.folder / "data/eval/low/0.png"
    path = tmp_path / "in.png"
    if kind == "text":
        path.write_text("this is no picture")
    elif kind == "empty":
        path.touch()
    elif kind == "truncated":
        path.write_bytes(good.read_bytes()[:600])
    elif kind == "folder":
        path.mkdir()
    elif kind == "small":
        save_picture(path, np.zeros((15, 40, 3), np.uint8))
    before = files_under(tmp_path)
    assert_one_line_error(
        enhance(workshop.checkpoint, path, tmp_path / "out.png"), capsys.readouterr().err, str(path)
    )
    assert files_under(tmp_path) == before


def test_a_bad_picture_in_a_data_set_is_named_or_left_out(
    workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_pairs(tmp_path / "eval", 2, first_seed=200)
    broken = tmp_path / "eval" / "low" / "1.png"
    broken.write_bytes(broken.read_bytes()[:300])
    folders = [f"eval_{kind}_dir={tmp_path / 'eval' / kind}" for kind in ("low", "high")]
    arguments = [
        "--mode",
        "evaluate",
        "--checkpoint",
        str(workshop.checkpoint),
        "--set",
        f"results_dir={tmp_path / 'r'}",
    ]
    arguments += [part for folder in folders for part in ("--set", folder)]
    assert ms.main(arguments) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "error: " in last and str(broken) in last and "on_bad_file=skip" in last
    assert not (tmp_path / "r").exists()
    assert ms.main([*arguments, "--set", "on_bad_file=skip"]) == 0
    assert f"left out: {broken}" in capsys.readouterr().out
    summary = json.loads(next((tmp_path / "r").glob("eval_*/summary.json")).read_text())
    assert summary["num_images"] == 1


def test_output_over_the_input_is_refused(
    workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = shutil.copy(workshop.folder / "data/eval/low/0.png", tmp_path / "low.png")
    link = tmp_path / "link.png"
    link.symlink_to(source)
    before = Path(source).read_bytes()
    for target in (Path(source), link, tmp_path / "nowhere" / ".." / "low.png"):
        (tmp_path / "nowhere").mkdir(exist_ok=True)
        assert_one_line_error(
            enhance(workshop.checkpoint, Path(source), target),
            capsys.readouterr().err,
            "input itself",
        )
    assert Path(source).read_bytes() == before


def test_unknown_output_suffix_is_refused(
    workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("out", "out.gif", "out.pth"):
        status = enhance(
            workshop.checkpoint, workshop.folder / "data/eval/low/0.png", tmp_path / name
        )
        assert_one_line_error(status, capsys.readouterr().err, name, ".png")
    assert files_under(tmp_path) == set()


def test_output_that_cannot_be_written(
    workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A parent that is a file, which even the superuser cannot write into."""
    (tmp_path / "file").write_text("kept")
    (tmp_path / "taken.png").mkdir()
    (tmp_path / "taken.png" / "0.png").mkdir()
    before = files_under(tmp_path)
    low = workshop.folder / "data/eval/low/0.png"
    for target in (tmp_path / "file" / "out.png", tmp_path / "taken.png"):
        assert_one_line_error(
            enhance(workshop.checkpoint, low, target), capsys.readouterr().err, str(target)
        )
    settings = tiny_config(workshop.folder, results_dir=str(tmp_path / "file" / "results"))
    config = workshop.folder / "blocked.json"
    config.write_text(json.dumps(settings))
    assert (
        ms.main(
            [
                "--mode",
                "evaluate",
                "--checkpoint",
                str(workshop.checkpoint),
                "--config",
                str(config),
            ]
        )
        == 2
    )
    last = capsys.readouterr().err.splitlines()[-1]
    assert "error: " in last and str(tmp_path / "file" / "results") in last
    config.unlink()
    assert files_under(tmp_path) == before and (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("key", ["checkpoint_dir", "log_dir"])
def test_training_that_cannot_write_says_so_in_one_line(
    workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    (tmp_path / "file").write_text("kept")
    dirs = {"checkpoint_dir": "c", "log_dir": "l", "results_dir": "r"} | {key: "file/below"}
    settings = tiny_config(workshop.folder, num_epochs=1) | {
        name: str(tmp_path / part) for name, part in dirs.items()
    }
    config = tmp_path / "config.json"
    config.write_text(json.dumps(settings))
    assert ms.main(["--mode", "train", "--config", str(config)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "error: " in last and str(tmp_path / "file") in last


def test_another_architecture_names_both_values(
    workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"flow_channels": 24}))
    low = workshop.folder / "data/eval/low/0.png"
    status = enhance(workshop.checkpoint, low, tmp_path / "out.png", "--config", str(config))
    assert_one_line_error(status, capsys.readouterr().err, "flow_channels", " 8,", " 24")
    assert files_under(tmp_path) == {"config.json"}
    # the same value is no conflict
    config.write_text(json.dumps({"flow_channels": 8, "batch_size": 3}))
    assert enhance(workshop.checkpoint, low, tmp_path / "out.png", "--config", str(config)) == 0


def test_missing_folders_are_named(workshop: Workshop, tmp_path: Path) -> None:
    config = write_config(tmp_path)  # names folders that do not exist
    done = run_script("--mode", "train", "--config", config, cwd=tmp_path)
    assert_one_line_error(
        done.returncode, done.stderr, "train_low_dir", str(tmp_path / "data" / "train" / "low")
    )
    files = ("--checkpoint", workshop.checkpoint, "--config", config)
    done = run_script("--mode", "evaluate", *files, cwd=tmp_path)
    assert_one_line_error(
        done.returncode, done.stderr, "eval_low_dir", str(tmp_path / "data" / "eval" / "low")
    )
    assert files_under(tmp_path) == {"config.json"}


def test_folders_without_a_common_stem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_picture(tmp_path / "low" / "a.png", target_picture(0))
    save_picture(tmp_path / "high" / "b.png", target_picture(0))
    folders = [
        part
        for kind in ("low", "high")
        for part in ("--set", f"train_{kind}_dir={tmp_path / kind}")
    ]
    assert ms.main(["--mode", "train", *folders, "--set", f"checkpoint_dir={tmp_path / 'c'}"]) == 2
    assert "matched by stem" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_that_is_not_there(
    workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    low = workshop.folder / "data/eval/low/0.png"
    status = enhance(workshop.checkpoint, low, tmp_path / "out.png", "--set", "device=cuda")
    assert_one_line_error(status, capsys.readouterr().err, "cuda", "device=auto")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--mode evaluate --output b.png", ["--output"]),
        ("--mode export", ["export", "enhance"]),
        ("--mode enhance --checkpoint a.pth --output b.png", ["--input"]),
        ("--mode enhance --checkpoint a.pth --input b.png", ["--output"]),
        ("--mode paint", ["paint", "train", "demo"]),
        ("", ["--mode"]),
        ("--mode train --checkpoint a.pth", ["--checkpoint"]),
        ("--mode train --config missing.json", ["missing.json"]),
        ("--mode train --set batch_sise=2", ["batch_sise", "batch_size"]),
        ("--mode train --set batch_size=0", ["batch_size", "[1, 4096]"]),
        ("--mode train --set batch_size", ["KEY=VALUE"]),
        ("--mode train --colour red", ["--colour"]),
    ],
)
def test_mistakes_on_the_command_line(
    capsys: pytest.CaptureFixture[str], line: str, words: list[str]
) -> None:
    assert_one_line_error(ms.main(shlex.split(line)), capsys.readouterr().err, *words)


def test_a_typing_error_is_answered_by_the_process_in_one_line(tmp_path: Path) -> None:
    done = run_script("--mode", "train", "--set", "learning_rate=fast", cwd=tmp_path)
    assert_one_line_error(done.returncode, done.stderr, "learning_rate", "fast")
    assert done.stdout == "" and files_under(tmp_path) == set()


# help ---------------------------------------------------------------------------------------------


def test_help_shows_an_example_per_mode_and_every_key(tmp_path: Path) -> None:
    done = run_script("--help", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    for mode in ms.MODES:
        assert f"python model_script.py --mode {mode}" in done.stdout
    for kind in (ms.Config, ms.Use):
        for name, value in dataclasses.asdict(kind()).items():
            assert f"  --{name} VALUE" in done.stdout
            assert "".join(f"default{json.dumps(value)})".split()) in "".join(done.stdout.split())
    assert files_under(tmp_path) == set()


def test_the_documented_command_lines_parse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = dict(program=ms.System.program, recipe=ms.System.recipe, folder="checkpoints")
    lines = [
        line.partition("python model_script.py")[2]
        for line in EXAMPLES.format(**words).splitlines()
        if ".py" in line
    ]
    assert len(lines) == 7
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cpu_train_config.json").write_text(json.dumps({"batch_size": 3}))
    for line in lines:
        arguments = parsed(shlex.split(line))
        assert f"--mode {arguments.mode}" in line
        expected: dict[str, Any] = {"batch_size": 3} if "--config" in line else {}
        if "--outputs_dir" in line:
            expected["outputs_dir"] = "FOLDER_OF_ANOTHER_METHOD"
        assert arguments.settings == expected


def test_the_published_recipe_is_a_valid_config(tmp_path: Path) -> None:
    recipe = Path(ms.__file__).with_name("cpu_train_config.json")
    settings = parsed(["--mode", "train", "--config", str(recipe)]).settings
    assert settings["num_epochs"] == 30 and settings["image_size"] == [128, 128]
