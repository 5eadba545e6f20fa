"""Pairs: which dark picture belongs to which target, decoded and cached."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from support.decoding import read_image
from support.naming import is_picture_name, listed, match_stems, no_pictures
from support.processes import progress_style
from support.scenes import split_by_scene
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
        if is_picture_name(path.name) and path.is_file():
            if path.stem in found:
                raise UserError(
                    f"{path}: has the same stem as {found[path.stem].name}; keep one of the two"
                )
            found[path.stem] = path
    return found


class Pair(NamedTuple):
    """A dark picture and its target. The name, unique among pairs, is the dark picture's stem.

    Without a target `high` is the low picture itself. `output` is what another method made.
    """

    name: str
    low: Path
    high: Path
    has_target: bool = True
    output: Path | None = None

    @property
    def source(self) -> str:
        """The name of the source that it came from; empty where there is but one."""
        return self.name.rpartition("/")[0]


def find_pairs(
    low_dir: str, high_dir: str, kind: str, log: Callable[[str], None] = print
) -> list[Pair]:
    """Pairs in natural order; files without a partner are counted and named through `log`, and how
    names were matched that are not equal.

    `kind` is train, val or eval and names the config keys in errors. Raises UserError for a folder
    without pictures, when nothing pairs up, and for names that match in two ways.
    """
    lows = pictures_by_stem(low_dir, f"{kind}_low_dir")
    highs = pictures_by_stem(high_dir, f"{kind}_high_dir")
    for folder, found, side in ((low_dir, lows, "low"), (high_dir, highs, "high")):
        if not found:
            raise no_pictures(folder, f"{kind}_{side}_dir")
    partners, how = match_stems(lows, highs, kind)
    if not partners:
        hint = f"no file in {low_dir} shares its stem with one in {high_dir}"
        raise UserError(f"{kind}_low_dir: {hint}; pairs are matched by stem")
    stems = sorted(partners, key=natural_key)
    if stems[0] != partners[stems[0]]:
        log(f"{kind}: paired {stems[0]} with {partners[stems[0]]} {how}")
    used = set(partners.values())
    for folder, here, there in ((low_dir, lows, partners.keys()), (high_dir, highs, used)):
        orphans = sorted(here.keys() - there, key=natural_key)
        if orphans:
            names = listed([here[stem].name for stem in orphans])
            log(f"{kind}: {len(orphans)} pictures in {folder} have no partner: {names}")
    return [Pair(stem, lows[stem], highs[partners[stem]]) for stem in stems]


def lone_pictures(low_dir: str) -> list[Pair]:
    """The pictures of eval_low_dir without targets, in natural order. Raises UserError where there
    are none."""
    lows = pictures_by_stem(low_dir, "eval_low_dir")
    if not lows:
        raise UserError(f"eval_low_dir: no picture in {low_dir}; name a folder that holds some")
    stems = sorted(lows, key=natural_key)
    return [Pair(stem, lows[stem], lows[stem], has_target=False) for stem in stems]


def evaluation_pairs(use: Any, need_targets: bool = True) -> list[Pair]:
    """The pairs to score: those whose stems `use.scenes` names, in its order, or all.

    Without `need_targets` an empty eval_high_dir gives pairs that have none. Raises UserError for a
    stem that is not there.
    """
    if use.eval_high_dir or need_targets:
        pairs = find_pairs(use.eval_low_dir, use.eval_high_dir, "eval")
    else:
        pairs = lone_pictures(use.eval_low_dir)
    known = {pair.name: pair for pair in pairs}
    wanted = [stem.strip() for stem in use.scenes.split(",") if stem.strip()]
    for stem in wanted:
        if stem not in known:
            there = f"there are {len(known)}, from {min(known)} to {max(known)}"
            raise UserError(f"scenes: no pair has the stem {stem}; {there}")
    return [known[stem] for stem in dict.fromkeys(wanted)] or pairs


class PairStore:
    """Decoded pairs, kept as uint8 up to `room` bytes and read again beyond it.

    Every file is decoded once at construction, so that a bad one is reported before the first step.
    `thumbnails` holds each target at 16x16 (N, 16, 16, 3) uint8; scenes and twins are told by them.
    `brighter` says of each pair whether low is brighter than its target.
    """

    def __init__(self, pairs: Sequence[Pair], room: int, skip_bad: bool = False) -> None:
        self.pairs: list[Pair] = []
        self.brighter: list[bool] = []
        self.room = room
        self._cache: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        thumbnails = []
        for pair in tqdm(pairs, desc="reading pairs", leave=False, **progress_style()):
            try:
                low, high = self._read(pair)
            except UserError as error:
                if not skip_bad:
                    hint = "or leave such files out with --set on_bad_file=skip"
                    raise UserError(f"{error}; {hint}") from None
                tqdm.write(f"left out: {error}")
                continue
            self.pairs.append(pair)
            self.brighter.append(bool(low.mean() > high.mean()))
            thumbnail = Image.fromarray(high).resize((16, 16), Image.Resampling.BOX)
            thumbnails.append(np.asarray(thumbnail))
            if low.nbytes + high.nbytes <= self.room:
                self.room -= low.nbytes + high.nbytes
                self._cache[pair.name] = (low, high)
        if not self.pairs:
            raise UserError(f"{pairs[0].low.parent}: not one readable pair is left")
        self.thumbnails = np.stack(thumbnails)

    @staticmethod
    def _read(pair: Pair) -> tuple[np.ndarray, np.ndarray]:
        low, high = read_image(pair.low), read_image(pair.high)
        sizes = [f"{image.shape[1]}x{image.shape[0]}" for image in (low, high)]
        if low.shape != high.shape:
            difference = f"{sizes[0]} against {sizes[1]} in {pair.high}"
            raise UserError(f"{pair.low}: the pair's sizes differ, {difference}")
        if min(low.shape[:2]) < 16:
            raise UserError(f"{pair.low}: {sizes[0]} is too small; the least side is 16")
        return low, high

    def by_source(self, indices: Sequence[int]) -> dict[str, list[int]]:
        """Source name -> the places in `indices` of its pairs."""
        found: dict[str, list[int]] = {}
        for place, index in enumerate(indices):
            found.setdefault(self.pairs[index].source, []).append(place)
        return found

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(low, high), each (H, W, 3) uint8."""
        pair = self.pairs[index]
        return self._cache[pair.name] if pair.name in self._cache else self._read(pair)


