"""The benchmarks of a release: what is held out, and the scores without a target."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_tools import assert_one_line_error
from conftest import ROOT, randomise
from PIL import Image
from skimage.color import rgb2lab

import model_script as ms
from support.cameras import CameraNet, build_camera_net, camera_of
from support.checkpoints import save_checkpoint
from support.known import Known, fitted
from support.settings import UserError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import brightness
import foliage
import make_release
import prepare_sources
import release_table


def test_what_is_held_out_is_whole_scenes() -> None:
    rng = np.random.default_rng(0)
    looks = rng.integers(0, 256, (40, 16, 16, 3)).astype(np.uint8)
    names = [f"{scene:03d}_{frame}" for scene in range(40) for frame in range(3)]
    held = prepare_sources.held_out(names, looks.repeat(3, 0), 20, 0, 0.85, set())
    assert 20 <= len(held) <= 22
    scenes = {name.split("_")[0] for name in held}
    assert sorted(held) == sorted(name for name in names if name.split("_")[0] in scenes)


def test_takes_of_one_scene_stay_together_and_what_is_kept_stays() -> None:
    rng = np.random.default_rng(0)
    looks = rng.integers(0, 256, (30, 16, 16, 3)).astype(np.uint8)[np.arange(60) % 30]
    names = [str(i) for i in range(60)]
    held = prepare_sources.held_out(names, looks, 21, 1, 0.85, {"7"})
    assert "7" in held and "37" not in held  # its list says so
    assert (
        all(str((int(name) + 30) % 60) in held for name in held if name != "7") and len(held) == 21
    )


def prepare(
    monkeypatch: pytest.MonkeyPatch, folder: Path, keep: str, seed: int = 0, held: int = 2
) -> int:
    pairs = f"mine={folder / 'low'}:{folder / 'high'}"
    argv = ["--out", str(folder / "out"), "--pairs", pairs, "--keep", keep]
    argv += ["--held", str(held), "--seed", str(seed)]
    monkeypatch.setattr(sys, "argv", ["prepare_sources.py", *argv])
    return prepare_sources.main()


def test_a_new_split_leaves_nothing_of_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    for name in "abcdef":
        for kind in ("low", "high"):
            (tmp_path / kind).mkdir(exist_ok=True)
            levels = rng.integers(0, 256, (16, 16, 3)).astype(np.uint8)
            Image.fromarray(levels).save(tmp_path / kind / f"{name}.png")
    for kept in ("a", "b"):
        (tmp_path / "keep.txt").write_text(kept)
        assert prepare(monkeypatch, tmp_path, f"mine={tmp_path / 'keep.txt'}", held=1) == 0
        for kind in ("low", "high"):
            parts = [tmp_path / "out" / part / "mine" / kind for part in ("train", "val")]
            train, val = ({path.stem for path in part.iterdir()} for part in parts)
            assert val == {kept} and train == set("abcdef") - {kept}


@pytest.mark.parametrize(
    ("source", "stems", "words"),
    [
        ("mine", "a,z", "z is no pair"),
        ("other", "a", "name of a source"),
        ("mine", "", "a file of"),
    ],
)
def test_what_cannot_be_kept_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    source: str,
    stems: str,
    words: str,
) -> None:
    for kind in ("low", "high"):
        (tmp_path / kind).mkdir()
        Image.new("RGB", (16, 16)).save(tmp_path / kind / "a.png")
    if stems:
        (tmp_path / "keep.txt").write_text(stems)
    status = prepare(monkeypatch, tmp_path, f"{source}={tmp_path / 'keep.txt'}")
    assert_one_line_error(status, capsys.readouterr().err, "--keep", words)
    assert not (tmp_path / "out").exists()


def test_burnt_share_counts_what_was_not_bright() -> None:
    given, enhanced = np.full((2, 10, 3), 100, np.uint8), np.full((2, 10, 3), 200, np.uint8)
    given[0, :5] = 230
    enhanced[0, :8, 1] = 255
    assert release_table.burnt_share(given, enhanced) == pytest.approx(3 / 20)


def test_chroma_shift_sees_bright_pixels_alone() -> None:
    given = np.full((4, 4, 3), 20, np.uint8)
    assert np.isnan(release_table.chroma_shift(given, given))
    given[0] = 200
    enhanced = given.copy()
    enhanced[1:] = (255, 0, 0)
    assert release_table.chroma_shift(given, enhanced) == 0
    enhanced[0] = (200, 200, 120)
    assert 30 < release_table.chroma_shift(given, enhanced) < 60


def test_spread_takes_the_ends() -> None:
    assert release_table.spread(10, 4) == [0, 3, 6, 9] and release_table.spread(3, 9) == [0, 1, 2]


def test_the_network_of_cameras_learns_a_cast() -> None:
    torch.manual_seed(0)

    def some(colour: tuple[int, int, int]) -> torch.Tensor:
        levels = torch.tensor(colour)[:, None, None] + 6 * torch.randn(30, 3, 64, 64)
        return levels.round().clamp(0, 255) / 255

    weights = make_release.train_camera_net(some((60, 20, 40)), [some((40, 40, 40))], steps=60)
    net = build_camera_net(weights, "here")
    rng = np.random.default_rng(0)
    for colour, camera in (((62, 22, 42), "infrared"), ((38, 40, 41), "ordinary")):
        picture = rng.normal(colour, 6, (70, 90, 3)).clip(0, 255).astype(np.uint8)
        assert camera_of(picture, net) == camera


def test_varied_thumbnails_are_windows_at_256_levels() -> None:
    torch.manual_seed(0)
    ramp = torch.linspace(0.2, 0.6, 64).expand(40, 3, 64, 64)
    found = make_release.varied(ramp, torch.zeros(40))
    assert found.shape == (40, 3, 32, 32) and float(found.min()) > 0.12
    assert torch.equal(found, (found * 255).round() / 255)
    assert float((found[:, 0] - found[:, 2]).abs().max()) == 0
    tinted = make_release.varied(ramp, torch.ones(40))
    ratios = (tinted[:, 0] / tinted[:, 2]).log2()  # red over blue
    assert -0.65 < float(ratios.min()) < -0.3
    assert 2.0 < float(ratios.max()) < 4.2  # under a lamp
    spread = ratios.amax((1, 2)) - ratios.amin((1, 2))
    assert 4 < int((spread > 0.3).sum()) < 20  # in places only
    assert int((spread < 0.1).sum()) > 10
    slopes = (found[:, 0, 0, -1] / found[:, 0, 0, 0]).log2()  # gains do not change them
    assert float(slopes.min()) < -0.4 and float(slopes.max()) > 0.4  # mirrored or not
    assert float(slopes.abs().max()) < 1.6


def test_a_release_holds_both_networks_in_16_bits(tmp_path: Path) -> None:
    networks, paths = {}, {}
    for seed, name in enumerate(("ordinary", "infrared"), 1):
        torch.manual_seed(seed)
        config = ms.Config(flow_channels=8, thumbnail_size=32, train_low_dir="here/low")
        networks[name] = randomise(ms.ConditionalFlow(config), 0.05, seed)
        looks = torch.full((seed, 16, 16, 3), seed, dtype=torch.uint8)
        content = {"config": dataclasses.asdict(config), "model": networks[name].state_dict()}
        content |= {"run_id": "r", "training_thumbnails": looks}
        content |= {"validation_thumbnails": looks[:1]} if name == "infrared" else {}
        paths[name] = tmp_path / f"{name}.pth"
        save_checkpoint(paths[name], content)
    weights = CameraNet().state_dict()
    packed = make_release.pack(str(paths["ordinary"]), str(paths["infrared"]), weights)
    save_checkpoint(tmp_path / "released.pth", packed)
    loaded = ms.load_model(str(tmp_path / "released.pth"), {"device": "cpu"}, ms.ConditionalFlow)
    assert len(loaded.checkpoint["training_thumbnails"]) == 2  # of three, two are alike
    assert len(loaded.checkpoint["validation_thumbnails"]) == 1
    assert "here" not in str(loaded.checkpoint["config"])
    low = torch.rand(1, 3, 32, 48)
    with torch.no_grad():
        for name, model in (("ordinary", loaded.model), ("infrared", loaded.infrared)):
            difference = model.enhance(low) - networks[name].eval().enhance(low)
            assert float(difference.abs().max()) < 0.01
    small, large = ((tmp_path / f"{name}.pth").stat().st_size for name in ("released", "ordinary"))
    assert small < 1.3 * large + 60_000  # and the network of cameras


def test_a_small_release_takes_cameras_and_looks_from_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ms.Config(flow_channels=8, thumbnail_size=32, teacher="big.pth")
    content = {"config": dataclasses.asdict(config), "run_id": "r"}
    content |= {"model": ms.ConditionalFlow(config).state_dict()}
    content |= {"training_thumbnails": torch.zeros(1, 16, 16, 3, dtype=torch.uint8)}
    save_checkpoint(tmp_path / "mine.pth", content)
    looks = np.random.default_rng(0).normal(0, 1, (400, 24))
    known = fitted(looks, np.arange(400))
    assert known is not None
    cameras = {"infrared": content["model"], "camera_net": CameraNet().state_dict()}
    save_checkpoint(tmp_path / "big.pth", content | {"cameras": cameras, "known": known})
    mine, big, out = (str(tmp_path / f"{name}.pth") for name in ("mine", "big", "out"))
    argv = ["make_release.py", "--ordinary", mine, "--infrared", mine, "--like", big, "--out", out]
    monkeypatch.setattr("sys.argv", argv)
    assert make_release.main() == 0
    loaded = ms.load_model(out, {"device": "cpu"}, ms.ConditionalFlow)
    assert loaded.model.config.teacher == "" and loaded.camera_net is not None
    assert loaded.known is not None and loaded.checkpoint["known"]["looks"].dtype == torch.float16
    wanted = Known(known)
    assert loaded.known.limit == wanted.limit
    picture = np.random.default_rng(1).integers(0, 256, (64, 80, 3)).astype(np.uint8)
    assert loaded.known.distance(picture) == pytest.approx(wanted.distance(picture), rel=0.01)
    for name, value in loaded.camera_net.state_dict().items():
        assert torch.allclose(value, cameras["camera_net"][name], atol=1e-3)
    monkeypatch.setattr("sys.argv", [mine if word == big else word for word in argv])
    assert_one_line_error(make_release.main(), capsys.readouterr().err, "--like", "two networks")
    monkeypatch.setattr("sys.argv", [*argv, "--darken", "here"])
    assert_one_line_error(make_release.main(), capsys.readouterr().err, "--like", "folders")


def test_two_architectures_are_no_release(tmp_path: Path) -> None:
    for name, width in (("a", 8), ("b", 16)):
        config = ms.Config(flow_channels=width, thumbnail_size=32)
        content = {"config": {}, "model": ms.ConditionalFlow(config).state_dict()}
        save_checkpoint(tmp_path / f"{name}.pth", content)
    with pytest.raises(UserError, match="another architecture"):
        make_release.pack(str(tmp_path / "a.pth"), str(tmp_path / "b.pth"), {})


def test_brightness_within_scenes_takes_their_means_and_a_line_away() -> None:
    rng = np.random.default_rng(0)
    scenes = [[3 * n, 3 * n + 1, 3 * n + 2] for n in range(200)]
    low = rng.normal(-4, 1, 600)
    high = 0.5 * low + rng.normal(0, 0.1, 600) + rng.normal(-1, 2, 200).repeat(3)
    told = brightness.within_scenes(low, high, [*scenes, [600, 601]])
    assert "200 scenes of 600 takes" in told
    left = float(told.rpartition(" ")[2])
    spread = float(told.split("high ")[1].split(",")[0])
    assert left == pytest.approx(0.1, abs=0.011) and spread == pytest.approx(0.51, abs=0.05)
    assert brightness.within_scenes(low, high, [[0, 1]]) == "no scene was taken 3 times"


def write_grey_model(path: Path) -> None:
    """An untrained network, which gives grey: the prior's mean is 0."""
    torch.manual_seed(0)
    config = ms.Config(flow_channels=8, num_flow_blocks=1, thumbnail_size=32)
    weights = ms.ConditionalFlow(config).state_dict()
    save_checkpoint(path, {"config": dataclasses.asdict(config), "model": weights, "run_id": "r"})


