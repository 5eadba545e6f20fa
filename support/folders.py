"""Folders: finding pictures, and working one off."""

from __future__ import annotations

import csv
import glob
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from support.decoding import SUFFIXES, VIDEO_SUFFIXES
from support.files import ANY_NAME, write_csv
from support.processes import from_all, from_first, my_share, progress_style, rank
from support.settings import UserError


def natural_key(name: str) -> list[Any]:
    """Sort key that puts 9 before 10."""
    digits = "".join(c if c.isdecimal() else " " for c in name).split()
    return [[int(d) for d in digits], name]


def pictures_by_stem(folder: str, key: str) -> dict[str, Path]:
    """Stem -> file of every picture in `folder`. Raises UserError for a missing folder or a stem
    that two files share."""
    if not os.path.isdir(folder):
        raise UserError(
            f"{key}: no folder {folder!r}; set it in the config or with --set {key}=FOLDER"
        )
    found: dict[str, Path] = {}
    try:
        listed = sorted(Path(folder).iterdir())
    except OSError as error:
        raise UserError(
            f"{key}: cannot list {folder!r} ({error.strerror}); check its permissions"
        ) from None
    for path in listed:
        if path.suffix.lower() in SUFFIXES and path.is_file() and not path.name.startswith("."):
            if path.stem in found:
                raise UserError(
                    f"{path}: has the same stem as {found[path.stem].name}; keep one of the two"
                )
            found[path.stem] = path
    return found


def find_inputs(given: str, output: str) -> list[tuple[Path, Path]]:
    """(input, output) of every picture that `given`, a folder or a pattern such as 'in/**/*.jpg',
    means.

    Folders are searched to any depth and mirrored under `output`; hidden ones, hidden files and
    links to folders, which may run in circles, are left out. Raises UserError when there is none.
    """
    target = Path(output)
    if os.path.isdir(given):
        root, found = Path(given), sorted(Path(given).rglob("*"))
    else:
        parts = Path(given).parts
        fixed = list(itertools.takewhile(lambda part: not glob.has_magic(part), parts))
        root, rest = Path(*fixed), [*parts[len(fixed) :], *(["*"] if parts[-1] == "**" else [])]
        try:
            found = sorted(root.glob(str(Path(*rest))))
        except ValueError as error:
            raise UserError(
                f"--input {given}: no pattern ({error}); write one such as 'photos/**/*.jpg'"
            ) from None
    if (
        target.exists() and not target.is_dir()
    ) or target.suffix.lower() in SUFFIXES + VIDEO_SUFFIXES:
        raise UserError(f"--output {target}: {given} means many pictures, so name a folder")
    inside = target.resolve()
    if inside == root.resolve():
        raise UserError(f"--output {target}: is the input folder itself; choose another")
    known = SUFFIXES + VIDEO_SUFFIXES
    seen = [
        path
        for path in found
        if not any(part.startswith(".") for part in path.relative_to(root).parts)
    ]
    files = [
        path
        for path in seen
        if path.suffix.lower() in known and path.is_file() and inside not in path.resolve().parents
    ]
    if not files:
        raise UserError(
            f"--input {given}: no picture found; the suffixes looked for are {', '.join(known)}"
        )
    return [(path, target / path.relative_to(root)) for path in files]


ENHANCE_COLUMNS = (
    "file",
    "output",
    "width",
    "height",
    "seconds",
    "brightness_before",
    "brightness_after",
    "deviation",
    "note",
)


def enhance_folder(
    jobs: Sequence[tuple[Path, Path]],
    folder: Path,
    work: Callable[[Path, Path], dict[str, Any]],
    again: bool,
) -> int:
    """Do every job that is not done, or every one `again`; enhance.csv in `folder` keeps a row of
    each. 1 if any failed."""
    table = folder / "enhance.csv"
    rows: dict[str, dict[str, Any]] = {}
    if table.exists():
        try:
            with open(table, newline="", encoding="utf-8", errors=ANY_NAME) as stream:
                read = [
                    {key: cell for key, cell in row.items() if key}
                    for row in csv.DictReader(stream)
                ]
        except (OSError, csv.Error) as error:
            raise UserError(
                f"{table}: cannot read the table ({error}); rename or remove it"
            ) from None
        rows = {row["file"]: row for row in read if row.get("file")}
    # asked once, before anybody writes: the shares of several processes must come from one list
    todo = from_first([(source, target) for source, target in jobs if again or not target.exists()])
    print(f"{len(jobs)} pictures, {len(jobs) - len(todo)} of them already done")
    # a run that was killed left its pictures and no table
    for source, target in set(jobs) - set(todo):
        made = {"file": str(source), "output": str(target), "note": "made by an earlier run"}
        rows.setdefault(str(source), dict.fromkeys(ENHANCE_COLUMNS, "") | made)
    done: dict[str, dict[str, Any]] = {}
    failed: list[str] = []
    try:
        for source, target in tqdm(
            my_share(todo), desc="enhancing", unit="image", **progress_style()
        ):
            try:
                done[str(source)] = work(source, target)
            except UserError as error:
                failed.append(" ".join(str(error).split()))
                done[str(source)] = dict.fromkeys(ENHANCE_COLUMNS, "") | {
                    "file": str(source),
                    "note": f"failed: {failed[-1]}",
                }
        done = {name: row for share in from_all(done) for name, row in share.items()}
        failed = [line for share in from_all(failed) for line in share]
    finally:
        rows |= done
        if rows and rank() == 0:
            order = [rows[str(source)] for source, _ in jobs if str(source) in rows]
            write_csv(
                table,
                order
                + [
                    row
                    for name, row in rows.items()
                    if name not in {str(source) for source, _ in jobs}
                ],
            )
    for line in failed if rank() == 0 else []:
        print(f"failed: {line}", file=sys.stderr)
    print(
        f"{folder}: {len(todo) - len(failed)} enhanced, {len(failed)} failed; enhance.csv lists"
        " them"
    )
    return 1 if failed else 0
