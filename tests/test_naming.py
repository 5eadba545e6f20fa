"""Data sets as they are found: names that say what belongs together, folders one level too high."""

from __future__ import annotations

import csv
import dataclasses
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_tools import assert_one_line_error, dark_picture, main_with, save_picture, tiny_config
from conftest import ROOT, smooth_scene
from hypothesis import given, settings
from hypothesis import strategies as st

import model_script as ms
from support.naming import HIGH_WORDS, LOW_WORDS, MOST_ENTRIES, listed, match_stems
from support.pairs import find_pairs, source_pairs
from support.settings import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = LOW_WORDS + HIGH_WORDS


def write_files(folder: Path, *names: str) -> Path:
    """Empty files, enough for pairing; returns the folder."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def matched(lows: str, highs: str) -> dict[str, str]:
    return match_stems(lows.split(), highs.split(), "train")[0]


def refused(lows: str, highs: str) -> str:
    with pytest.raises(UserError) as caught:
        match_stems(lows.split(), highs.split(), "train")
    assert "\n" not in str(caught.value) and "; " in str(caught.value)
    return str(caught.value)


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


# words --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lows", "highs"),
    [
        ("low00690 low00691", "normal00690 normal00691"),
        ("low_1 low_2", "high_1 high_2"),
        ("LOW-1 Low-2", "1 2"),
        ("1 2", "1_gt 2_GT"),
        ("1-dark 2dark", "bright1 bright_2"),
        ("castle_input tree_input", "castle_target tree_target"),
        ("lowa lowb", "normala normalb"),
        ("ll_1_1 ll_1_2", "nl_1_1 nl_1_2"),  # frames with targets of their own
        ("low_highway low_highland", "highway highland"),  # "high" begins these names by chance
        ("lowlight_1 lowlight_2", "1 2"),
    ],
)
def test_a_word_that_all_names_of_a_folder_have_is_left_out(lows: str, highs: str) -> None:
    assert matched(lows, highs) == dict(zip(lows.split(), highs.split(), strict=True))


def test_a_word_must_be_a_rule_of_its_folder() -> None:
    assert matched("low1 low2 x", "normal1 normal2 normal3") == {}
    assert matched("low low1", "normal normal1") == {}  # of "low" nothing would be left
    assert matched("slow1 slow2", "1 2") == {}
    assert matched("low1 low2", "normal2 normal3") == {"low2": "normal2"}


@pytest.mark.parametrize(
    ("lows", "highs", "words"),
    [
        ("low1 low_1", "normal1", ["train_low_dir", "low1 and low_1", "normal1"]),
        ("low1", "normal1 normal-1", ["train_high_dir", "normal-1 and normal1", "low1"]),
        ("low_1_dark", "1_dark low_1", ["train_low_dir", 'follows "low"', 'precedes "dark"']),
        ("1_1 1_2", "gt1 gt_1", ["train_high_dir", "gt1 and gt_1"]),
    ],
)
def test_names_that_match_in_two_ways_are_refused(lows: str, highs: str, words: list[str]) -> None:
    error = refused(lows, highs)
    assert all(word in error for word in words), error


def test_equal_stems_always_win() -> None:
    assert matched("low_1 low_2", "low_1 low2") == {"low_1": "low_1"}
    assert matched("low1 low_1 low2", "low1 normal2") == {"low1": "low1"}  # no clash is looked for
    assert matched("12 12_1 12_2", "12") == {"12": "12"}


# scenes -------------------------------------------------------------------------------------------


def test_frames_share_the_target_of_their_scene() -> None:
    assert matched("12_1 12_3 7_1", "12 7") == {"12_1": "12", "12_3": "12", "7_1": "7"}
    assert matched("a-1_2 a-1-3", "a-1 b") == {"a-1_2": "a-1", "a-1-3": "a-1"}
    assert matched("low_12_1 low_12_2", "gt12") == {"low_12_1": "gt12", "low_12_2": "gt12"}
    assert matched("12_1_short 12_2_short", "12_long") == {
        "12_1_short": "12_long",
        "12_2_short": "12_long",
    }
    assert matched("12_a 12_b", "12") == {}


def test_every_frame_needs_a_target() -> None:
    error = refused("1_1 1_2 2_1 x", "1")
    assert "train_low_dir: 2 of 4" in error and "2_1, x" in error
    error = refused(" ".join(f"{scene}_1" for scene in range(9)), "1")
    assert "0_1, 2_1, 3_1, 4_1, 5_1 and 3 more" in error


# properties ---------------------------------------------------------------------------------------

often = settings(max_examples=300, deadline=None, derandomize=True)
cores = st.text(st.sampled_from("01_-aB"), min_size=1, max_size=4)
names = st.tuples(
    *(st.sampled_from(["", "low", "GT_", "-dark", "n"]), cores),
    st.sampled_from(["", "_low", "gt", " Long"]),
).map("".join)
folders = st.sets(names, min_size=1, max_size=6)


def possible_cores(stem: str) -> set[str]:
    """All that can be left of a stem: itself, and without one word; of each the scene, too."""
    word = "|".join(WORDS)
    shorter = [
        re.sub(f"^({word})[-_ ]?", "", stem, count=1, flags=re.I),
        re.sub(f"[-_ ]?({word})$", "", stem, count=1, flags=re.I),
    ]
    shorter += [stem[len(w) :] for w in WORDS if stem.lower().startswith(w)]
    shorter += [stem[: -len(w)] for w in WORDS if stem.lower().endswith(w)]
    return {stem, *shorter, *(text[1:] for text in shorter), *(text[:-1] for text in shorter)}


@often
@given(lows=folders, highs=folders)
def test_pairing_is_a_function_of_the_names(lows: set[str], highs: set[str]) -> None:
    def outcome(order: Callable[[set[str]], list[str]]) -> object:
        try:
            return match_stems(order(lows), order(highs), "eval")
        except UserError as error:
            assert str(error).startswith(("eval_low_dir: ", "eval_high_dir: "))
            return str(error)

    found = outcome(sorted)
    assert found == outcome(lambda folder: sorted(folder, reverse=True))
    if isinstance(found, str):
        assert not lows & highs
        return
    assert isinstance(found, tuple)
    partners = found[0]
    assert partners.keys() <= lows and set(partners.values()) <= highs
    if lows & highs:
        assert partners == {stem: stem for stem in lows & highs}
        return
    by_scene = "frames" in found[1]
    assert by_scene or len(set(partners.values())) == len(partners)
    assert not (by_scene and partners.keys() != lows)
    for low, high in partners.items():
        left = possible_cores(low)
        if by_scene:
            left = {re.sub(r"[_-]\d+$", "", core) for core in left}
        assert left & possible_cores(high), (low, high)


@often
@given(
    stems=st.sets(cores, min_size=1, max_size=8),
    words=st.tuples(st.sampled_from(LOW_WORDS), st.sampled_from(HIGH_WORDS)),
    ends=st.tuples(st.booleans(), st.booleans()),
    separator=st.sampled_from(["_", "-", " "]),
    upper=st.booleans(),
)
def test_every_word_at_either_end_pairs_equal_cores(
    stems: set[str], words: tuple[str, str], ends: tuple[bool, bool], separator: str, upper: bool
) -> None:
    def named(core: str, side: int) -> str:
        word = words[side].upper() if upper else words[side]
        return f"{core}{separator}{word}" if ends[side] else f"{word}{separator}{core}"

    expected = {named(core, 0): named(core, 1) for core in stems}
    assert match_stems(expected.keys(), expected.values(), "train")[0] == expected


# layouts, from the command line -------------------------------------------------------------------

LOW_STEMS = ["1_1", "1_2", "2_1", "2_3", "3_1"]
LAYOUTS = {  # low folder, high folder, [(low file, high file)], what is said
    "ELIEI": ("train/low", "train/high", [(f"{n}.png", f"{n}.png") for n in (1, 2, 30)], ""),
    "LOL-v1": ("our485/low", "our485/high", [(f"{n}.png", f"{n}.png") for n in (2, 5, 6)], ""),
    "LOL-v2": (
        *("Real_captured/Train/Low", "Real_captured/Train/Normal"),
        [(f"low0069{n}.png", f"normal0069{n}.png") for n in range(3)],
        'paired low00690 with normal00690 by what follows "low" and "normal"',
    ),
    "SICE": (
        *("low", "high"),
        [(f"{stem}.jpg", f"{stem[0]}.JPG") for stem in LOW_STEMS],
        "paired 1_1 with 1 by the scene; the last number is a frame's",
    ),
    "other suffixes": ("low", "high", [(f"{n}.png", f"{n}_gt.jpg") for n in (1, 2, 3)], '"gt"'),
}


def lay_out(folder: Path, layout: str) -> tuple[Path, Path, list[str]]:
    """A tiny data set; returns its two folders and the names of the dark pictures."""
    low, high, files, _ = LAYOUTS[layout]
    targets = sorted({target for _, target in files})
    for dark, target in files:
        scene = smooth_scene(targets.index(target), 40, 48)
        save_picture(folder / low / dark, dark_picture(scene))
        save_picture(folder / high / target, scene)
    return folder / low, folder / high, [dark for dark, _ in files]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_data_set_trains_and_evaluates_as_unpacked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: str
) -> None:
    low, high, files = lay_out(tmp_path / layout, layout)
    settings = tiny_config(tmp_path, num_epochs=1, val_low_dir="", val_high_dir="")
    for kind in ("train", "eval"):
        settings |= {f"{kind}_low_dir": str(low), f"{kind}_high_dir": str(high)}
    assert main_with("train", settings) == 0
    said = capsys.readouterr().out
    assert LAYOUTS[layout][3] in said and ("paired" in said) == bool(LAYOUTS[layout][3])
    assert "no partner" not in said
    best = tmp_path / "ckpt" / "best_model.pth"
    assert main_with("evaluate", settings, "--checkpoint", best) == 0
    (metrics,) = (tmp_path / "results").glob("eval_*/metrics.csv")
    assert [row["filename"] for row in csv.DictReader(metrics.open())] == files
    assert all((metrics.parent / "images" / f"{Path(name).stem}.png").exists() for name in files)
    # scenes go by the stems of the dark pictures
    last = Path(files[-1]).stem
    assert main_with("evaluate", settings, "--checkpoint", best, "--set", f"scenes={last}") == 0
    newest = max((tmp_path / "results").glob("eval_*/metrics.csv"))
    assert [row["filename"] for row in csv.DictReader(newest.open())] == [files[-1]]


def test_two_lows_of_one_name_are_one_line_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    low, high, _ = lay_out(tmp_path, "LOL-v2")
    (low / "low_00690.png").write_bytes((low / "low00690.png").read_bytes())
    status = ms.main(["--mode", "train", f"--train_low_dir={low}", f"--train_high_dir={high}"])
    words = ("train_low_dir", "low00690 and low_00690", "normal00690")
    assert_one_line_error(status, capsys.readouterr().err, *words)


def test_sources_pair_by_the_same_rules_and_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_files(tmp_path, "a/Low/low1.png", "a/Low/low2.png", "a/Normal/normal1.png")
    empty = dict(val_low_dir="", val_high_dir="", share=1.0)
    source = dict(name="v2", low_dir=f"{tmp_path}/a/Low", high_dir=f"{tmp_path}/a/Normal", **empty)
    (pair,), none = source_pairs([source], 0)
    assert pair.name == "v2/low1" and pair.high.name == "normal1.png" and none == []
    said = capsys.readouterr().out
    assert 'v2: train: paired low1 with normal1 by what follows "low" and "normal"' in said
    assert "v2: train: 1 pictures" in said and "low2.png" in said
    with pytest.raises(UserError, match=r"^sources: v2: .*did you mean .*/a/Low\?"):
        source_pairs([source | dict(low_dir=f"{tmp_path}/a")], 0)
    write_files(tmp_path, "a/Low/low_1.png")
    with pytest.raises(UserError, match=r"^sources: v2: .*low1 and low_1.*; keep or rename"):
        source_pairs([source], 0)
    with pytest.raises(UserError, match=r"^sources: v2: .*none'; mend its folders$"):
        source_pairs([source | dict(high_dir="none")], 0)


# one level too high -------------------------------------------------------------------------------


def told(low: Path | str, high: Path | str, kind: str = "train") -> str:
    with pytest.raises(UserError) as caught:
        find_pairs(str(low), str(high), kind)
    return str(caught.value)


def test_a_folder_one_level_too_high_names_the_right_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_files(Path("our485"), "low/1.png", "high/1.png", "notes.txt", ".git/x.png")
    error = "train_low_dir: no pictures in 'our485'; did you mean our485/low?"
    assert told("our485", "our485/high") == error
    error = "val_high_dir: no pictures in 'our485'; did you mean our485/high?"
    assert told("our485/low", "our485", "val") == error
    write_files(Path("eval15"), "low/1.png", "high/1.png")
    write_files(Path("LOL"), "our485/low/1.png", "our485/high/1.png", "eval15/low/2.JPG")
    assert told("LOL", "LOL").endswith("did you mean one of LOL/eval15/low, LOL/our485/low?")


def test_a_folder_of_unknown_names_is_named_and_the_targets_are_not(tmp_path: Path) -> None:
    write_files(tmp_path, "all/evening/1.png", "all/normal/1.png", "high/1.png", "deep/1/2/3/a.png")
    assert told(tmp_path / "all", tmp_path / "high").endswith(f"mean {tmp_path}/all/evening?")
    assert told(tmp_path / "deep", tmp_path / "high").endswith("; name the folder that holds them")
    many = write_files(tmp_path / "many", *(f"{n}/a.png" for n in range(9)))
    assert told(many, tmp_path / "high").endswith("/4 and 4 more?")


def test_a_huge_tree_is_not_walked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(2 * MOST_ENTRIES):
        (tmp_path / "tree" / f"{number}" / "below").mkdir(parents=True)
    write_files(tmp_path, "high/1.png")
    (tmp_path / "tree" / "0" / "loop").symlink_to(tmp_path / "tree")
    looked: list[str] = []
    scan = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: looked.append(str(path)) or scan(path))
    started = time.process_time()
    assert told(tmp_path / "tree", tmp_path / "high").endswith("; name the folder that holds them")
    assert len(looked) <= MOST_ENTRIES + 9 and time.process_time() - started < 2


@pytest.mark.parametrize("mode", ["train", "evaluate"])
def test_the_command_line_says_it_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str
) -> None:
    low, high, _ = lay_out(tmp_path, "LOL-v1")
    kind = mode.removesuffix("uate")
    folders = [f"--{kind}_low_dir={low.parent}", f"--{kind}_high_dir={high}"]
    status = ms.main(["--mode", mode, *folders, f"--results_dir={tmp_path / 'r'}"])
    errors = capsys.readouterr().err
    assert_one_line_error(status, errors, f"{kind}_low_dir", f"did you mean {low}?")


# the documentation -------------------------------------------------------------------------------


def test_the_settings_of_the_documented_data_sets_are_keys() -> None:
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("|") and "_dir=" in line]
    known = {key.name for kind in (ms.Config, ms.Use) for key in dataclasses.fields(kind)}
    named = [re.findall(r"`(\w+)=[^`\s]+`", row) for row in rows]
    assert len(rows) == 5 and {key for keys in named for key in keys} <= known
    assert {len(keys) for keys in named} == {4}