def test_brightness_of_a_network_is_measured_on_pairs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    for kind in ("low", "high"):
        (tmp_path / kind).mkdir()
        for place in range(3):
            level = {"low": 20, "high": 100 + 50 * place}[kind]
            pixels = rng.integers(level - 9, level + 9, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / kind / f"{place}.png")
    folders = f"{tmp_path / 'low'}:{tmp_path / 'high'}"
    write_grey_model(tmp_path / "w.pth")
    argv = ["--pairs", folders, "--score", folders, "--checkpoint", str(tmp_path / "w.pth")]
    assert brightness.main(argv) == 0
    told = capsys.readouterr().out
    expected = np.sqrt(np.mean(np.log2(np.array([100, 150, 200]) / 127.5) ** 2))
    assert "3 pairs, in stops: high 0.5" in told
    assert float(told.split("off by ")[1].split()[0]) == pytest.approx(expected, abs=0.03)
    assert brightness.main(["--pairs", str(tmp_path)]) == 2
    assert "LOW:HIGH" in capsys.readouterr().err


def test_leaves_are_told_by_their_colour_and_weighed_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    colours = [(80, 120, 40), (60, 90, 50), (120, 120, 120), (150, 60, 40), (14, 20, 8)]
    patches = np.array(colours, np.uint8)[None] / 255
    assert foliage.leaves(rgb2lab(patches)).tolist() == [[True, True, False, False, False]]
    half = np.full((40, 48, 3), 110, np.uint8)
    half[:, :12] = (80, 120, 40)
    for kind, pixels in (("low", half // 8), ("high", half)):
        (tmp_path / kind).mkdir()
        Image.fromarray(pixels).save(tmp_path / kind / "1.png")
    write_grey_model(tmp_path / "w.pth")
    folders = [f"--set=eval_{kind}_dir={tmp_path / kind}" for kind in ("low", "high")]
    monkeypatch.setattr("sys.argv", ["foliage", "--checkpoint", str(tmp_path / "w.pth"), *folders])
    foliage.main()
    green, rest = (line.split() for line in capsys.readouterr().out.splitlines()[1:])
    share, before, after, ratio, pale = (float(word) for word in green[1:])
    assert share == 0.25 and float(rest[2]) == 0.75
    assert before < 6 < 20 < after and 0.8 < ratio < 1.2 and pale < 0.05


def test_two_trees_are_timed_by_turns(tmp_path: Path) -> None:
    """This tree beside itself: the same picture, to the last bit."""
    torch.manual_seed(0)
    config = ms.Config(flow_channels=8, num_flow_blocks=1, thumbnail_size=32, crop_size=64)
    model = randomise(ms.ConditionalFlow(config), 0.05)
    weights = tmp_path / "small.pth"
    save_checkpoint(weights, {"config": dataclasses.asdict(config), "model": model.state_dict()})
    command = [sys.executable, str(ROOT / "benchmarks" / "paired.py"), "--turns", "2"]
    command += ["--threads", "1", "--checkpoint", str(weights)]
    done = subprocess.run(
        [*command, "--before", str(ROOT)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    seconds = re.findall(r"(enhance|train): ([\d.]+) s before, ([\d.]+) s now, ratio", done.stdout)
    assert [job for job, *_ in seconds] == ["enhance", "train"]
    assert all(float(one) > 0 for _, *both in seconds for one in both)
    assert "pictures differ by at most 0.0e+00, by 0.0e+00 inside" in done.stdout
    for option, word in (
        ("--before", "no model_script.py there"),
        ("--checkpoint", "no such file"),
    ):
        line = [*command, "--before", str(ROOT), option, str(tmp_path)]
        wrong = subprocess.run(line, capture_output=True, text=True)
        assert wrong.returncode == 2 and word in wrong.stderr
