"""Files: everything is written under a temporary name and renamed."""

from __future__ import annotations

import csv
import json
import os
import time
from collections.abc import Iterator
from contextlib import (
    contextmanager,
    suppress,
)
from datetime import datetime
from pathlib import Path
from typing import Any

from support.settings import UserError

# a file's name need not be text: its bytes are written and read back as they are
ANY_NAME = "surrogateescape"


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary name beside `path` that becomes `path` when the block succeeds and vanishes when
    it does not."""
    path = Path(path)
    # a long name may be as long as names can be
    temporary = path.with_name(f".{path.stem[:40]}.{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot write ({error.strerror or error}); check the folder and the free space"
        ) from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Create `folder` where it is missing. Raises UserError when that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot create the folder ({error.strerror}); choose another"
        ) from None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """`content` as indented JSON."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """One line a row under the keys of all."""
    with (
        atomic_path(path) as temporary,
        open(temporary, "w", newline="", encoding="utf-8", errors=ANY_NAME) as stream,
    ):
        writer = csv.DictWriter(
            stream, fieldnames=list(dict.fromkeys(key for row in rows for key in row))
        )
        writer.writeheader()
        writer.writerows(rows)


def write_bytes(path: Path, content: bytes) -> None:
    """`content` as a file."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def results_folder(parent: str, prefix: str) -> Path:
    """A new folder name prefix_YYYYMMDD_HHMMSS under `parent`; a second later where that exists."""
    while True:
        folder = Path(parent) / f"{prefix}_{datetime.now():%Y%m%d_%H%M%S}"
        if not folder.exists():
            return folder
        time.sleep(0.2)
