"""Evaluations without targets and without a model, through the command line as a user meets it."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage
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

import model_script as ms
from support.decoding import read_image
from support.no_reference import scores_without_target
from support.outputs import common_affix
from support.pictures import resize, to_tensor
from support.settings import UserError

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


def assert_alike(found: Evaluation, other: Evaluation) -> None:
    """The same files have the same scores; sums may differ in the last digit."""
    for ours, theirs in zip(found.rows, other.rows, strict=True):
        assert ours.pop("filename") == theirs.pop("filename")
        numbers = [{name: float(text) for name, text in row.items()} for row in (ours, theirs)]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-9)


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


def score(pairs: Path, results: Path, *arguments: str, **changes: str | Path) -> int:
    """The status of an evaluation in this process."""
    given = {"device": "cpu", "eval_low_dir": pairs / "low", "eval_high_dir": pairs / "high"}
    given |= {"results_dir": results}
    words = [word for k, v in (given | changes).items() for word in ("--set", f"{k}={v}")]
    return ms.main(["--mode", "evaluate", *arguments, *words])


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
    given = ("--checkpoint", str(weights))
    assert score(pairs, tmp_path / "r", *given, eval_high_dir="", scenes="2,3") == 0
    found = Evaluation(tmp_path / "r", "")
    width, _ = Image.open(found.folder / "images" / "2_viz.png").size
    assert width == 2 * 200 + 4
    assert Image.open(found.folder / "overview.png").width >= 1200
    assert [row["filename"] for row in found.rows] == ["2.png", "3.png"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"eval_low_dir": "nowhere"}, ("eval_low_dir", "nowhere")),
        ({"eval_low_dir": "."}, ("eval_low_dir", "no picture")),
        ({"scenes": "2,9"}, ("scenes", "stem 9")),
    ],
)
def test_mistakes_without_targets_are_one_line(
    weights: Path,
    pairs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, str],
    words: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ("--checkpoint", str(weights))
    status = score(pairs, tmp_path / "r", *given, eval_high_dir="", **changes)
    assert_one_line_error(status, capsys.readouterr().err, *words)
    assert files_under(tmp_path) == set()


# another method's pictures ------------------------------------------------------------------------

JUDGED = ["psnr", "ssim", "ciede2000", "colourfulness_ratio", "wasserstein"]


@pytest.fixture(scope="module")
def made(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What "another method" made of the pairs: the targets, darker and noisy, as STEM.png."""
    folder = tmp_path_factory.mktemp("made")
    for place, stem in enumerate(STEMS):
        high = read_image(pairs / "high" / f"{stem}.png") / 255.0
        noise = np.random.default_rng(place).normal(0, 0.02, high.shape)
        picture = np.rint(255 * np.clip((0.6 + 0.05 * place) * high + noise, 0, 1))
        save_picture(folder / f"{stem}.png", picture.astype(np.uint8))
    return folder


def test_a_folder_is_scored_without_any_checkpoint(pairs: Path, made: Path, tmp_path: Path) -> None:
    found = evaluated(pairs, tmp_path, outputs_dir=made)
    assert list(found.rows[0]) == ["filename", *JUDGED, "psnr_gt_mean", "ssim_grey_gt_mean"]
    assert {row["filename"] for row in found.rows} == {f"{stem}.png" for stem in STEMS}
    for row in found.rows:
        ours, high = (
            read_image(folder / row["filename"]) / 255 for folder in (made, pairs / "high")
        )
        assert np.array_equal(found.picture(row["filename"]) / 255, ours)
        psnr = skimage.metrics.peak_signal_noise_ratio(high, ours, data_range=1)
        ssim = skimage.metrics.structural_similarity(high, ours, data_range=1, channel_axis=2)
        colours = [skimage.color.rgb2lab(image) for image in (ours, high)]
        assert float(row["psnr"]) == pytest.approx(psnr, abs=1e-9)
        assert float(row["ssim"]) == pytest.approx(ssim, abs=1e-9)
        assert float(row["ciede2000"]) == pytest.approx(
            skimage.color.deltaE_ciede2000(*colours).mean(), abs=1e-9
        )
    summary = found.summary
    assert summary["outputs_dir"] == found.brief["outputs_dir"] == str(made)
    absent = {"checkpoint", "checkpoint_sha256", "config", "seconds_per_image"}
    assert absent.isdisjoint(summary) and "checkpoint" not in found.brief
    assert summary["protocol"] == "native resolution" and summary["without_twins"] is None
    assert summary["psnr"] == pytest.approx(np.mean([float(row["psnr"]) for row in found.rows]))
    assert Image.open(found.folder / "images" / "2_viz.png").width == 3 * 200 + 2 * 4
    assert (found.folder / "overview.png").is_file()
    assert "all (6): psnr" in found.printed and str(made) in found.printed
    assert "twin" not in found.printed and "released" not in found.printed


