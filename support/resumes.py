"""Resuming: which settings may change on the way, and which would make it another run."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from support.checkpoints import RETIRED
from support.notices import listed_sources, same_path
from support.pairs import PairStore
from support.scenes import known_thumbnails
from support.settings import UserError, build, read_settings, shown

# what draws other data, or needs another optimizer; `optimizer` is a key of some systems alone
SPLIT = ("seed", "val_fraction", "scene_similarity", "val_pairs")
FIXED = (*SPLIT, "image_size", "crop_size", "optimizer")
FOLDERS = ("train_low_dir", "train_high_dir", "val_low_dir", "val_high_dir")
LOOKS = {"train": "training_thumbnails", "val": "validation_thumbnails"}


def data_folders(config: Mapping[str, Any]) -> dict[str, str]:
    """Key, with the source that it belongs to, -> folder, of all pictures that a run reads."""
    sources = listed_sources(config)
    if not sources:
        return {key: config[key] for key in FOLDERS}
    keys = [key.removeprefix("train_") for key in FOLDERS]
    return {f"{key} of source {item['name']}": item[key] for item in sources for key in keys}


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """'key: old -> new' of every setting that differs; two names of one folder do not."""
    found = []
    for key, before in old.items():
        after = new[key]
        if key == "sources":
            for a, b in zip(listed_sources(old), listed_sources(new), strict=True):
                found += differences(
                    {f"{name} of source {a['name']}": value for name, value in a.items()},
                    {f"{name} of source {a['name']}": b[name] for name in a},
                )
        elif before != after and not (isinstance(before, str) and same_path(before, after)):
            found.append(f"{key}: {shown(before)} -> {shown(after)}")
    return found


def told_changes(
    checkpoint: dict[str, Any], path: str, given: dict[str, Any], kind: type
) -> list[str]:
    """Print, in one line, and return which settings of the run in `checkpoint` are `given` anew.

    Settings that draw other data or need another optimizer may not change: raises UserError. A data
    folder that is gone may be named anew; `refuse_other_pictures` then compares the pictures.
    """
    known = {k: v for k, v in checkpoint["config"].items() if k not in RETIRED}
    config: Any = build(kind, read_settings([kind], known, path), path)
    old = dataclasses.asdict(config)
    new = old | {key: value for key, value in given.items() if key in old}
    way = f"or start a new run with --set init_from={path} in another checkpoint_dir"
    if new["init_from"] and differences({"init_from": old["init_from"]}, new):
        raise UserError("init_from: does nothing with --resume; leave one of the two out")
    for key in FIXED:
        if key in old and old[key] != new[key]:
            change = f"from {shown(old[key])} to {shown(new[key])}"
            raise UserError(f"{key}: cannot change {change} with --resume; keep it, {way}")
    if (old["global_rate"] == 1) != (new["global_rate"] == 1):
        change = f"from {old['global_rate']:g} to {new['global_rate']:g}"
        why = "1 and other values need optimizers of their own"
        raise UserError(
            f"global_rate: cannot change {change} with --resume, as {why}; keep it, {way}"
        )
    before, after = data_folders(old), data_folders(new)
    if list(before) != list(after):
        raise UserError(f"sources: cannot be others with --resume; keep them, {way}")
    for key, folder in before.items():
        there, moved = os.path.isdir(folder), not same_path(folder, after[key])
        if folder and not there and not moved:
            raise UserError(f"{key}: the run's folder {folder!r} is not here; name where it is now")
        proof = checkpoint.get(LOOKS["val" if key.startswith("val") else "train"]) is not None
        if moved and folder != after[key] and (there or not folder or not proof):
            change = f"from {folder!r} to {after[key]!r}"
            raise UserError(f"{key}: cannot change {change} with --resume; keep it, {way}")
    changes = differences(old, new)
    if changes:
        print(f"changed settings: {', '.join(changes)}")
    return changes


def refuse_other_pictures(
    checkpoint: Mapping[str, Any], path: str, store: PairStore, held_out: np.ndarray
) -> None:
    """Raises UserError where the training targets of `store`, or the validation targets, whose
    thumbnails (N, 16, 16, 3) uint8 are `held_out`, are not those of the run in `checkpoint`.

    Other pictures would redraw the split, and the order of the batches, without a word.
    """
    for kind, now in (("train", store.thumbnails), ("val", held_out)):
        was = known_thumbnails(checkpoint, LOOKS[kind])
        if was is None:
            continue
        same = was.shape == now.shape and (
            np.abs(was.astype(np.float32) - now).mean((1, 2, 3)).max(initial=0) <= 2
        )
        if not same:
            counts = f"{len(was)} then, {len(now)} now"
            raise UserError(
                f"{path}: its {'training' if kind == 'train' else 'validation'} targets were other"
                f" pictures than the folders hold ({counts}); put them back, or start a new run"
                f" with --set init_from={path} in another checkpoint_dir"
            )
