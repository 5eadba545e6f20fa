"""Folders: finding pictures, and working one off."""

from __future__ import annotations

import glob
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from support import journal
from support.decoding import SUFFIXES, VIDEO_SUFFIXES
from support.files import write_csv
from support.journal import Journal
from support.processes import all_gather, broadcast, progress_style, rank, shard
from support.settings import UserError

VIDEO_TOOL = "tools/enhance_video.py"


def find_inputs(
    given: str, output: str, suffixes: Sequence[str] = SUFFIXES
) -> list[tuple[Path, Path]]:
    """(input, output) of every file of `suffixes` that `given` means: a folder or a pattern such as
    'in/**/*.jpg'.

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
    names_file = target.suffix.lower() in SUFFIXES + VIDEO_SUFFIXES
    if names_file or (target.exists() and not target.is_dir()):
        raise UserError(f"--output {target}: {given} means many pictures, so name a folder")
    inside = target.resolve()
    if inside == root.resolve():
        raise UserError(f"--output {target}: is the input folder itself; choose another")
    seen = [
        path
        for path in found
        if path.suffix.lower() in (*suffixes, *VIDEO_SUFFIXES)
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
        and path.is_file()
        and inside not in path.resolve().parents
    ]
    files = [path for path in seen if path.suffix.lower() in suffixes]
    clips = len(seen) - len(files)
    hint = f"{clips} {'clip' if clips == 1 else 'clips'} left out; python {VIDEO_TOOL} does them"
    if not files:
        looked = f"the suffixes looked for are {', '.join(suffixes)}"
        raise UserError(f"--input {given}: nothing found; {hint if clips else looked}")
    if clips:
        print(f"{given}: {hint}")
    return [(path, target / path.relative_to(root)) for path in files]


def one_target(given: str, output: str, suffixes: Sequence[str]) -> Path:
    """The file that `output` means for the one file `given`. Raises UserError."""
    target = Path(output)
    if Path(given).suffix.lower() in set(VIDEO_SUFFIXES) - set(suffixes):
        raise UserError(f"--input {given}: is a clip; use python tools/enhance_video.py for it")
    if target.is_dir() or output.endswith(("/", os.sep)):
        target = target / Path(given).name
    if target.suffix.lower() not in suffixes:
        raise UserError(f"--output {target}: the suffix must be one of {', '.join(suffixes)}")
    if target.exists() and os.path.exists(given) and target.samefile(given):
        raise UserError(f"--output {target}: is the input itself; choose another name")
    return target


def means_many(given: str) -> bool:
    """Whether --input is a folder or a pattern."""
    return os.path.isdir(given) or (glob.has_magic(given) and not os.path.exists(given))


def find_jobs(given: str, output: str, suffixes: Sequence[str]) -> list[tuple[Path, Path]]:
    """(input, output) of the file, folder or pattern `given`. Raises UserError."""
    if means_many(given):
        return find_inputs(given, output, suffixes)
    return [(Path(given), one_target(given, output, suffixes))]


ENHANCE_COLUMNS = (
    "file",
    "output",
    "width",
    "height",
    "seconds",
    "brightness_before",
    "brightness_after",
    "deviation",
    "camera",
    "note",
)


def enhance_row(
    job: tuple[Path, Path],
    before: np.ndarray,
    after: np.ndarray,
    deviation: np.ndarray | None,
    facts: dict[str, Any],
) -> dict[str, Any]:
    """The row of enhance.csv of a picture, (H, W, 3) of 8 or 16 bits `before` and `after`;
    `facts` has its seconds, camera and note."""
    white = [np.iinfo(image.dtype).max for image in (before, after)]
    row: dict[str, Any] = {
        "file": str(job[0]),
        "output": str(job[1]),
        "width": before.shape[1],
        "height": before.shape[0],
        "brightness_before": round(float(before.mean()) / white[0], 5),
        "brightness_after": round(float(after.mean()) / white[1], 5),
        "deviation": "" if deviation is None else round(float(deviation.mean()), 5),
        **facts,
        "seconds": round(facts["seconds"], 3),
    }
    return {column: row[column] for column in ENHANCE_COLUMNS}


def tell_row(row: dict[str, Any], where: str) -> None:
    """Print what became of a single picture, from its row, computed on `where`."""
    print(f"{row['output']}: {row['width']}x{row['height']}, {row['seconds']:.2f} s on {where}")
    for note in filter(None, (row["camera"] and f"{row['camera']} network", row["note"])):
        print(f"{row['file']}: {note}")
    if row["deviation"] != "":
        print(f"mean deviation over samples: {row['deviation']:.4f} of full scale")


def work_off(
    jobs: Sequence[tuple[Path, Path]],
    folder: Path,
    work: Callable[[Path, Path], dict[str, Any]],
    again: bool,
    made_with: str = "",
) -> int:
    """Do every job that is not done, or every one `again`; 1 if any failed.

    Done is what the same input, weights and settings made; `made_with` stands for the last two, see
    `journal.fingerprint`. enhance.csv in `folder` has a row for each, also for those that an
    earlier run did.
    """
    empty = dict.fromkeys(ENHANCE_COLUMNS, "")
    book = Journal(folder, made_with)
    # asked once, before anybody writes: the shares of several processes must come from one list
    states = broadcast([journal.NEW if again else book.state(*job) for job in jobs])
    pairs = list(zip(jobs, states, strict=True))
    done = {job: state for job, state in pairs if state in (journal.DONE, journal.FOREIGN)}
    todo = [job for job in jobs if job not in done]
    counts = [f"{states.count(state)} {state}" for state in journal.STATES if state in states]
    print(f"{len(jobs)} files: {', '.join(counts)}")
    rows: dict[str, dict[str, Any]] = {}
    failed: list[str] = []
    try:
        for source, target in tqdm(shard(todo), desc="enhancing", unit="file", **progress_style()):
            try:
                rows[str(source)] = work(source, target)
                book.add(source, target)
            except UserError as error:
                failed.append(" ".join(str(error).split()))
                rows[str(source)] = empty | {"file": source, "note": f"failed: {failed[-1]}"}
        rows = {name: row for share in all_gather(rows) for name, row in share.items()}
        failed = [line for share in all_gather(failed) for line in share]
    finally:
        for (source, target), state in done.items():
            note = "made by an earlier run" if state == journal.DONE else "kept, made elsewhere"
            rows[str(source)] = empty | {"file": source, "output": target, "note": note}
        order = [rows[str(source)] for source, _ in jobs if str(source) in rows]
        if order and rank() == 0:
            write_csv(folder / "enhance.csv", order)
    for line in failed if rank() == 0 else []:
        print(f"failed: {line}", file=sys.stderr)
    count = f"{len(todo) - len(failed)} enhanced, {len(failed)} failed"
    print(f"{folder}: {count}; enhance.csv lists them")
    return 1 if failed else 0