def test_a_models_own_pictures_have_the_models_scores(
    weights: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--checkpoint", str(weights))
    assert score(pairs, tmp_path / "model", *arguments, eval_size="native") == 0
    model = Evaluation(tmp_path / "model", capsys.readouterr().out)
    images = model.folder / "images"  # beside each STEM.png lies its strip, STEM_viz.png
    assert score(pairs, tmp_path / "again", outputs_dir=images) == 0
    again = Evaluation(tmp_path / "again", capsys.readouterr().out)
    for ours, theirs in zip(model.rows, again.rows, strict=True):
        assert {name: ours[name] for name in theirs} == theirs
    assert set(model.rows[0]) - set(again.rows[0]) >= {"seconds", "twin_in_training"}


def small_picture(path: Path) -> np.ndarray:
    """The picture at 48x32 and 8 bits, float in [0, 1]."""
    small = resize(to_tensor(read_image(path))[None], (32, 48), quantise=True)
    return small[0].permute(1, 2, 0).double().numpy()


def test_outputs_and_targets_are_resized_alike(pairs: Path, made: Path, tmp_path: Path) -> None:
    assert score(pairs, tmp_path / "r", outputs_dir=made, eval_size="32,48") == 0
    found = Evaluation(tmp_path / "r", "")
    assert found.summary["protocol"] == "resized to 48x32"
    small = tmp_path / "small"
    for row in found.rows:
        ours, high = (small_picture(folder / row["filename"]) for folder in (made, pairs / "high"))
        psnr = skimage.metrics.peak_signal_noise_ratio(high, ours, data_range=1)
        assert float(row["psnr"]) == pytest.approx(psnr, abs=1e-4)
        save_picture(small / row["filename"], np.rint(ours * 255).astype(np.uint8))
    # outputs that were made at that size are scored as they are
    assert score(pairs, tmp_path / "s", outputs_dir=small, eval_size="32,48") == 0
    assert_alike(Evaluation(tmp_path / "s", ""), found)


def test_outputs_without_targets(pairs: Path, made: Path, tmp_path: Path) -> None:
    assert score(pairs, tmp_path / "r", outputs_dir=made, eval_high_dir="") == 0
    found = Evaluation(tmp_path / "r", "")
    assert list(found.rows[0]) == ["filename", *BLIND]
    for row in found.rows:
        ours, low = (
            read_image(folder / row["filename"]) / 255.0 for folder in (made, pairs / "low")
        )
        expected = scores_without_target(ours, low)
        assert {name: float(row[name]) for name in BLIND} == pytest.approx(expected, abs=1e-9)


def test_missing_outputs_are_counted_and_the_rest_is_scored(
    pairs: Path, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    some = tmp_path / "some"
    for stem in ("3", "twelve"):
        save_picture(some / f"{stem}.png", read_image(made / f"{stem}.png"))
    assert score(pairs, tmp_path / "r", outputs_dir=some) == 0
    printed = capsys.readouterr().out
    assert f"4 of 6 pairs have no output in {some} (2.png, 4.png, 5.png, 6.png)" in printed
    assert "scoring 2 of 6 pairs" in printed
    found = Evaluation(tmp_path / "r", printed)
    assert {row["filename"] for row in found.rows} == {"3.png", "twelve.png"}
    assert score(pairs, tmp_path / "one", outputs_dir=some, scenes="3") == 0
    assert "no output" not in capsys.readouterr().out


def renamed(made: Path, folder: Path, form: str) -> Path:
    """The pictures of `made` in `folder` with {} in `form` as their stem."""
    for stem in STEMS:
        save_picture(folder / f"{form.format(stem)}.png", read_image(made / f"{stem}.png"))
    return folder


@pytest.mark.parametrize("form", ["{}_out", "net_{}", "2_{}_x4"])
def test_outputs_with_a_common_prefix_or_suffix(
    pairs: Path, made: Path, tmp_path: Path, form: str
) -> None:
    outputs = renamed(made, tmp_path / "out", form)
    assert score(pairs, tmp_path / "plain", outputs_dir=made) == 0
    assert score(pairs, tmp_path / "r", outputs_dir=outputs) == 0
    assert_alike(Evaluation(tmp_path / "r", ""), Evaluation(tmp_path / "plain", ""))
    # a few scenes are told by the names of all
    assert score(pairs, tmp_path / "few", outputs_dir=outputs, scenes="2") == 0
    assert [row["filename"] for row in Evaluation(tmp_path / "few", "").rows] == ["2.png"]


def test_a_file_of_the_stem_itself_wins_over_a_suffix() -> None:
    assert common_affix(["1", "2"], ["1", "2", "1_viz", "2_viz"]) == ("", "")
    assert common_affix(["1", "2", "12"], ["1_out", "2_out", "12_out"]) == ("", "_out")
    assert common_affix(["1", "2"], ["other"]) == ("", "")
    assert common_affix(["1"], []) == ("", "")
    with pytest.raises(UserError, match="NAME_a and NAME_b fit equally many"):
        common_affix(["1", "2"], ["1_a", "1_b", "2_a", "2_b"])


BAD_OUTPUTS = {
    "none": ("outputs_dir", "6 of 6 pairs have no output", "2.png", "..."),
    "empty": ("outputs_dir", "6 of 6 pairs have no output"),
    "missing": ("outputs_dir", "no folder"),
    "file": ("outputs_dir", "no folder"),
    "size": ("3.png", "is 40x50", "72x64", "high"),
    "size_resized": ("3.png", "is 40x50", "72x64", "high"),
    "size_blind": ("3.png", "is 40x50", "72x64", "low"),
    "broken": ("3.png",),
    "text": ("3.png",),
    "twice": ("3", "same stem", "keep one"),
    "two_forms": ("outputs_dir", "fit equally many", "keep the files of one form"),
}


@pytest.mark.parametrize("kind", BAD_OUTPUTS)
def test_bad_outputs_are_one_line_and_leave_nothing(
    pairs: Path, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    outputs, changes = tmp_path / "out", dict[str, str | Path]()
    if kind == "none":
        save_picture(outputs / "other.png", target_picture(0))
    elif kind == "empty":
        outputs.mkdir()
    elif kind == "file":
        outputs.write_text("no folder")
    elif kind == "two_forms":
        for form in ("{}_a", "{}_b"):
            renamed(made, outputs, form)
    elif kind != "missing":
        renamed(made, outputs, "{}")
    if kind.startswith("size"):
        save_picture(outputs / "3.png", target_picture(0, 50, 40))
        extra = {"size_resized": {"eval_size": "32,32"}, "size_blind": {"eval_high_dir": ""}}
        changes |= extra.get(kind, {})
    elif kind == "broken":
        (outputs / "3.png").write_bytes((outputs / "3.png").read_bytes()[:200])
    elif kind == "text":
        (outputs / "3.png").write_text("no picture")
    elif kind == "twice":
        save_picture(outputs / "3.jpg", target_picture(0, 64, 72))
    before = files_under(tmp_path)
    status = score(pairs, tmp_path / "r", outputs_dir=outputs, **changes)
    told = capsys.readouterr().err.split("\r")[-1]  # after the progress bar
    assert_one_line_error(status, told, *BAD_OUTPUTS[kind])
    assert files_under(tmp_path) == before


def test_a_mistake_through_the_command_line(pairs: Path, made: Path, tmp_path: Path) -> None:
    before = files_under(tmp_path)
    done = evaluate(pairs, tmp_path, "--checkpoint", "best_model.pth", outputs_dir=made)
    assert_one_line_error(done.returncode, done.stderr, "--checkpoint", "outputs_dir")
    assert files_under(tmp_path) == before


def test_other_modes_take_no_notice_of_the_folder(
    weights: Path, pairs: Path, tmp_path: Path
) -> None:
    """As with every key of Use that another mode needs: one config serves them all."""
    files = ["--input", str(pairs / "low" / "2.png"), "--output", str(tmp_path / "2.png")]
    (tmp_path / "all.json").write_text('{"outputs_dir": "nowhere"}')
    given = ["--config", str(tmp_path / "all.json"), "--device", "cpu"]
    given += ["--checkpoint", str(weights)]
    assert ms.main(["--mode", "enhance", *files, *given]) == 0


@pytest.mark.parametrize(
    "wish", ["exposure=1", "strength=0.5", "reference=low.png", "samples=2", "uncertainty=true"]
)
def test_what_evaluation_does_not_score_is_refused(
    weights: Path, pairs: Path, capsys: pytest.CaptureFixture[str], wish: str
) -> None:
    """A score that left out in silence what the user asked for would be of another picture."""
    folders = [f"--eval_{side}_dir={pairs / side}" for side in ("low", "high")]
    given = ["--checkpoint", str(weights), *folders, "--set", wish]
    assert ms.main(["--mode", "evaluate", *given]) == 2
    name = wish.partition("=")[0]
    assert f"{name} does nothing in --mode evaluate" in capsys.readouterr().err
