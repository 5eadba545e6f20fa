"""The shape of the house: the sizes of the files, and imports that run down only."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPT = ROOT / "model_script.py"
SUPPORT = sorted((ROOT / "support").glob("*.py"))
UPPER = ("model_script", "baselines", "tools", "benchmarks", "tests")  # each room, and those below
TORCHLESS = ("support.settings", "support.files")


def lines_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def line_of(start: str) -> int:
    """The number of the one line of the script that starts with `start`, indented or not."""
    (found,) = (
        number for number, line in enumerate(lines_of(SCRIPT), 1) if line.strip().startswith(start)
    )
    return found


def imported_by(path: Path) -> set[str]:
    """The first names of all modules that a file imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import by the whole name"
            found.add(str(node.module).split(".")[0])
    return found


def test_the_script_is_short_enough_to_be_read() -> None:
    assert len(lines_of(SCRIPT)) <= 1800
    assert line_of("class LogitMap(") < 480  # the first layer of the flow
    assert line_of("def ssim(") < 950  # the first loss
    assert line_of("def _train_step(") < 1200


def test_lines_are_short() -> None:
    """A table's row may be long, and what a command prints."""
    words = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *ROOT.glob("C*.md")]
    page = [path for path in (ROOT / "tools" / "templates").iterdir() if path.suffix != ".svg"]
    long = [
        f"{path.name}:{number}"
        for path in [SCRIPT, *SUPPORT, *words, *page]
        for number, line in enumerate(lines_of(path), 1)
        if len(line) > 100 and not (path in words and line.startswith(("|", "note: ")))
    ]
    assert long == []


def test_no_room_is_too_large() -> None:
    sizes = {path.name: len(lines_of(path)) for path in SUPPORT}
    assert len(sizes) > 9
    assert {name: size for name, size in sizes.items() if size > 320} == {}


def test_the_readme_is_short() -> None:
    assert len(lines_of(ROOT / "README.md")) <= 170


@pytest.mark.parametrize("path", SUPPORT, ids=lambda path: path.name)
def test_what_the_script_stands_on_imports_nothing_above(path: Path) -> None:
    assert imported_by(path).isdisjoint(UPPER)


def test_the_script_imports_what_it_stands_on_alone() -> None:
    found = imported_by(SCRIPT)
    assert "support" in found  # guards the tests around it
    assert found.isdisjoint(UPPER)


@pytest.mark.parametrize("path", sorted((ROOT / "baselines").glob("*.py")), ids=lambda p: p.name)
def test_baselines_import_neither_tools_nor_benchmarks(path: Path) -> None:
    assert imported_by(path).isdisjoint({"tools", "benchmarks", "tests"})


@pytest.mark.parametrize("path", sorted((ROOT / "tools").glob("*.py")), ids=lambda p: p.name)
def test_tools_import_neither_benchmarks_nor_tests(path: Path) -> None:
    assert imported_by(path).isdisjoint({"benchmarks", "tests"})


@pytest.mark.parametrize("module", TORCHLESS)
def test_settings_and_files_need_no_torch(module: str) -> None:
    """In a world where importing torch fails; that world is real: what needs torch fails in it."""
    blocked = "import sys; sys.modules['torch'] = None; import "
    for name, works in ((module, True), ("support.runtime", False)):
        code = f"{blocked}{name}"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        assert (done.returncode == 0) == works, done.stderr
        assert works or "torch" in done.stderr
