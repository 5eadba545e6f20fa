"""Settings: mistakes that the user can mend, documented fields, from JSON or --set."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from contextlib import (
    suppress,
)
from dataclasses import field
from typing import Any

LONGEST_CONFIG = 1_000_000  # characters


class UserError(Exception):
    """A mistake the user can mend. Its text is the one line that the command line prints."""

    status = 2


class RunError(UserError):
    """A run that failed although its input was fine (a loss that diverged, say)."""

    status = 1


def knob(
    default: Any,
    meaning: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: Sequence[str] | None = None,
    architecture: bool = False,
) -> Any:
    """A config field with its documentation, its allowed range and whether it shapes the network's
    weights."""
    metadata = dict(meaning=meaning, low=low, high=high, choices=choices, architecture=architecture)
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def allowed(key: dataclasses.Field) -> str:
    """The values a key may take, in words."""
    low, high, choices = key.metadata["low"], key.metadata["high"], key.metadata["choices"]
    if choices:
        return "one of " + ", ".join(choices)
    words = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "a text"}
    words |= {"list[int]": "a list of integers", "list[float]": "a list of numbers"}
    return words[str(key.type)] + (f" in [{low:g}, {high:g}]" if low is not None else "")


def shown(value: Any) -> str:
    """A value as JSON in at most 80 characters; what is nested or of a foreign type, and may have
    no end, by its type."""
    items = value if isinstance(value, list) else [value]
    plain = len(items) < 10 and all(
        item is None or isinstance(item, (str, int, float)) for item in items
    )
    text = json.dumps(value) if plain else f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def is_text(value: Any) -> bool:
    """Whether `value` is a text that could name a file: no null byte, no half of a character."""
    with suppress(UnicodeEncodeError):
        return isinstance(value, str) and b"\0" not in os.fsencode(value)
    return False


def is_side(text: str) -> bool:
    """Whether `text` is a picture side in [16, 8192]."""
    return text.isdecimal() and len(text) <= 4 and 16 <= int(text) <= 8192


def parse_eval_size(text: str, source: str = "eval_size") -> tuple[int, int] | None:
    """(height, width) of an eval_size such as '128,128'; None for native and auto."""
    if text in ("auto", "native"):
        return None
    parts = text.strip("[]").split(",")
    if len(parts) == 2 and all(is_side(part.strip()) for part in parts):
        return int(parts[0]), int(parts[1])
    raise UserError(
        f"{source}: eval_size must be auto, native or height,width in [16, 8192], got {text!r}"
    )


def read_config_file(path: str) -> dict[str, Any]:
    """The settings of a JSON config file, unchecked. Raises UserError for an unreadable file or one
    that is no object."""

    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = set()
        for name, _ in pairs:
            if name in names:
                raise UserError(f"{path}: key {name[:80]} is given twice; keep one")
            names.add(name)
        return dict(pairs)

    try:
        with open(path, encoding="utf-8") as stream:
            text = stream.read(LONGEST_CONFIG + 1)
        if len(text) > LONGEST_CONFIG:
            raise UserError(
                f"{path}: longer than a config can be; name a JSON file with the keys of --help"
            )
        settings = json.loads(text, object_pairs_hook=refuse_duplicates)
    except OSError as error:
        raise UserError(
            f"{path}: cannot read the config ({error.strerror}); name an existing JSON file"
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file; a config is JSON") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(settings, dict):
        raise UserError(f'{path}: a config is one JSON object such as {{"batch_size": 1}}')
    return settings


class OneLineParser(argparse.ArgumentParser):
    """argparse whose errors are UserErrors: one line, exit status 2."""

    def parse_args(self, *arguments: Any, **options: Any) -> Any:
        found = super().parse_args(*arguments, **options)
        # argparse makes an empty list of the value -- in --set=--
        for name, value in vars(found).items():
            if value == [] != self.get_default(name) or (isinstance(value, list) and [] in value):
                self.error(f"--{name.replace('_', '-')} has no value")
        return found

    def error(self, message: str) -> Any:
        raise UserError(f"{message}; see --help")


def complain(error: UserError) -> int:
    """Print the one line of a mistake; returns the exit status."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return error.status
