"""What holds for every config, pair of folders and picture; hypothesis looks for exceptions."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from cli_tools import parsed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from odd_pictures import EXIF_TURNS, encoded, exif_of, png, tiff

import model_script as ms
from support.decoding import SUFFIXES, Picture, read_image, read_picture
from support.pairs import find_pairs
from support.pictures import encode_picture
from support.settings import UserError, assignments, read_config_file, read_settings

KINDS = (ms.Config, ms.Use)
FIELDS = {key.name: key for kind in KINDS for key in dataclasses.fields(kind)}
often = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
seldom = settings(often, max_examples=60)

# configs ------------------------------------------------------------------------------------------

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


def source(name: str, share: float) -> dict[str, Any]:
    """An object of `sources` as it is after reading."""
    folders = {f"{kind}_dir": name for kind in ("low", "high", "val_low", "val_high")}
    return {"name": name, "share": share, "darken": 0.5, **folders}


def right_value(key: dataclasses.Field) -> st.SearchStrategy[Any]:
    """Values that a key allows."""
    low, high, choices = (key.metadata[name] for name in ("low", "high", "choices"))
    if choices:
        return st.sampled_from(choices)
    if key.type == "bool":
        return st.booleans()
    if key.type == "str":
        return st.text(
            st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12
        )
    if key.type == "list[dict]":
        name = st.text("abc", min_size=1, max_size=3)
        share = st.floats(1e-3, 1e6)
        return st.lists(st.builds(source, name, share), max_size=3, unique_by=lambda s: s["name"])
    number = st.integers(low, high) if "int" in key.type else st.floats(low, high)
    return st.lists(number, min_size=1, max_size=4) if key.type.startswith("list") else number


right_settings = st.sets(st.sampled_from(sorted(FIELDS)), max_size=6).flatmap(
    lambda names: st.fixed_dictionaries({name: right_value(FIELDS[name]) for name in names})
)


def is_right(key: dataclasses.Field, value: Any) -> bool:
    """Whether `value` is what the key's documentation promises."""
    kinds = {
        "int": int,
        "float": float,
        "bool": bool,
        "str": str,
        "list[int]": int,
        "list[float]": float,
        "list[dict]": dict,
    }
    items = value if key.type.startswith("list") else [value]
    low, high, choices = (key.metadata[name] for name in ("low", "high", "choices"))
    typed = all(type(item) is kinds[key.type] for item in items) and len(items) > 0
    if key.type == "list[dict]":
        return value == [] or all(type(item) is dict and item["name"] for item in value)
    return typed and all(
        (low is None or low <= item <= high) and (not choices or item in choices) for item in items
    )


def as_text(value: Any) -> str:
    """A value as it is typed after --set KEY=."""
    items = value if isinstance(value, list) else [value]
    return ",".join(item if isinstance(item, str) else json.dumps(item) for item in items)


@often
@given(name=st.sampled_from(sorted(FIELDS)), value=anything)
def test_any_value_of_any_key_is_typed_or_refused_by_name(name: str, value: Any) -> None:
    try:
        typed = read_settings(KINDS, {name: value}, "here")[name]
    except UserError as error:
        text = str(error)
        option = f"--{name.replace('_', '-')}"
        starts = (f"here: {name} must be ", f"here: {option} has", "here: sources: ")
        assert text.startswith(starts)
        assert len(text) < 400
    else:
        assert is_right(FIELDS[name], typed)
        # nothing is guessed: the same again, or what its text means
        assert (
            typed == value
            or name == "sources"
            or read_settings(KINDS, {name: as_text(value)}, "here")[name] == typed
        )
        assert value is not None and not isinstance(value, dict)


