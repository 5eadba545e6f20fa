"""The exported ONNX file computes what the script computes, at any size."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from functools import partial
from pathlib import Path

import export_onnx
import numpy as np
import pytest
import torch
from cli_tools import assert_one_line_error, files_under
from conftest import ROOT, randomise

import baselines
import model_script as ms
from support.checkpoints import save_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose every layer does something."""
    torch.manual_seed(2)
    config = ms.Config(flow_channels=16, num_flow_blocks=2, thumbnail_size=32)
    model = randomise(ms.ConditionalFlow(config), 0.05)
    path = tmp_path_factory.mktemp("weights") / "best_model.pth"
    save_checkpoint(
        path,
        {
            "config": dataclasses.asdict(config),
            "model": model.state_dict(),
            "run_id": "r",
            "epoch": 1,
        },
    )
    return path


def export(checkpoint: Path, target: Path) -> int:
    return export_onnx.main(["--checkpoint", str(checkpoint), "--output", str(target)])


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(
            name, reason="the optional packages onnx, onnxruntime and onnxscript are not installed"
        )
    path = tmp_path_factory.mktemp("onnx") / "enhancer.onnx"
    assert export(checkpoint, path) == 0
    return path


@pytest.mark.parametrize("size", [(16, 16), (61, 47), (130, 333)])
def test_onnx_and_pytorch_agree_at_any_size(
    checkpoint: Path, exported: Path, size: tuple[int, int]
) -> None:
    import onnxruntime

    model = ms.load_model(str(checkpoint), {"device": "cpu"}, ms.ConditionalFlow).model
    low = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(1)) ** 2
    with torch.no_grad():
        expected = model.enhance(low).numpy()
    session = onnxruntime.InferenceSession(str(exported), providers=["CPUExecutionProvider"])
    found = session.run(None, {"low": low.numpy()})[0]
    assert found.shape == (1, 3, *size)
    assert expected.std() > 0.01
    assert np.abs(found - expected).max() < 1e-3


def test_the_export_is_one_file_and_says_how_to_run_it(
    checkpoint: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert files_under(exported.parent) == {"enhancer.onnx"}
    assert export(checkpoint, tmp_path / "sub" / "e.onnx") == 0
    printed = capsys.readouterr().out
    assert printed.count("largest difference") == 3 and "InferenceSession" in printed
    assert files_under(tmp_path) == {"sub", "sub/e.onnx"}


def test_a_file_that_differs_is_not_kept(
    checkpoint: Path,
    exported: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(export_onnx, "TOLERANCE", 0.0)
    status = export(checkpoint, tmp_path / "e.onnx")
    assert_one_line_error(status, capsys.readouterr().err, "differ", expected=1)
    assert files_under(tmp_path) == set()


@pytest.mark.parametrize("name", ["onnx", "onnxruntime", "onnxscript"])
def test_missing_packages_are_named(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    assert_one_line_error(
        export(checkpoint, tmp_path / "e.onnx"), capsys.readouterr().err, "pip install", name
    )


def test_what_onnx_cannot_express_is_one_line(
    checkpoint: Path,
    exported: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        export_onnx.Enhancer, "forward", lambda self, low: low + torch.linalg.svdvals(low).sum()
    )
    status = export(checkpoint, tmp_path / "e.onnx")
    assert_one_line_error(
        status, capsys.readouterr().err, "cannot express", "ConditionalFlow", "--mode enhance"
    )
    assert files_under(tmp_path) == set()


def test_another_suffix_is_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_one_line_error(export(checkpoint, tmp_path / "e.pt"), capsys.readouterr().err, ".onnx")


def test_weights_that_nobody_knows_are_refused(
    checkpoint: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = torch.load(checkpoint, weights_only=True) | {"system": "Unheard"}
    torch.save(content, tmp_path / "u.pth")
    for path in (tmp_path / "u.pth", tmp_path / "missing.pth"):
        status = export(path, tmp_path / "e.onnx")
        assert_one_line_error(status, capsys.readouterr().err, path.name)
    assert files_under(tmp_path) == {"u.pth"}


class Plain(ms.System):
    """Another system, which knows nothing of flows."""

    def enhance(self, low: torch.Tensor, temperature: float = 0.0) -> torch.Tensor:
        return (3 * low).clamp(0, 1)


def test_another_systems_weights_are_found_by_their_name(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    monkeypatch.setitem(baselines.SYSTEMS, "Plain", (__name__, "Plain", "plain.json"))
    content = {"system": "Plain", "config": dataclasses.asdict(ms.Config()), "model": {}}
    save_checkpoint(tmp_path / "p.pth", {**content, "run_id": "r"})
    assert export(tmp_path / "p.pth", tmp_path / "e.onnx") == 0
    session = onnxruntime.InferenceSession(
        str(tmp_path / "e.onnx"), providers=["CPUExecutionProvider"]
    )
    low = np.full((1, 3, 20, 30), 0.1, np.float32)
    assert np.abs(session.run(None, {"low": low})[0] - 0.3).max() < 1e-6


def test_the_command_starts_from_anywhere_and_explains_itself(tmp_path: Path) -> None:
    script = str(ROOT / "tools" / "export_onnx.py")
    run = partial(subprocess.run, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    done = run([sys.executable, script, "--help"])
    assert done.returncode == 0 and "python tools/export_onnx.py --output" in done.stdout
    done = run([sys.executable, script])
    assert_one_line_error(done.returncode, done.stderr, "--output")


def test_one_network_has_no_camera_to_export(
    checkpoint: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--checkpoint", str(checkpoint), "--output", str(tmp_path / "e.onnx")]
    status = export_onnx.main([*argv, "--camera", "infrared"])
    assert_one_line_error(status, capsys.readouterr().err, "one network")
    assert files_under(tmp_path) == set()
