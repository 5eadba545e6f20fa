"""Notices: what may make scores say less than they seem to, in plain sentences."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn

from support.pairs import PairStore, find_pairs, lone_pictures
from support.scenes import find_twins, known_thumbnails


def same_path(first: str, second: str) -> bool:
    """Whether two names lead to one file or folder; False for an empty name."""
    return bool(first and second) and os.path.realpath(first) == os.path.realpath(second)


def folder_keys(kind: str, source: str) -> tuple[str, str]:
    """The keys of the folders of low and of high; `kind` is train, val or eval."""
    prefix = "" if source and kind == "train" else f"{kind}_"
    of = f" of source {source}" if source else ""
    return f"{prefix}low_dir", f"{prefix}high_dir{of}"


def pair_notices(store: PairStore, kind: str, lit: Collection[str] = ()) -> list[str]:
    """Whether low and high of `store` are one folder, or seem to be swapped, for each source.

    Sources of `lit` are well-exposed photographs, whose low may well be its high.
    """
    found = []
    for source, places in store.by_source(range(len(store))).items():
        low_key, high_key = folder_keys(kind, source)
        low, high = (str(path.parent) for path in store.pairs[places[0]][1:3])
        if same_path(low, high) and source not in lit:
            found.append(f"{low_key} and {high_key} are one folder ({low}); name two")
        brighter = sum(store.brighter[place] for place in places)
        if 2 * brighter > len(places):
            found.append(
                f"low is brighter than high in {brighter} of {len(places)} pairs; "
                f"{low_key} and {high_key} seem to be swapped"
            )
    return found


def listed_sources(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The sources of a config, which may come from a stranger's checkpoint."""
    found = config.get("sources")
    return [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []


def held_out_for_scores(config: Mapping[str, Any], use: Any) -> list[str]:
    """The keys of the validation folders of `config` that are evaluation folders of `use`."""
    found = []
    for item in listed_sources(config) or [dict(config)]:
        keys = folder_keys("val", str(item["name"]) if "name" in item else "")
        given = [str(item.get(f"val_{part}_dir", "")) for part in ("low", "high")]
        scored = (use.eval_low_dir, use.eval_high_dir)
        found += [k for k, a, b in zip(keys, given, scored, strict=True) if same_path(a, b)]
    return found


def told(sentences: Sequence[str]) -> list[str]:
    """Print each of `sentences` on a line of its own; returns them."""
    for sentence in sentences:
        print(f"warning: {sentence}")
    return list(sentences)


def announce(config: Any, counts: tuple[int, int], model: nn.Module, runtime: str) -> None:
    """Say what is about to be trained, on how many training and validation pairs, and where."""
    crops = f"{config.crop_size} px crops"
    geometry = crops if config.crop_size else f"pictures resized to {config.image_size}"
    pairs = f"{counts[0]} training and {counts[1]} validation pairs"
    print(f"{pairs}, {geometry}, batch {config.batch_size}")
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{parameters:.2f} M parameters on {runtime}; seed {config.seed}")


def of_training(config: Any, use: Any, store: PairStore, held_out: PairStore) -> list[str]:
    """Print, and return, what is odd about the pictures of a training."""
    lit = {source["name"] for source in config.sources if source["darken"]}
    found = pair_notices(store, "train", lit)
    if held_out is not store:
        found += pair_notices(held_out, "val", lit)
    if keys := held_out_for_scores(dataclasses.asdict(config), use):
        why = "the pictures that choose the weights will also score them; name others"
        found.append(f"{' and '.join(keys)}: evaluation folder as well, so {why}")
    return told(found)


def of_evaluation(
    use: Any, checkpoint: Mapping[str, Any], store: PairStore, twins: Sequence[bool | None]
) -> list[str]:
    """Print, and return, what is odd about the pictures that are to be scored.

    `twins` says of each pair whether its target is among the checkpoint's training pictures. Where
    the validation pairs were split off these, the ones that chose the weights are among them, too.
    Of pictures without targets, and of other people's outputs, less is known.
    """
    if not use.eval_high_dir:
        return []
    found, config, count = pair_notices(store, "eval"), checkpoint.get("config", {}), len(store)
    known = known_thumbnails(checkpoint, "validation_thumbnails")
    chose = [False] * count if known is None else find_twins(store.thumbnails, known).tolist()
    split_off = not listed_sources(config) and not config.get("val_low_dir")
    trained = sum(
        bool(twin) and not (split_off and other) for twin, other in zip(twins, chose, strict=True)
    )
    if trained:
        hint = "scores of new pictures may be lower"
        found.append(f"{trained} of {count} pairs trained these weights; {hint}")
    if any(chose):
        hint = "scores of new pictures may be lower"
        found.append(f"{sum(chose)} of {count} pairs chose these weights, in validation; {hint}")
    if keys := held_out_for_scores(config, use):
        why = "it was chosen by the folder that is to score it"
        found.append(f"the checkpoint's {' and '.join(keys)}: evaluation folder as well, so {why}")
    return told(found)


def counted(count: int, use: Any) -> str:
    """'5 pairs', or '2 of 5 pairs (scenes=a,b)' where `use.scenes` names some."""
    what = "pairs" if use.eval_high_dir else "pictures without targets"
    stems = dict.fromkeys(stem.strip() for stem in use.scenes.split(",") if stem.strip())
    if not stems:
        return f"{count} {what}"
    if use.eval_high_dir:
        there = find_pairs(use.eval_low_dir, use.eval_high_dir, "eval", log=lambda line: None)
    else:
        there = lone_pictures(use.eval_low_dir)
    names = ",".join(stems)
    names = names if len(names) <= 60 else f"{names[:57]}..."
    return f"{count} of {len(there)} {what} (scenes={names})"
