"""Settings: documented dataclass fields, and one parser for JSON, --set and checkpoints."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

LONGEST_CONFIG = 1_000_000  # characters
Settings = TypeVar("Settings")


class UserError(Exception):
    """A mistake the user can mend. Its text is the one line that the command line prints."""

    status = 2


class RunError(UserError):
    """A run that failed although its input was fine (a loss that diverged, say)."""

    status = 1


def complain(error: UserError) -> int:
    """Print the one line of a mistake; returns the exit status."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return error.status


def knob(
    default: Any,
    meaning: str,
    low: float | None = None,
    high: float | None = None,
    *,
    choices: Sequence[str] | None = None,
    architecture: bool = False,
) -> Any:
    """A dataclass field with its meaning, its range, and whether it shapes the network."""
    metadata = dict(meaning=meaning, low=low, high=high, choices=choices, architecture=architecture)
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def allowed(key: dataclasses.Field) -> str:
    """The values a key may take, in words."""
    low, high, choices = key.metadata["low"], key.metadata["high"], key.metadata["choices"]
    if choices:
        return "one of " + ", ".join(choices)
    words = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "a text"}
    words |= {"list[int]": "a list of integers", "list[float]": "a list of numbers"}
    words["list[dict]"] = "a list of objects"
    return words[str(key.type)] + (f" in [{low:g}, {high:g}]" if low is not None else "")


def is_text(value: Any) -> bool:
    """Whether `value` is a text that could name a file: no null byte, no half of a character."""
    with suppress(UnicodeEncodeError):
        return isinstance(value, str) and b"\0" not in os.fsencode(value)
    return False


def is_scalar(value: Any) -> bool:
    """Whether `value` is a text or a number that Python will print: it refuses endless integers,
    which a pickle can hold."""
    return isinstance(value, (str, float)) or (isinstance(value, int) and value.bit_length() < 9999)


def shown(value: Any) -> str:
    """A value as JSON in at most 80 characters; anything that could be endless, by its type."""
    items = value if isinstance(value, list) else [value]
    plain = len(items) < 10 and all(item is None or is_scalar(item) for item in items)
    text = json.dumps(value) if plain else f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def read_value(key: dataclasses.Field, text: str) -> Any:
    """`text` as the type of `key`. Raises ArgumentTypeError where it is not allowed."""
    kind, choices = str(key.type), key.metadata["choices"]

    def number(part: str) -> Any:
        value = float(part)
        if not key.metadata["low"] <= value <= key.metadata["high"]:  # false for NaN
            raise ValueError
        if "int" in kind and not value.is_integer():
            raise ValueError
        return int(value) if "int" in kind else value

    try:
        if kind == "str":
            if not is_text(text) or (choices and text not in choices):
                raise ValueError
            return text
        if kind == "bool":
            return {"true": True, "false": False}[text.lower()]
        if kind == "list[dict]":
            return typed_sources(json.loads(text), key.name)
        if kind.startswith("list"):
            return [number(part) for part in text.strip("[]").split(",")]
        return number(text)
    except (ValueError, KeyError):
        got = shown(text) if kind == "str" else text[:77]
        raise argparse.ArgumentTypeError(f"must be {allowed(key)}, got {got}") from None


SOURCE_KEYS: dict[str, Any] = {  # of an object in `sources`; None: must be given
    **{"name": None, "low_dir": None, "high_dir": None},
    **{"share": 1.0, "val_low_dir": "", "val_high_dir": "", "darken": 0.0},
}


def typed_sources(value: Any, where: str) -> list[dict[str, Any]]:
    """`value` as a list of objects with all SOURCE_KEYS. Raises UserError that begins with
    `where`."""
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise UserError(
            f"{where} must be a list of objects with {', '.join(SOURCE_KEYS)}, got {shown(value)}"
        )
    names = [shown(item.get("name")) for item in value]
    for name, item in zip(names, value, strict=True):
        for key in item.keys() - SOURCE_KEYS.keys():
            raise UserError(
                f"{where}: unknown key {shown(key)} in {name}; it takes {', '.join(SOURCE_KEYS)}"
            )
        for key, default in SOURCE_KEYS.items():
            given = item.get(key, default)
            if isinstance(default, float):
                top = 1e6 if key == "share" else 1.0
                good = (
                    isinstance(given, (int, float))
                    and not isinstance(given, bool)
                    and 0 <= given <= top
                )
            else:
                good = is_text(given) and (default == "" or given != "")
            if not good or (key == "name" and "/" in given):
                raise UserError(f"{where}: {key} of {name} cannot be {shown(given)}")
        if bool(item.get("val_low_dir")) != bool(item.get("val_high_dir")):
            raise UserError(
                f"{where}: val_low_dir and val_high_dir of {name} must be given together"
            )
    if len(set(names)) < len(names):
        raise UserError(f"{where}: two have one name")
    found = [
        {key: item.get(key, default) for key, default in SOURCE_KEYS.items()} for item in value
    ]
    if found and not (
        any(item["share"] for item in found) and any(item["val_low_dir"] for item in found)
    ):
        raise UserError(f"{where}: one share must be above 0 and one val_low_dir be given")
    return found


