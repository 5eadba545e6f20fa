"""Quick checks of what the script stands on, and of how a pair is scored: nothing is trained."""

from __future__ import annotations

import dataclasses
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_tools import save_picture
from conftest import ROOT, randomise, smooth_scene

import model_script as ms
from support import checkpoints, folders, pictures, tiles
from support.decoding import read_picture, upright
from support.metrics import evaluation_summary, image_metrics
from support.runtime import choose_runtime
from support.settings import UserError, shown

TINY: dict[str, Any] = dict(flow_channels=8, num_flow_blocks=1, thumbnail_size=32)


def tiny_model(seed: int = 0) -> ms.ConditionalFlow:
    torch.manual_seed(seed)
    model = ms.ConditionalFlow(ms.Config(**TINY))
    randomise(model, 0.05)
    return model.eval()


# checkpoints --------------------------------------------------------------------------------------


def stored(config: dict[str, Any], **given: object) -> ms.Config:
    """The config of a checkpoint that stores `config`, under the settings `given`."""
    return checkpoints.stored_config({"config": config}, "a.pth", given, ms.Config)


def test_a_stored_config_comes_back_and_settings_win_over_it() -> None:
    assert stored({**TINY, "seed": 3}) == ms.Config(**TINY, seed=3)
    assert stored({"seed": 3, "batch_size": 2}, seed=4) == ms.Config(seed=4, batch_size=2)


def test_how_old_checkpoints_were_used_is_dropped() -> None:
    used = dict(scenes="4,5", temperature=1.0, device="cuda", eval_size="native")
    assert stored({"seed": 3, **used}) == ms.Config(seed=3)
    with pytest.raises(UserError, match=r"a\.pth: unknown key brightness"):
        stored({"seed": 3, "brightness": 1})


def test_stored_folders_count_only_where_they_exist(tmp_path: Path) -> None:
    gone = str(tmp_path / "gone")
    found = stored({"train_low_dir": str(tmp_path), "train_high_dir": gone, "log_dir": gone})
    assert (found.train_low_dir, found.log_dir) == (str(tmp_path), gone)
    assert found.train_high_dir == ms.Config().train_high_dir


def test_another_architecture_is_no_setting() -> None:
    with pytest.raises(UserError, match=r"flow_channels: a\.pth was trained with 8, .* says 16"):
        stored(TINY, flow_channels=16)
    assert stored(TINY, flow_channels=8).flow_channels == 8
    with pytest.raises(UserError, match="thumbnail_size"):  # a default is an architecture, too
        stored({}, thumbnail_size=32)


@pytest.mark.parametrize("name", ["log_sigma", "local_branch.stem.0.weight"])
def test_weights_that_are_not_finite_are_refused(name: str) -> None:
    model = tiny_model()
    content: dict[str, Any] = {"model": model.state_dict()}
    checkpoints.load_weights(tiny_model(1), content, "a.pth")
    content["model"][name] = torch.full_like(content["model"][name], float("nan"))
    with pytest.raises(UserError, match=r"a\.pth: holds weights that are not finite"):
        checkpoints.load_weights(tiny_model(1), content, "a.pth")


