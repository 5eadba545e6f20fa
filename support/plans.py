"""Plans: which pairs make the batches of an epoch: pure functions of the config and the epoch."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Draw(NamedTuple):
    """Pair number `pair` as `epoch` augments it; `whole` at image_size, else cropped; `turn` counts
    how often the epoch has shown the pair before."""

    epoch: int
    pair: int
    whole: bool = False
    turn: int = 0


def batch_plan(count: int, config: Any, epoch: int) -> list[list[Draw]]:
    """The batches of an epoch, a pure function; each is whole or cropped throughout."""
    rng = np.random.default_rng((config.seed, epoch))
    order = rng.permutation(count).tolist()
    size = config.batch_size
    batches = [order[start : start + size] for start in range(0, count, size)]
    whole = (rng.random(len(batches)) < config.whole_share).tolist()
    return [
        [Draw(epoch, index, all_of_it) for index in batch]
        for batch, all_of_it in zip(batches, whole, strict=True)
    ]


def epoch_steps(count: int, config: Any) -> int:
    """Batches in an epoch over `count` pairs."""
    samples = (config.epoch_samples if config.sources else 0) or count
    return math.ceil(samples / config.batch_size)


def source_plan(
    members: Sequence[Sequence[int]], shares: Sequence[float], config: Any, epoch: int
) -> list[list[Draw]]:
    """The batches of an epoch over several sources, each with its share of the samples.

    `members` are the sources' pair numbers; a source shows all its pairs before it repeats one. A
    pure function, as `batch_plan`; batches of whole pictures hold whole_batch.
    """
    rng = np.random.default_rng((config.seed, epoch, 2**31))
    whole = rng.random(epoch_steps(sum(map(len, members)), config)) < config.whole_share
    sizes = np.where(whole, config.whole_batch or config.batch_size, config.batch_size)
    ends = np.rint(np.cumsum(shares) / np.sum(shares) * sizes.sum()).astype(int)
    drawn: list[tuple[int, int]] = []
    for numbers, count in zip(members, np.diff(ends, prepend=0).tolist(), strict=True):
        laps = [rng.permutation(len(numbers)) for _ in range(math.ceil(count / len(numbers)))]
        order = np.concatenate(laps)[:count].tolist() if laps else []
        drawn += [(numbers[place], turn // len(numbers)) for turn, place in enumerate(order)]
    order = iter(rng.permutation(len(drawn)).tolist())
    return [
        [Draw(epoch, drawn[i][0], all_of_it, drawn[i][1]) for i in itertools.islice(order, size)]
        for size, all_of_it in zip(sizes.tolist(), whole.tolist(), strict=True)
    ]


def unaltered(config: Any) -> Any:
    """`config` without augmentation, so that a pair always gives one sample."""
    still = dict(flips=False, exposure_gain=0.0, channel_gain=0.0, window_min=1.0)
    still |= dict(identity_share=0.0, paste_share=0.0, jpeg_share=0.0, mixup_share=0.0)
    return dataclasses.replace(config, **still)


def spread(count: int, wanted: int) -> list[int]:
    """Up to `wanted` of the places 0 to `count` - 1, from the first to the last."""
    return np.linspace(0, count - 1, min(count, wanted)).round().astype(int).tolist()