def read_size(name: str, text: str) -> tuple[int, int] | None:
    """(height, width) of a text such as '128,128'; None for native and auto. Raises UserError."""
    if text in ("auto", "native"):
        return None
    sides = re.fullmatch(r"\[? *(\d{2,4}) *, *(\d{2,4}) *\]?", text, re.ASCII)
    height, width = (int(side) for side in sides.groups()) if sides else (0, 0)
    if not (16 <= height <= 8192 and 16 <= width <= 8192):
        hint = "auto, native or height,width in [16, 8192]"
        raise UserError(f"{name} must be {hint}, got {text!r}")
    return height, width


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


def key_parser(kinds: Sequence[type], unused: Sequence[str] = ()) -> OneLineParser:
    """A parser with an option for every field of the dataclasses; its help describes them."""
    parser = OneLineParser(
        prog="", usage=argparse.SUPPRESS, add_help=False, argument_default=argparse.SUPPRESS
    )
    for kind in kinds:
        title, note = kind.__name__, (kind.__doc__ or "").split("\n")[0]
        group = parser.add_argument_group(title, note.replace("%", "%%"))
        for key in dataclasses.fields(kind):
            if key.name in unused:
                continue
            made = key.default_factory
            default = key.default if made is dataclasses.MISSING else made()
            text = f"{key.metadata['meaning']} ({allowed(key)}; default {json.dumps(default)})"
            group.add_argument(
                f"--{key.name}",
                metavar="VALUE",
                type=functools.partial(read_value, key),
                help=text.replace("%", "%%"),
            )
    return parser


def read_settings(kinds: Sequence[type], given: Mapping[str, Any], source: str) -> dict[str, Any]:
    """`given`, name to JSON value or text, as the types of the dataclasses' fields.

    `source` names where it came from. Raises UserError for an unknown key or a value that is not
    allowed.
    """
    keys = {key.name: key for kind in kinds for key in dataclasses.fields(kind)}
    tokens, objects = [], {}
    for name, value in given.items():
        if name not in keys:
            nearest = difflib.get_close_matches(name[:80], keys, n=1, cutoff=0.0)[0]
            hint = f"the nearest is {nearest} ({allowed(keys[nearest])})"
            raise UserError(f"{source}: unknown key {name[:80]}; {hint}")
        parts = value if isinstance(value, list) else [value]
        kind = str(keys[name].type)
        if kind == "list[dict]":  # objects: a text is their JSON
            with suppress(ValueError, RecursionError):
                value = json.loads(value) if isinstance(value, str) else value
            objects[name] = typed_sources(value, f"{source}: {name}")
            continue
        # bool is an int; whatever else a file may hold, or a list for a number, is no value
        if not all(map(is_scalar, parts)) or (
            isinstance(value, list) and not kind.startswith("list")
        ):
            problem = f"{name} must be {allowed(keys[name])}, got {shown(value)}"
            raise UserError(f"{source}: {problem}")
        words = [part if isinstance(part, str) else json.dumps(part) for part in parts]
        tokens.append(f"--{name}={','.join(words)}")
    try:
        return vars(key_parser(kinds).parse_args(tokens)) | objects
    except UserError as error:
        problem = re.sub(r"^argument --(\w+): ", r"\1 ", str(error)).removesuffix("; see --help")
        raise UserError(f"{source}: {problem}") from None


def assignments(texts: Sequence[str]) -> dict[str, str]:
    """{'batch_size': '4'} of ['batch_size=4'], the words after --set. Raises UserError."""
    for text in texts:
        if "=" not in text:
            raise UserError(f"--set {text}: write KEY=VALUE, for example --set batch_size=4")
    return dict(text.split("=", 1) for text in texts)


def build(kind: type[Settings], settings: Mapping[str, Any], source: str) -> Settings:
    """A dataclass of those of `settings` that are its fields. Raises UserError."""
    names = {key.name for key in dataclasses.fields(kind)}  # type: ignore[arg-type]
    try:
        return kind(**{name: value for name, value in settings.items() if name in names})
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def read_config_file(path: str) -> dict[str, Any]:
    """The settings of a JSON config file, unchecked. Raises UserError."""

    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise UserError(f"{path}: key {name[:80]} is given twice; keep one")
            found[name] = value
        return found

    try:
        with open(path, encoding="utf-8") as stream:
            text = stream.read(LONGEST_CONFIG + 1)
        if len(text) > LONGEST_CONFIG:
            raise UserError(f"{path}: longer than a config can be; name a JSON file of settings")
        settings = json.loads(text, object_pairs_hook=refuse_duplicates)
    except OSError as error:
        hint = "name an existing JSON file"
        raise UserError(f"{path}: cannot read the config ({error.strerror}); {hint}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file; a config is JSON") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(settings, dict):
        raise UserError(f'{path}: a config is one JSON object such as {{"batch_size": 1}}')
    return settings


def read_all(
    kinds: Sequence[type], config_file: str | None, assigned: Sequence[str], unused: Sequence[str]
) -> dict[str, Any]:
    """The settings of the config file, and over them those of --set. Raises UserError.

    `unused` keys, which do nothing in this system, are taken from a file but not from --set.
    """
    source = config_file or "config"
    found = read_config_file(config_file) if config_file else {}
    found = read_settings(kinds, found, source)
    own = assignments(assigned)
    for name in unused:
        found.pop(name, None)  # a config file may be for several systems
        if name in own:
            raise UserError(f"--set {name}: changes nothing in this system; leave it out")
    found |= read_settings(kinds, own, "--set")
    for kind in kinds:
        build(kind, found, "--set" if own else source)
    return found
