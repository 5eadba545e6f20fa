"""The shipped weights: their names on every command line, and the fast ones beside the large."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from cli_tools import assert_one_line_error, parsed, run_script, run_tool
from skimage.metrics import peak_signal_noise_ratio

import model_script as ms
from support.commands import SHIPPED, WEIGHTS, shipped
from support.simulated import darkened, demo_photograph, simulate_infrared


def test_names_stand_for_shipped_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in WEIGHTS:
        assert shipped(name) == str(SHIPPED / f"{name}.pth")
    (tmp_path / "fast").write_bytes(b"mine")
    assert shipped("fast") == "fast", "the user's own file goes first"
    for name in ("mine.pth", "checkpoints/fast.pth", "Fast", ""):
        assert shipped(name) == name


def test_the_script_takes_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--mode", "enhance", "--input", "a.png", "--output", "b.png", "--checkpoint"]
    assert Path(parsed([*words, "released"]).checkpoint) == SHIPPED / "released.pth"
    done = run_script(*words, "slow", cwd=tmp_path)
    assert_one_line_error(done.returncode, done.stderr, "slow: no such checkpoint")


@pytest.mark.parametrize("tool", ["adapt.py", "enhance_video.py", "export_onnx.py", "web_app.py"])
def test_every_tool_names_them(tool: str, tmp_path: Path) -> None:
    done = run_tool(tool, "--help", cwd=tmp_path)
    said = " ".join(done.stdout.split())
    assert done.returncode == 0 and "released" in said and "fast" in said


def test_the_fast_weights_are_a_small_copy_of_the_released_ones() -> None:
    assert (SHIPPED / "fast.pth").stat().st_size <= 4e6
    fast, released = (
        ms.load_model(shipped(name), {"device": "cpu"}, ms.ConditionalFlow)
        for name in ("fast", "released")
    )
    count = [sum(p.numel() for p in loaded.model.parameters()) for loaded in (fast, released)]
    assert count[0] < count[1] / 8 and fast.infrared is not None
    assert fast.model.config.teacher == "" and fast.known is not None
    assert fast.camera_net is not None and released.camera_net is not None
    for name, value in released.camera_net.state_dict().items():
        assert torch.allclose(fast.camera_net.state_dict()[name], value, atol=1e-3)


@pytest.mark.parametrize("camera", ["ordinary", "infrared"])
def test_the_fast_weights_see_what_the_released_ones_see(camera: str) -> None:
    high = np.asarray(demo_photograph("chelsea"))[:240, :320]
    rng = np.random.default_rng(0)
    low = darkened(high, rng)[0] if camera == "ordinary" else simulate_infrared(high, rng)
    answers = []
    for name in ("fast", "released"):
        given = {"device": "cpu", "camera": camera}
        loaded = ms.load_model(shipped(name), given, ms.ConditionalFlow)
        model, _ = loaded.choose(low)
        answers.append(ms.enhance_pixels(model, low, loaded.use, loaded.runtime).best / 65535)
    assert peak_signal_noise_ratio(*answers, data_range=1) > 20
    assert abs(answers[0].mean() - answers[1].mean()) < 0.06