def source_pairs(
    sources: Sequence[dict[str, Any]], val_pairs: int
) -> tuple[list[Pair], list[Pair]]:
    """Training and validation pairs of all sources, of the latter `val_pairs` each, or all for 0.

    A pair's name is SOURCE/STEM.
    """
    pairs: dict[str, list[Pair]] = {"train": [], "val": []}
    for source in sources:
        for kind, prefix in (("train", ""), ("val", "val_")):
            if not source[f"{prefix}low_dir"] or (kind == "train" and not source["share"]):
                continue
            try:
                folders = (source[f"{prefix}low_dir"], source[f"{prefix}high_dir"])
                found = find_pairs(*folders, kind, partial(print, f"{source['name']}:"))
            except UserError as error:
                problem, _, mend = str(error).rpartition("; ")
                mend = "mend its folders" if "--set" in mend else mend  # that sets no source's
                raise UserError(f"sources: {source['name']}: {problem}; {mend}") from None
            if kind == "val" and 0 < val_pairs < len(found):
                places = np.linspace(0, len(found) - 1, val_pairs).round().astype(int)
                found = [found[place] for place in places]
            pairs[kind] += [pair._replace(name=f"{source['name']}/{pair.name}") for pair in found]
    return pairs["train"], pairs["val"]


def training_data(config: Any, use: Any) -> tuple[PairStore, list[int], PairStore, list[int]]:
    """(training store, its indices, validation store, its indices); together they keep up to
    `use.cache_megabytes` decoded.

    Validation pairs are the sources' own, those of val_low_dir, or split off by scene.
    """
    room, skip = use.cache_megabytes * 2**20, use.on_bad_file == "skip"
    if not config.sources and not config.val_low_dir:
        pairs = find_pairs(config.train_low_dir, config.train_high_dir, "train")
        store = PairStore(pairs, room, skip)
        split = (config.val_fraction, config.scene_similarity, config.seed)
        training, validation = split_by_scene(store.thumbnails, *split)
        return store, training, store, validation
    if config.sources:
        pairs, held = source_pairs(config.sources, config.val_pairs)
    else:
        pairs = find_pairs(config.train_low_dir, config.train_high_dir, "train")
        held = find_pairs(config.val_low_dir, config.val_high_dir, "val")
    store = PairStore(pairs, room, skip)
    held_out = PairStore(held, store.room, skip)
    return store, list(range(len(store))), held_out, list(range(len(held_out)))
