"""Data sets as they are found: names that say what belongs together, folders one level too high."""

from __future__ import annotations

from pathlib import Path

from support.naming import listed
from support.pairs import find_pairs


def write_files(folder: Path, *names: str) -> Path:
    """Empty files, enough for pairing; returns the folder."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


# lists of names -----------------------------------------------------------------------------------


def test_long_lists_are_cut_at_five() -> None:
    assert listed(["a"]) == "a" and listed([*"abcde"]) == "a, b, c, d, e"
    assert listed([*"abcdef"]) == "a, b, c, d, e and 1 more"
    assert listed([str(number) for number in range(500)]) == "0, 1, 2, 3, 4 and 495 more"


def test_orphans_are_cut_at_five(tmp_path: Path) -> None:
    write_files(tmp_path / "low", *(f"{number}.png" for number in range(1, 13)))
    write_files(tmp_path / "high", "12.jpg")
    told: list[str] = []
    (pair,) = find_pairs(f"{tmp_path}/low", f"{tmp_path}/high", "train", told.append)
    (line,) = told
    assert pair.name == "12" and " 11 pictures " in line
    assert line.endswith(": 1.png, 2.png, 3.png, 4.png, 5.png and 6 more")
