"""Journal: what made each output of a folder, so that a later run knows what is done."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NAME = ".enhance.jsonl"
# why a file is done again, or not
NEW, DONE, OTHER, CHANGED, FOREIGN = (
    "new",
    "already done",
    "again, for other weights or settings",
    "again, for a changed input",
    "kept, as they were not made here (overwrite=true replaces them)",
)
STATES = (NEW, DONE, OTHER, CHANGED, FOREIGN)


def stamp(path: str | Path) -> str:
    """Size and time of a file, which change when it does; empty where it is not there."""
    try:
        found = os.stat(path)
    except OSError:
        return ""
    return f"{found.st_size} {found.st_mtime_ns}"


def fingerprint(checkpoint: str, facts: Mapping[str, Any]) -> str:
    """16 hexadecimal digits of the weights and of the settings that change a result."""
    text = json.dumps(dict(facts), sort_keys=True).encode()
    return hashlib.sha256(Path(checkpoint).read_bytes() + text).hexdigest()[:16]


class Journal:
    """The lines of `folder`/.enhance.jsonl, one for each output that was finished."""

    def __init__(self, folder: Path, made_with: str) -> None:
        self.folder, self.made_with = folder, made_with
        self.lines: dict[str, tuple[str, str]] = {}
        try:
            text = (folder / NAME).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return
        for line in text.splitlines():
            try:
                output, made_with, read = json.loads(line)
                self.lines[str(output)] = (str(made_with), str(read))
            except (ValueError, TypeError, RecursionError):
                continue  # half a line, of a run that was killed: that picture is done again

    def _name(self, target: Path) -> str:
        return os.path.relpath(target, self.folder)

    def state(self, source: Path, target: Path) -> str:
        """NEW, DONE, OTHER, CHANGED or FOREIGN for a job."""
        if not target.exists():
            return NEW
        if self._name(target) not in self.lines:
            return FOREIGN
        made_with, read = self.lines[self._name(target)]
        if made_with != self.made_with:
            return OTHER
        return DONE if read == stamp(source) else CHANGED

    def add(self, source: Path, target: Path) -> None:
        """Note that `target` was made from `source`; several processes may do so at a time."""
        line = json.dumps([self._name(target), self.made_with, stamp(source)]) + "\n"
        self.folder.mkdir(parents=True, exist_ok=True)
        # one write to a file that is open for appending: lines of two processes do not mix
        handle = os.open(self.folder / NAME, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(handle, line.encode())
        finally:
            os.close(handle)
