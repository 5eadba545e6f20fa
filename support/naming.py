"""Naming: what the names of files and folders say about which pictures belong together."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from support.decoding import SUFFIXES
from support.settings import UserError

# words by which data sets tell their two sides apart, in names of files and of folders
LOW_WORDS = ("low", "lowlight", "dark", "input", "short", "ll", "lq")
HIGH_WORDS = ("high", "normal", "bright", "gt", "target", "label", "ref", "long", "nl", "hq")
SEPARATORS = ("_", "-", " ")
MOST_NAMES = 5  # that a message lists
MOST_ENTRIES = 300  # of folders that are looked at for a better one


def listed(names: Sequence[str]) -> str:
    """The first five names and how many more there are."""
    shown = ", ".join(names[:MOST_NAMES])
    return shown + (f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else "")


class Rule(NamedTuple):
    """A word at the start or at the end of every stem of a folder; no word: the stems as they
    are."""

    word: str = ""
    at_end: bool = False

    def core(self, stem: str) -> str:
        """What is left of `stem` without the word and one separator; empty where the word is not
        there or nothing is left."""
        size = len(self.word)
        if not self.word:
            return stem
        word, rest = (stem[-size:], stem[:-size]) if self.at_end else (stem[:size], stem[size:])
        if word.lower() != self.word:
            return ""
        if self.at_end:
            return rest[:-1] if rest.endswith(SEPARATORS) else rest
        return rest[1:] if rest.startswith(SEPARATORS) else rest


RULES = (Rule(), *(Rule(word, end) for word in LOW_WORDS + HIGH_WORDS for end in (False, True)))


def readings(stems: Collection[str]) -> list[tuple[Rule, dict[str, list[str]]]]:
    """Every rule that all stems of a folder follow, with {core: its stems}."""
    found = []
    for rule in RULES:
        cores: dict[str, list[str]] = {}
        for stem in sorted(stems):
            cores.setdefault(rule.core(stem), []).append(stem)
        if "" not in cores:
            found.append((rule, cores))
    return found


def scene_of(core: str) -> str:
    """'12' of '12_3' and '12-3': the scene before the number of a frame; empty without one."""
    found = re.fullmatch(r"(.+)[_-]\d+", core, re.DOTALL)
    return found[1] if found else ""


def in_words(rules: Sequence[Rule], by_scene: bool) -> str:
    """How the names of two folders were matched, for the end of a sentence."""
    used = [rule for rule in rules if rule.word]
    words = " and ".join(dict.fromkeys(f'"{rule.word}"' for rule in used))
    ends = {rule.at_end for rule in used}
    verb = "is left without" if len(ends) > 1 else "precedes" if True in ends else "follows"
    text = f"by what {verb} {words}" if used else "by the scene"
    frames = "; the last number is a frame's, and the frames of a scene share its target"
    return text + (frames if by_scene else "")


def match_stems(
    lows: Collection[str], highs: Collection[str], kind: str
) -> tuple[dict[str, str], str]:
    """({low stem: high stem}, how they were matched) of the stems of two folders.

    Equal stems are pairs, and then nothing else is. Only where there are none, a word that all
    stems of a folder have at one end is left out (`low00690` and `normal00690`). Where that matches
    nothing either, frames share the target of their scene (`12_3` and `12`), if every low has one.
    Nothing matched: ({}, ""). `kind` is train, val or eval and names the config keys in errors.
    Raises UserError for names that match in two ways, and where only some frames have a target.
    """
    equal = set(lows) & set(highs)
    if equal:
        return {stem: stem for stem in equal}, "by equal stems"
    both = list(itertools.product(readings(lows), readings(highs)))
    for by_scene in (False, True):
        found = [
            (matched_cores(low_cores, high_cores, by_scene), in_words((low, high), by_scene))
            for (low, low_cores), (high, high_cores) in both
        ]
        most = max(len(match) for match, _ in found)
        (match, how), *others = [item for item in found if len(item[0]) == most]
        if not match:
            continue
        alone = sorted(set(lows) - match.keys())
        if by_scene and alone:
            problem = f"{most} of {len(lows)} pictures have a target named after their scene, but"
            raise UserError(
                f"{kind}_low_dir: {problem} {listed(alone)} not; move them elsewhere or add theirs"
            )
        for other, otherwise in others:
            if other != match:
                problem = f"the names match {how}, or {otherwise}".replace(";", ",")
                raise UserError(f"{kind}_low_dir: {problem}; give the files of a pair one stem")
        return single_targets(match, kind, by_scene), how
    return {}, ""


def matched_cores(
    lows: Mapping[str, list[str]], highs: Mapping[str, list[str]], by_scene: bool
) -> dict[str, list[str]]:
    """Low stem -> the high stems with its core, or with its scene, of two folders' {core: stems}.
    Lows without one are left out."""
    wanted = {core: scene_of(core) if by_scene else core for core in lows}
    return {s: highs[wanted[c]] for c, stems in lows.items() if wanted[c] in highs for s in stems}


def single_targets(match: Mapping[str, list[str]], kind: str, shared: bool) -> dict[str, str]:
    """Low stem -> its one target. Raises UserError for a low with two, and, unless targets may be
    `shared`, for a target with two lows."""
    owners: dict[str, str] = {}
    for low, targets in match.items():
        if len(targets) > 1:
            problem = f"{targets[0]} and {targets[1]} could both be the target of {low}"
            raise UserError(f"{kind}_high_dir: {problem}; keep or rename one of the two")
        owner = owners.setdefault(targets[0], low)
        if owner != low and not shared:
            problem = f"{owner} and {low} could both belong to the target {targets[0]}"
            raise UserError(f"{kind}_low_dir: {problem}; keep or rename one of the two")
    return {low: targets[0] for low, targets in match.items()}


def is_picture_name(name: str) -> bool:
    """Whether a file of this name counts as a picture: by its suffix, and if it is not hidden."""
    return Path(name).suffix.lower() in SUFFIXES and not name.startswith(".")


def folders_below(folder: str) -> list[Path]:
    """Folders with pictures, one or two levels below `folder`, in order; of a large tree the first
    MOST_ENTRIES entries only are looked at."""
    found, level, room = [], [Path(folder)], MOST_ENTRIES
    for depth in range(3):
        below: list[Path] = []
        for path in level:
            inside: list[Path] = []
            with suppress(OSError), os.scandir(path) as entries:
                for entry in itertools.islice(entries, room):
                    room -= 1
                    if entry.is_dir() and not entry.name.startswith((".", "__")):
                        inside.append(path / entry.name)
                    elif depth and is_picture_name(entry.name) and entry.is_file():
                        found.append(path)
                        break
                else:
                    below += inside
        level = sorted(below)
    return sorted(found)


def no_pictures(folder: str, key: str) -> UserError:
    """The error for the `folder` of config key `key`, which holds no pictures; it names the folders
    below that were probably meant."""
    sides = (LOW_WORDS, HIGH_WORDS) if key.endswith("low_dir") else (HIGH_WORDS, LOW_WORDS)
    ours: list[str] = []
    unnamed: list[str] = []
    for path in folders_below(folder):
        words = set(re.findall("[a-z]+", path.name.lower()))
        if words & set(sides[0]):
            ours.append(str(path))
        elif not words & set(sides[1]):
            unnamed.append(str(path))
    meant = ours or unnamed
    one_of = "one of " if len(meant) > 1 else ""
    hint = f"did you mean {one_of}{listed(meant)}?" if meant else "name the folder that holds them"
    return UserError(f"{key}: no pictures in {folder!r}; {hint}")