@often
@given(chosen=right_settings)
def test_right_settings_come_through_a_file_and_through_set(chosen: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c.json"
        path.write_text(json.dumps(chosen))
        typed = read_settings(KINDS, read_config_file(str(path)), "here")
    assert typed == chosen
    assert all(is_right(FIELDS[name], value) for name, value in typed.items())
    texts = [
        f"{name}={value if isinstance(value, str) else json.dumps(value)}"
        for name, value in chosen.items()
    ]
    assert read_settings(KINDS, assignments(texts), "--set") == chosen


@often
@given(
    content=st.binary(max_size=60)
    | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass"))
)
def test_any_file_is_a_table_of_settings_or_is_refused_by_name(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c.json"
        path.write_bytes(content)
        try:
            assert isinstance(read_config_file(str(path)), dict)
        except UserError as error:
            assert str(path) in str(error)


@often
@given(
    text=st.text(max_size=30)
    | st.tuples(st.sampled_from(sorted(FIELDS)), st.text(max_size=12)).map("=".join)
)
def test_any_set_is_typed_or_refused(text: str) -> None:
    try:
        found = parsed(["--mode", "train", f"--set={text}"]).settings
    except UserError:
        return
    ((name, value),) = found.items()
    assert text.startswith(f"{name}=") and is_right(FIELDS[name], value)


@pytest.mark.parametrize(
    "option", ["mode", "config", "set", "checkpoint", "resume", "input", "output"]
)
def test_two_dashes_are_no_value(option: str) -> None:
    """argparse drops them and hands on an empty list."""
    with pytest.raises(UserError, match=f"--{option}"):
        parsed(["--mode", "train", f"--{option}=--"])


@pytest.mark.parametrize(
    "key", ["batch_size", "image_size", "device", "flips", "sources", "nonsense"]
)
def test_values_nested_to_any_depth_are_refused(tmp_path: Path, key: str) -> None:
    """Reading one may just work where showing it in the message would go one level too deep."""
    path = tmp_path / "c.json"
    for depth in [*range(700, 1050, 7), 5000, 100_000]:
        nested = f"{'[' * depth}{']' * depth}"
        path.write_text(f'{{"{key}": {nested}}}')
        with pytest.raises(UserError):
            read_settings(KINDS, read_config_file(str(path)), "here")
        with pytest.raises(UserError):
            read_settings(KINDS, {key: nested}, "--set")


def test_messages_stay_short() -> None:
    endless: list[Any] = []
    endless.append(endless)
    laughs: list[Any] = ["ha"]
    for _ in range(60):
        laughs = [laughs, laughs]
    for value in (
        endless,
        laughs,
        {(1, 2): 3},
        "x" * 10**6,
        [1] * 10**6,
        10**4000,
        10**6000,
        {"a": {1j}},
        b"bytes",
        1j,
    ):
        with pytest.raises(UserError, match="batch_size must be an integer") as caught:
            read_settings(KINDS, {"batch_size": value}, "here")
        assert len(str(caught.value)) < 200
        with pytest.raises(UserError, match="here: sources"):
            read_settings(KINDS, {"sources": value}, "here")
    with pytest.raises(UserError, match="unknown key") as caught:
        read_settings(KINDS, {"batch_size" * 10**5: 1}, "here")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("text", ["a\0b", "\ud800"])
@pytest.mark.parametrize("key", ["checkpoint_dir", "train_low_dir", "reference"])
def test_texts_that_cannot_name_a_file_are_refused(key: str, text: str) -> None:
    with pytest.raises(UserError, match=f"here: {key} must be a text"):
        read_settings(KINDS, {key: text}, "here")


def test_a_config_without_end_is_refused_at_once(tmp_path: Path) -> None:
    many = tmp_path / "many.json"
    many.write_text(json.dumps({str(number): number for number in range(50_000)}))
    started = time.process_time()
    assert len(read_config_file(str(many))) == 50_000
    many.write_text(many.read_text() * 2)
    for path in (many, Path("/dev/zero")):
        with pytest.raises(UserError, match="longer than a config can be"):
            read_config_file(str(path))
    assert time.process_time() - started < 2


# pairs --------------------------------------------------------------------------------------------

stems = st.text(st.sampled_from("019aB²٣é _-.\n\udcff"), min_size=1, max_size=5)
names = st.tuples(
    stems, st.sampled_from([".png", ".PNG", ".jpg", ".tiff", ".webp", ".txt", ""])
).map("".join)
folders = st.sets(names.filter(lambda name: name not in (".", "..")), max_size=9)


def wanted(files: set[str]) -> dict[str, list[str]]:
    """Stem -> the pictures of that stem, as the documentation says."""
    found: dict[str, list[str]] = {}
    for name in files:
        if Path(name).suffix.lower() in SUFFIXES and not name.startswith("."):
            found.setdefault(Path(name).stem, []).append(name)
    return found


@often
@given(lows=folders, highs=folders, common=folders)
def test_pairs_are_the_common_stems_and_every_other_picture_is_named(
    lows: set[str], highs: set[str], common: set[str]
) -> None:
    lows, highs, messages = lows | common, highs | common, []
    with tempfile.TemporaryDirectory() as root:
        for kind, files in (("low", lows), ("high", highs)):
            os.mkdir(f"{root}/{kind}")
            for name in files:
                Path(root, kind, name).touch()
        twice = any(len(same) > 1 for files in (lows, highs) for same in wanted(files).values())
        both = wanted(lows).keys() & wanted(highs).keys()
        try:
            pairs = find_pairs(f"{root}/low", f"{root}/high", "eval", messages.append)
        except UserError as error:
            assert twice or not both
            assert ("same stem" in str(error)) == twice
            return
    assert not twice
    if not both:  # then the lows are frames, and every one of them has the target of its scene
        assert {pair.name for pair in pairs} == wanted(lows).keys()
        assert all(re.split(r"[_-]\d+$", p.name)[0] == p.high.stem != p.name for p in pairs)
        return
    assert {pair.name for pair in pairs} == both and len(pairs) == len(both)
    assert all(
        pair.low.name in lows and pair.high.name in highs and pair.low.stem == pair.high.stem
        for pair in pairs
    )
    numbers = [int(pair.name) for pair in pairs if pair.name.isdecimal()]
    assert numbers == sorted(numbers)
    orphans = [wanted(files).keys() - both for files in (lows, highs)]
    told = [
        (message, alone) for message, alone in zip(messages, filter(None, orphans), strict=True)
    ]
    for message, alone in told:
        assert f" {len(alone)} pictures" in message
        assert message.endswith(f" and {len(alone) - 5} more") == (len(alone) > 5)
        assert sum(f" {stem}." in message for stem in alone) >= min(len(alone), 5)


# pictures -----------------------------------------------------------------------------------------


class Case(NamedTuple):
    """A file, the pixels as it stores them (H, W, C), and what EXIF says of them."""

    suffix: str
    data: bytes
    stored: np.ndarray
    orientation: int

    def __repr__(self) -> str:
        return (
            f"{self.suffix} {self.stored.shape} {self.stored.dtype} orientation {self.orientation}"
            f" {self.data[:9]!r}"
        )


@st.composite
def pictures(draw: st.DrawFn) -> Case:
    """Noise of every depth and number of channels that a lossless format can hold."""
    suffix, deep = draw(st.sampled_from(["png", "tif", "bmp", "webp"])), draw(st.booleans())
    channels = draw(st.sampled_from({"bmp": [3], "webp": [3, 4]}.get(suffix, [1, 3, 4])))
    depth = np.uint16 if deep and suffix in ("png", "tif") else np.uint8
    shape = (draw(st.integers(16, 40)), draw(st.integers(16, 40)), channels)
    noise = np.random.default_rng(draw(st.integers(0, 99)))
    pixels = noise.integers(0, np.iinfo(depth).max, shape, dtype=depth, endpoint=True)
    orientation = draw(st.integers(1, 8))
    flat = pixels[..., 0] if channels == 1 else pixels
    if suffix == "tif":
        options: dict[str, Any] = dict(
            extratags=[(274, 3, 1, orientation, True)], byteorder=draw(st.sampled_from("<>"))
        )
        options |= dict(
            photometric="rgb" if channels > 1 else "minisblack",
            compression=draw(st.sampled_from([None, "zlib"])),
        )
        options |= dict(rowsperstrip=draw(st.sampled_from([None, 1, 7]))) | (
            {"tile": (16, 16)} if draw(st.booleans()) else {}
        )
        options |= dict(extrasamples=["unassalpha"]) if channels == 4 else {}
        return Case(suffix, tiff(flat, metadata=None, **options), pixels, orientation)
    if suffix == "bmp" or depth == np.uint16:
        data = (
            png(pixels, interlaced=draw(st.booleans()))
            if suffix == "png"
            else encoded(flat, suffix)
        )
        return Case(suffix, data, pixels, 1)
    options = dict(lossless=True, exact=True) if suffix == "webp" else {}
    return Case(
        suffix, encoded(flat, suffix, exif=exif_of(orientation), **options), pixels, orientation
    )


@seldom
@given(case=pictures())
def test_every_lossless_picture_is_read_to_the_last_bit(case: Case) -> None:
    upright = EXIF_TURNS.get(case.orientation, np.asarray)(case.stored)
    colours = np.repeat(upright, 3, axis=2) if upright.shape[2] == 1 else upright[..., :3]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a.{case.suffix}"
        path.write_bytes(case.data)
        picture, plain = read_picture(path), read_image(path)
    np.testing.assert_array_equal(picture.pixels, colours)
    assert picture.pixels.dtype == case.stored.dtype
    assert (picture.alpha is not None) == (case.stored.shape[2] == 4)
    if picture.alpha is not None:
        np.testing.assert_array_equal(picture.alpha, upright[..., 3])
    assert np.abs(plain - colours / (257 if case.stored.dtype == np.uint16 else 1)).max() <= 1
    assert read_picture(io.BytesIO(case.data)).pixels.tobytes() == picture.pixels.tobytes()


@seldom
@given(case=pictures(), suffix=st.sampled_from([".png", ".tif", ".webp", ".jpg", ".bmp"]))
def test_what_is_written_is_what_is_read_again(case: Case, suffix: str) -> None:
    picture = read_picture(io.BytesIO(case.data))
    deep = picture.pixels.dtype == np.uint16 and suffix in (".png", ".tif")
    pixels = (
        picture.pixels
        if deep or picture.pixels.dtype == np.uint8
        else (picture.pixels >> 8).astype(np.uint8)
    )
    read = read_picture(io.BytesIO(encode_picture(pixels, suffix, picture)))
    assert read.pixels.shape == pixels.shape and read.pixels.dtype == pixels.dtype
    assert (read.alpha is not None) == (
        picture.alpha is not None and suffix not in (".jpg", ".bmp")
    )
    if suffix in (".png", ".tif", ".bmp"):
        np.testing.assert_array_equal(read.pixels, pixels)


@seldom
@given(
    case=pictures(),
    damage=st.lists(st.tuples(st.integers(0, 999), st.binary(max_size=4)), max_size=4),
    cut=st.integers(0, 40),
)
def test_a_damaged_picture_is_refused_by_name_or_whole(
    case: Case, damage: list[tuple[int, bytes]], cut: int
) -> None:
    data = bytearray(case.data)
    for place, new in damage:
        data[place % len(data) : place % len(data) + len(new)] = new
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a.{case.suffix}"
        path.write_bytes(data[: len(data) - cut])
        for read in (read_picture, read_image):
            try:
                found = read(path)
            except UserError as error:
                assert str(path) in str(error) and "\n" not in str(error)
                continue
            picture = found if isinstance(found, Picture) else Picture(found)
            assert picture.pixels.shape[2] == 3 and picture.pixels.dtype in (np.uint8, np.uint16)
            assert picture.alpha is None or (picture.alpha.shape, picture.alpha.dtype) == (
                picture.pixels.shape[:2],
                picture.pixels.dtype,
            )