class Bomb:
    """Ends the tests as soon as it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.abort, ()


def test_functions_in_a_checkpoint_are_named_and_not_run(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({"format_version": 1, "config": {}, "model": Bomb()}, path)
    with pytest.raises(UserError, match=r"a\.pth: not a checkpoint .*abort.*which was not run"):
        checkpoints.load_checkpoint(str(path))


def test_integers_without_end_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    for endless in ({"format_version": 10**6000}, {"config": {"batch_size": 10**6000}}):
        torch.save({"format_version": 1, "config": {}, "model": {}} | endless, path)
        with pytest.raises(UserError) as caught:
            stored(checkpoints.load_checkpoint(str(path))["config"])
        assert len(str(caught.value)) < 400
    assert shown(10**6000) == "a int"  # also where PyTorch has refused it before


def run_of(folder: Path, *names: str) -> Path:
    """Files that a training would leave, each a second younger than the one before."""
    folder.mkdir(exist_ok=True)
    for age, name in enumerate(names):
        (folder / name).write_bytes(b"weights")
        os.utime(folder / name, (1000 + age, 1000 + age))
    return folder


def test_the_newest_checkpoint_is_the_one_written_last(tmp_path: Path) -> None:
    names = ("checkpoint_epoch_10.pth", "checkpoint_epoch_9.pth", "best_model.pth")
    folder = run_of(tmp_path / "a", *names)
    assert checkpoints.newest_checkpoint(folder) == str(folder / names[1])
    assert checkpoints.resume_from(str(folder), folder) == str(folder / names[1])
    assert checkpoints.resume_from("b.pth", folder) == "b.pth"
    assert checkpoints.resume_from(None, folder) is None
    named = (str(folder), str(folder / names[0]), None)
    assert [checkpoints.folder_of(name) for name in named] == [str(folder), str(folder), None]
    with pytest.raises(UserError, match=r"no checkpoint_epoch_N\.pth"):
        checkpoints.resume_from(str(run_of(tmp_path / "b", "best_model.pth")), folder)


def test_the_newest_epochs_are_kept(tmp_path: Path) -> None:
    names = [f"checkpoint_epoch_{number}.pth" for number in range(8, 13)]
    others = ("best_model.pth", "checkpoint_interrupted.pth", "checkpoint_epoch_mine.pth")
    run_of(tmp_path, *others, *names)
    checkpoints.remove_old(tmp_path, 2)
    left = {*others, *names[-2:]}
    assert {path.name for path in tmp_path.iterdir()} == left


def test_only_what_trainings_write_is_another_run(tmp_path: Path) -> None:
    theirs = ("released.pth", "README.md", "checkpoint_epoch_final.pth", ".best_model.7.pth")
    checkpoints.refuse_other_run(tmp_path / "missing")
    checkpoints.refuse_other_run(run_of(tmp_path / "a", *theirs))
    for name in ("best_model.pth", "checkpoint_epoch_1.pth", "checkpoint_interrupted.pth"):
        with pytest.raises(UserError, match=f"holds another run .{name}"):
            checkpoints.refuse_other_run(run_of(tmp_path / name[:12], name))


# decoding -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(15, 40), (40, 15)])
def test_small_sides_are_refused(tmp_path: Path, shape: tuple[int, int]) -> None:
    path = save_picture(tmp_path / "a.png", np.zeros((*shape, 3), np.uint8))
    with pytest.raises(UserError, match=f"{shape[1]}x{shape[0]} is too small"):
        read_picture(path)


def test_more_pixels_than_a_photograph_has_in_its_bytes_are_refused(tmp_path: Path) -> None:
    path = save_picture(tmp_path / "a.png", np.zeros((4096, 4096, 3), np.uint8))
    with pytest.raises(UserError, match=r"a\.png: declares 17 megapixels in \d+ bytes"):
        read_picture(path)


def test_sixteen_bits_are_turned_whole() -> None:
    deep = np.random.default_rng(0).integers(0, 65536, (20, 30, 3)).astype(np.uint16)
    np.testing.assert_array_equal(upright(deep, 6), np.rot90(deep, -1))
    np.testing.assert_array_equal(upright(deep, 3), deep[::-1, ::-1])


# exposure -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stops", [-3.0, 1.0, 2.0])
def test_a_stop_is_twice_the_light(stops: float) -> None:
    levels = np.array([100, 20_000, 60_000])
    light = np.minimum(pictures.srgb_to_linear(levels / 65535) * 2**stops, 1)
    expected = np.asarray(pictures.linear_to_srgb(light))
    for deep, white in ((True, 65535), (False, 255)):
        table = pictures.level_table(stops, deep)
        assert table.dtype == (np.uint16 if deep else np.uint8)
        np.testing.assert_allclose(table[levels], expected * white, atol=0.51)


def test_no_stop_changes_no_level() -> None:
    np.testing.assert_array_equal(pictures.level_table(0, True), np.arange(65536))
    np.testing.assert_array_equal(
        pictures.level_table(0, False), np.rint(np.arange(65536) / 257).astype(np.uint8)
    )


@pytest.mark.parametrize("mean", [0.2, 0.6])
def test_exposure_reaches_a_mean(mean: float) -> None:
    pixels = smooth_scene(0, 30, 40).astype(np.uint16) * 128
    stops = pictures.stops_to_mean(pixels, mean)
    assert pictures.level_table(stops, True)[pixels].mean() / 65535 == pytest.approx(mean, abs=1e-3)


# tiles --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [40, 300, 417, 1000])
def test_tiles_cover_a_length_and_keep_their_halo(length: int) -> None:
    halo = 48
    plan = tiles.plan_tiles(length, 16, 64, halo)
    cores, outers = [tile.core[:2] for tile in plan], [tile.outer[:2] for tile in plan]
    assert [begin for begin, _ in cores] == [0, *(end for _, end in cores[:-1])]
    assert cores[-1][1] == outers[-1][1] == length and outers[0][0] == 0
    for (begin, end), (first, last) in zip(cores, outers, strict=True):
        assert first % 8 == 0 and last - first <= 64 + 2 * halo + 8
        assert begin - first >= halo - 8 or first == 0
        assert last - end >= halo - 8 or last == length


def test_noise_is_the_same_whatever_the_window() -> None:
    whole = tiles.latent_noise((0, 1), 0, 0, 130, 130)
    part = tiles.latent_noise((0, 1), 50, 60, 30, 70)
    assert torch.equal(part, whole[..., 50:80, 60:130])
    assert not torch.equal(whole[..., :64, :64], whole[..., :64, 64:128])
    assert not torch.equal(whole[..., :64, :64], whole[..., 64:128, :64])
    assert not torch.equal(whole, tiles.latent_noise((0, 2), 0, 0, 130, 130))
    assert abs(float(whole.std()) - 1) < 0.01


# folders ------------------------------------------------------------------------------------------


def test_inputs_are_found_to_any_depth_but_not_what_is_hidden_or_ours(tmp_path: Path) -> None:
    names = ("a.png", "b/c.JPG", ".hid/d.png", "b/.e.png", "out/f.png", "notes.txt")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found, _ = folders.find_inputs(str(tmp_path), str(tmp_path / "out"))
    relative = [
        (str(source.relative_to(tmp_path)), str(target.relative_to(tmp_path)))
        for source, target in found
    ]
    assert relative == [("a.png", "out/a.png"), ("b/c.JPG", "out/b/c.JPG")]


def test_a_folder_is_worked_off_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = [(tmp_path / f"{name}.png", tmp_path / "out" / f"{name}.png") for name in "abc"]
    (tmp_path / "out").mkdir()
    jobs[0][1].write_bytes(b"done")
    seen: list[str] = []

    def work(source: Path, target: Path) -> dict[str, Any]:
        seen.append(source.stem)
        if source.stem == "c":
            raise UserError(f"{source}: broken")
        return {"file": str(source), "output": str(target), "note": ""}

    assert folders.work_off(jobs, tmp_path / "out", work, again=False) == 1
    assert seen == ["b", "c"]
    assert "failed: " in capsys.readouterr().err
    table = (tmp_path / "out" / "enhance.csv").read_text().splitlines()
    assert len(table) == 4 and "kept, made elsewhere" in table[1] and "broken" in table[3]
    assert folders.work_off(jobs[:2], tmp_path / "out", work, again=True) == 0
    assert seen == ["b", "c", "a", "b"]


# scoring ------------------------------------------------------------------------------------------


def score(**changes: Any) -> tuple[ms.Scored, np.ndarray, np.ndarray]:
    """What score_pair says of a scene, and the pair."""
    high = smooth_scene(0, 40, 48)
    low = (high // 8).astype(np.uint8)
    given: dict[str, Any] = dict(size=None, use=ms.Use(device="cpu"), index=0) | changes
    runtime = choose_runtime("cpu", False)
    return ms.score_pair(tiny_model(), low, high, runtime=runtime, **given), low, high


def test_the_levels_that_a_user_gets_are_scored() -> None:
    scored, low, high = score()
    use, runtime = ms.Use(device="cpu"), choose_runtime("cpu", False)
    found = ms.enhance_pixels(tiny_model(), low, use, runtime).best
    levels = np.rint(found / 257).astype(np.uint8)
    assert np.abs(found / 257 - levels).max() > 0.2  # rounding is no matter of course
    np.testing.assert_array_equal(pictures.to_uint8(scored.enhanced), levels)
    np.testing.assert_array_equal(pictures.to_uint8(scored.high), high)
    expected = image_metrics(levels / 255, high / 255)
    assert {name: scored.row[name] for name in expected} == expected


@pytest.mark.parametrize("size", [(40, 32), (32, 48), (24, 24)])
def test_pairs_are_scored_at_the_size(size: tuple[int, int]) -> None:
    scored, _, high = score(size=size)
    assert {tuple(image.shape[1:]) for image in scored[:3]} == {size}
    resized = pictures.resize(pictures.to_tensor(high)[None], size)[0]
    np.testing.assert_array_equal(pictures.to_uint8(scored.high), pictures.to_uint8(resized))


def test_every_pair_has_its_own_noise_and_repeats() -> None:
    bits = [score(index=index)[0].row["bits_per_dim"] for index in (0, 0, 1)]
    assert bits[0] == bits[1] != bits[2]


def test_the_summary_leaves_twins_out_and_takes_the_median_of_the_seconds(tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(b"weights")
    rows: list[dict[str, Any]] = [
        {"filename": f"{place}.png", "psnr": psnr, "ssim": 0.5, "twin_in_training": twin}
        | {"seconds": seconds}
        for place, (psnr, twin, seconds) in enumerate(
            [(10, False, 1), (20, True, 2), (40, None, 9)]
        )
    ]
    summary = evaluation_summary(rows, str(tmp_path / "a.pth"), {"protocol": "p"})
    assert summary["psnr"] == pytest.approx(70 / 3) and summary["seconds_per_image"] == 2
    assert summary["without_twins"]["num_images"] == 1  # None: nobody knows
    assert summary["without_twins"]["metrics"]["psnr"]["mean"] == 10
    assert evaluation_summary(rows[1:], str(tmp_path / "a.pth"), {})["without_twins"] is None


@pytest.mark.parametrize(
    ("path", "system", "words"),
    [
        ("checkpoints/best_model.pth", "ConditionalFlow", ["--mode train writes it", "released"]),
        ("mine.pth", "", ["check the name", "released"]),
        ("best_model.pth", "RetinexNet", ["--mode train writes it"]),
    ],
)
def test_a_missing_checkpoint_is_told_with_what_mends_it(
    tmp_path: Path, path: str, system: str, words: list[str]
) -> None:
    """Only this project's own system has released weights to name."""
    with pytest.raises(UserError, match="no such checkpoint") as caught:
        checkpoints.load_checkpoint(str(tmp_path / path), system)
    line = str(caught.value)
    assert all(word in line for word in words)
    assert ("released.pth" in line) == ("released" in words)


