"""Released weights of two networks: which serves a picture, and what a damaged table costs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_tools import assert_one_line_error, save_picture, target_picture
from conftest import randomise

import model_script as ms
from support.cameras import CameraNet, camera_of, small_thumbnail
from support.checkpoints import load_checkpoint, save_checkpoint, starting_weights
from support.decoding import read_image
from support.settings import UserError

RED, GREEN = (60, 20, 40), (30, 40, 35)


def flat(colour: tuple[int, int, int], dtype: type = np.uint8) -> np.ndarray:
    """A (40, 48, 3) picture of one colour and a little noise."""
    noise = np.random.default_rng(0).normal(0, 1, (40, 48, 3))
    levels = np.rint(np.array(colour) + noise).clip(0, 255)
    return (levels * (257 if dtype is np.uint16 else 1)).astype(dtype)


def red_net() -> CameraNet:
    """A network by which a red cast is infrared: it passes on how far red is above green."""
    net = CameraNet()
    for parameter in net.parameters():
        torch.nn.init.zeros_(parameter)
    first, second, third, mix = (
        layer for layer in net.layers if isinstance(layer, torch.nn.Conv2d)
    )
    for layer in (first, second, third, mix):
        layer.weight.data[0, 0, layer.kernel_size[0] // 2, layer.kernel_size[0] // 2] = 2.0
    last = net.layers[-1]
    last.weight.data[0, 0], last.bias.data[0] = 1.0, -4.0
    return net.eval()


def two_networks(folder: Path, **changes: object) -> Path:
    """A checkpoint of two small random networks that answer differently."""
    torch.manual_seed(0)
    config = ms.Config(flow_channels=8, num_flow_blocks=1, thumbnail_size=32, crop_size=32)
    ordinary, infrared = (randomise(ms.ConditionalFlow(config), 0.05, seed) for seed in (1, 2))
    parts = {"infrared": infrared.state_dict(), "camera_net": red_net().state_dict()} | changes
    content = {"config": dataclasses.asdict(config), "model": ordinary.state_dict()}
    save_checkpoint(folder / "two.pth", content | {"cameras": parts})
    return folder / "two.pth"


def test_a_thumbnail_knows_nothing_of_size_or_depth() -> None:
    expected = small_thumbnail(flat(RED))
    assert expected.shape == (32, 32, 3) and expected.dtype == np.uint8
    assert np.array_equal(small_thumbnail(flat(RED, np.uint16)), expected)
    big = np.kron(flat(RED), np.ones((3, 3, 1), np.uint8))
    assert np.abs(small_thumbnail(big).astype(int) - expected).max() <= 3


def test_a_cast_tells_the_camera_and_exposure_does_not() -> None:
    net = red_net()
    for colour, camera in ((RED, "infrared"), (GREEN, "ordinary")):
        for gain in (0.8, 1.0, 2.0):
            brighter = tuple(round(gain * level) for level in colour)
            assert camera_of(flat(brighter), net) == camera


def test_auto_takes_the_network_of_the_picture(tmp_path: Path) -> None:
    weights = two_networks(tmp_path)
    for name, colour in (("red", RED), ("green", GREEN)):
        save_picture(tmp_path / "in" / f"{name}.png", flat(colour))
    found = {}
    for camera in ("auto", "infrared", "ordinary"):
        out = tmp_path / camera
        argv = ["--mode", "enhance", "--checkpoint", weights, "--input", tmp_path / "in"]
        argv += ["--output", out, "--set", f"camera={camera}", "--set", "device=cpu"]
        assert ms.main([str(word) for word in argv]) == 0
        found[camera] = {path.stem: read_image(path) for path in out.glob("*.png")}
        table = (out / "enhance.csv").read_text()
        assert ("infrared" in table, "ordinary" in table) == (
            camera != "ordinary",
            camera != "infrared",
        )
    for name, right, wrong in (("red", "infrared", "ordinary"), ("green", "ordinary", "infrared")):
        assert np.array_equal(found["auto"][name], found[right][name])
        assert not np.array_equal(found["auto"][name], found[wrong][name])


def test_an_evaluation_scores_what_the_user_gets_of_either_network(tmp_path: Path) -> None:
    weights = two_networks(tmp_path)
    for name, colour in (("red", RED), ("green", GREEN)):
        save_picture(tmp_path / "low" / f"{name}.png", flat(colour))
        save_picture(tmp_path / "high" / f"{name}.png", target_picture(3))
    argv = ["--mode", "enhance", "--checkpoint", weights, "--input", tmp_path / "low"]
    assert ms.main([str(word) for word in [*argv, "--output", tmp_path / "out"]]) == 0
    folders = {"eval_low_dir": "low", "eval_high_dir": "high", "results_dir": "results"}
    sets = [word for key, name in folders.items() for word in ("--set", f"{key}={tmp_path / name}")]
    assert ms.main(["--mode", "evaluate", "--checkpoint", str(weights), *sets]) == 0
    (scored,) = (tmp_path / "results").glob("eval_*")
    assert "camera" in (scored / "metrics.csv").read_text().splitlines()[0]
    for name in ("red", "green"):
        ours = read_image(scored / "images" / f"{name}.png")
        assert np.array_equal(ours, read_image(tmp_path / "out" / f"{name}.png"))


@pytest.mark.parametrize(
    "changes",
    [
        {"camera_net": {}},
        {"camera_net": {"layers.0.weight": torch.zeros(12, 3, 3, 3)}},
        {"camera_net": {k: v * float("nan") for k, v in red_net().state_dict().items()}},
        {"camera_net": {k: "red" for k in red_net().state_dict()}},
        {"camera_net": "red"},
        {"infrared": {}},
    ],
)
def test_a_damaged_table_is_one_line(
    changes: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = two_networks(tmp_path, **changes)
    save_picture(tmp_path / "a.png", flat(RED))
    argv = ["--mode", "enhance", "--checkpoint", weights, "--input", tmp_path / "a.png"]
    status = ms.main([str(word) for word in [*argv, "--output", tmp_path / "b.png"]])
    assert_one_line_error(status, capsys.readouterr().err, "two.pth")
    assert not (tmp_path / "b.png").exists()


def test_one_network_knows_no_camera_to_choose(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ms.Config(flow_channels=8, num_flow_blocks=1, thumbnail_size=32)
    content = {"config": dataclasses.asdict(config)}
    content |= {"model": ms.ConditionalFlow(config).state_dict()}
    save_checkpoint(tmp_path / "one.pth", content)
    save_picture(tmp_path / "a.png", flat(RED))
    argv = [
        "--mode",
        "enhance",
        "--checkpoint",
        tmp_path / "one.pth",
        "--input",
        tmp_path / "a.png",
    ]
    argv += ["--output", tmp_path / "b.png", "--set", "camera=infrared"]
    status = ms.main([str(word) for word in argv])
    assert_one_line_error(status, capsys.readouterr().err, "camera", "one network")


def test_one_network_is_no_start_for_a_camera(tmp_path: Path) -> None:
    config = ms.Config(flow_channels=8, num_flow_blocks=1, thumbnail_size=32)
    content = {"config": dataclasses.asdict(config)}
    content |= {"model": ms.ConditionalFlow(config).state_dict()}
    save_checkpoint(tmp_path / "one.pth", content)
    assert starting_weights(str(tmp_path / "one.pth"), "auto")["model"].keys()
    with pytest.raises(UserError, match="one network"):
        starting_weights(str(tmp_path / "one.pth"), "infrared")
    # the camera may be the teacher's
    assert starting_weights(str(tmp_path / "one.pth"), "infrared", "two.pth")["model"].keys()


def test_a_training_starts_from_the_network_of_its_camera(tmp_path: Path) -> None:
    weights = two_networks(tmp_path)
    content = load_checkpoint(str(weights))
    for camera, expected in (
        ("auto", content["model"]),
        ("ordinary", content["model"]),
        ("infrared", content["cameras"]["infrared"]),
    ):
        found = starting_weights(str(weights), camera)["model"]
        assert all(torch.equal(found[name], expected[name]) for name in expected)
