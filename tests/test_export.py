"""The exported ONNX file computes what the script computes, at any size."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import export_onnx
import numpy as np
import pytest
import torch
from cli_tools import assert_one_line_error, files_under
from conftest import ROOT, randomise
from PIL import Image

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
def printed() -> dict[str, str]:
    """What the export of `exported` said."""
    return {}


@pytest.fixture(scope="module")
def exported(
    checkpoint: Path, printed: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(
            name, reason="the optional packages onnx, onnxruntime and onnxscript are not installed"
        )
    path = tmp_path_factory.mktemp("onnx") / "sub" / "enhancer.onnx"
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert export(checkpoint, path) == 0
    printed["export"] = said.getvalue()
    return path


@pytest.fixture
def once(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network is not converted again, which takes most of an export: what follows is tried."""

    def write(enhancer: Any, path: Path, name: str) -> None:
        shutil.copyfile(exported, path)

    monkeypatch.setattr(export_onnx, "write_network", write)


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
    exported: Path, printed: dict[str, str]
) -> None:
    assert files_under(exported.parent) == {"enhancer.onnx"}
    said = printed["export"]
    assert said.count("largest difference") == 3 and "InferenceSession" in said


def test_a_file_that_differs_is_not_kept(
    checkpoint: Path,
    once: None,
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


# in fewer bits ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dark_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four dark pictures of two sizes."""
    folder, rng = tmp_path_factory.mktemp("dark"), np.random.default_rng(0)
    for place, size in enumerate([(60, 90), (300, 280)] * 2):
        smooth = rng.integers(0, 90, (6, 6, 3), dtype=np.uint8)
        picture = Image.fromarray(smooth).resize(size, Image.Resampling.BICUBIC)
        picture.save(folder / f"{place}.png")
    return folder


def options_for(precision: str, folder: Path) -> list[str]:
    calibrate = ["--calibrate", str(folder)] if precision == "int8" else []
    return ["--precision", precision, "--check", str(folder), *calibrate]


@pytest.mark.parametrize(("precision", "least"), [("fp16", 45.0), ("int8", 38.0)])
def test_fewer_bits_stay_near_pytorch_at_any_size(
    checkpoint: Path,
    once: None,
    dark_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    precision: str,
    least: float,
) -> None:
    import onnx
    import onnxruntime

    argv = ["--checkpoint", str(checkpoint), "--output", str(tmp_path / "e.onnx")]
    assert export_onnx.main([*argv, *options_for(precision, dark_folder)]) == 0
    printed = capsys.readouterr().out
    assert "on the 4 pictures of --check" in printed and "600x400: onnxruntime" in printed
    assert files_under(tmp_path) == {"e.onnx"}
    kinds = {weight.data_type for weight in onnx.load(tmp_path / "e.onnx").graph.initializer}
    wanted = onnx.TensorProto.FLOAT16 if precision == "fp16" else onnx.TensorProto.INT8
    assert wanted in kinds
    session = onnxruntime.InferenceSession(
        str(tmp_path / "e.onnx"), providers=["CPUExecutionProvider"]
    )
    model = ms.load_model(str(checkpoint), {"device": "cpu"}, ms.ConditionalFlow).model
    low = torch.from_numpy(np.asarray(Image.open(dark_folder / "1.png")).copy())
    low = low.permute(2, 0, 1)[None, :, 3:, :201].float() / 255
    with torch.no_grad():
        expected = model.enhance(low).numpy()
    found = session.run(None, {"low": low.numpy()})[0]
    assert found.dtype == np.float32 and found.shape == expected.shape
    error = float(((found - expected) ** 2).mean())
    assert 0 < error < 10 ** (-least / 10)


def test_fewer_bits_that_are_too_far_are_not_kept(
    checkpoint: Path,
    once: None,
    dark_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import onnx_smaller

    monkeypatch.setattr(onnx_smaller, "LEAST", {"fp16": 200.0})
    argv = ["--checkpoint", str(checkpoint), "--output", str(tmp_path / "e.onnx")]
    status = export_onnx.main([*argv, *options_for("fp16", dark_folder)])
    assert_one_line_error(status, capsys.readouterr().err, "--precision fp16", "below 200", "fp32")
    assert files_under(tmp_path) == set()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--precision", "int8", "--check", "here"], ("--calibrate FOLDER",)),
        (["--precision", "fp16"], ("--check FOLDER",)),
        (
            ["--precision", "fp16", "--check", "a", "--calibrate", "b"],
            ("--calibrate does nothing",),
        ),
        (["--check", "here"], ("--check does nothing", "fp32")),
        (["--precision", "fp16", "--check", "no_such_folder"], ("--check", "no_such_folder")),
        (["--precision", "int4"], ("--precision", "int4")),
    ],
)
def test_options_for_fewer_bits_that_do_not_fit(
    checkpoint: Path,
    exported: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    words: tuple[str, ...],
) -> None:
    common = ["--checkpoint", str(checkpoint), "--output", str(tmp_path / "e.onnx")]
    assert_one_line_error(export_onnx.main([*common, *argv]), capsys.readouterr().err, *words)
    assert files_under(tmp_path) == set()