def test_the_rim_is_the_weights_own_whatever_a_config_says(tmp_path: Path) -> None:
    """A recipe beside the weights, such as cpu_train_config.json, must not change their picture."""
    for trained, wanted in ((64, tiles.RIM), (0, 0)):
        config = ms.Config(**TINY, crop_size=trained)
        content = {
            "config": dataclasses.asdict(config),
            "model": ms.ConditionalFlow(config).state_dict(),
        }
        checkpoints.save_checkpoint(tmp_path / "a.pth", content)
        for given in ({}, {"crop_size": 0}, {"crop_size": 32, "image_size": [64, 64]}):
            loaded = ms.load_model(str(tmp_path / "a.pth"), given, ms.ConditionalFlow)
            assert loaded.model.rim == wanted
            size = None if trained else (128, 128)
            assert loaded.use.size_to_score(loaded.model.config) == size


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_kept_for_the_next_layer() -> None:
    code = """
import resource, sys
import numpy as np
from support.commands import keep_memory
if sys.argv[1] == "kept":
    keep_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for turn in range(20):
    np.ones(8 * 2**20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    faults = []
    for word in ("kept", "given back"):
        command = [sys.executable, "-c", code, word]
        faults.append(int(subprocess.run(command, cwd=ROOT, capture_output=True).stdout))
    assert faults[0] < faults[1] / 2
