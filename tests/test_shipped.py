"""The names of the shipped weights on every command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_tools import assert_one_line_error, parsed, run_script, run_tool

from support.commands import SHIPPED, WEIGHTS, shipped


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
