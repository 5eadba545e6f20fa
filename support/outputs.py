"""Outputs: pictures that another method made of the evaluation's dark ones, matched by stem."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence

import numpy as np

from support.decoding import read_image
from support.pairs import Pair, PairStore, pictures_by_stem
from support.settings import UserError


def common_affix(stems: Collection[str], outputs: Collection[str]) -> tuple[str, str]:
    """(prefix, suffix) that makes most of `stems` names in `outputs`; two empty texts where one is
    there as it is, or none fits. Raises UserError where two do equally well."""
    if not set(stems).isdisjoint(outputs):
        return "", ""
    found: Counter[tuple[str, str]] = Counter()
    for stem in stems:
        for name in outputs:
            before, inside, after = name.partition(stem)
            if inside:
                found[before, after] += 1
    best = found.most_common(2)
    if len(best) == 2 and best[0][1] == best[1][1]:
        forms = " and ".join(f"{before}NAME{after}" for (before, after), _ in best)
        raise UserError(
            f"outputs_dir: {forms} fit equally many dark pictures; keep the files of one form"
        )
    return best[0][0] if best else ("", "")


def with_outputs(
    pairs: Sequence[Pair], folder: str, log: Callable[[str], None] = print
) -> list[Pair]:
    """Those of `pairs` that have an output in `folder`, with it: a file with the low picture's stem
    or, if no file has that, with the same prefix and suffix around it, such as 12_out.png for 12.

    `log` is told how many have none. Raises UserError where all have none.
    """
    outputs = pictures_by_stem(folder, "outputs_dir")
    # of all dark pictures: a few chosen ones may fit by chance
    stems = pictures_by_stem(str(pairs[0].low.parent), "eval_low_dir")
    before, after = common_affix(stems, outputs)
    found, missing = list[Pair](), list[str]()
    for pair in pairs:
        output = outputs.get(f"{before}{pair.low.stem}{after}")
        if output is None:
            missing.append(pair.low.name)
        else:
            found.append(pair._replace(output=output))
    if not missing:
        return found
    names = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
    told = f"{len(missing)} of {len(pairs)} pairs have no output in {folder} ({names})"
    if not found:
        raise UserError(f"outputs_dir: {told}; an output has the name of its dark picture")
    log(f"outputs_dir: {told}; scoring {len(found)} of {len(pairs)} pairs")
    return found


def read_output(pair: Pair, low: np.ndarray, size: Sequence[int] | None) -> np.ndarray:
    """(H, W, 3) uint8 pixels of the pair's output: of the size of `low`, which is the target's, or
    of `size` (height, width), which both are scored at. Raises UserError."""
    assert pair.output is not None
    output = read_image(pair.output)
    if output.shape not in (low.shape, (*(size or ()), 3)):
        ours, theirs = (f"{image.shape[1]}x{image.shape[0]}" for image in (output, low))
        of = f"target {pair.high}" if pair.has_target else f"dark picture {pair.low}"
        raise UserError(f"{pair.output}: is {ours}, but its {of} is {theirs}; make them equal")
    return output


def check_outputs(store: PairStore, size: Sequence[int] | None) -> None:
    """Read every output once, so that a bad one is told before the first is scored. Raises
    UserError."""
    for index, pair in enumerate(store.pairs):
        if pair.output is not None:
            read_output(pair, store[index][0], size)
