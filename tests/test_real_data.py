"""On the real photographs, where they are at hand: the protocol, the split and a few steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from torch.utils.data import default_collate

import model_script as ms
from support.decoding import read_image
from support.pairs import PairStore, evaluation_pairs, find_pairs
from support.runtime import choose_runtime
from support.scenes import find_twins, split_by_scene
from support.settings import build

TRAIN, EVALUATION = ROOT / ms.ARCHIVE_TRAIN, ROOT / ms.ARCHIVE_EVAL
pytestmark = pytest.mark.skipif(
    not (TRAIN.is_dir() and EVALUATION.is_dir()),
    reason="the data set's archives are not unpacked beside model_script.py",
)


def configured(**changes: Any) -> ms.Config:
    """The published protocol."""
    folders = {f"train_{kind}_dir": str(TRAIN / kind) for kind in ("low", "high")}
    return build(ms.Config, folders | changes, "test")


@pytest.fixture(scope="module")
def thumbnails() -> np.ndarray:
    """The training targets at 16x16, without reading the dark photographs."""
    pairs = find_pairs(str(TRAIN / "low"), str(TRAIN / "high"), "train")
    return np.stack([shrunk(pair.high, 16) for pair in pairs])


def shrunk(path: Path, side: int) -> np.ndarray:
    """(side, side, 3) uint8, as PairStore does it."""
    return np.asarray(Image.fromarray(read_image(path)).resize((side, side), Image.Resampling.BOX))


def used(**changes: Any) -> ms.Use:
    """The evaluation pairs on the CPU."""
    folders = {f"eval_{kind}_dir": str(EVALUATION / kind) for kind in ("low", "high")}
    return build(ms.Use, {"device": "cpu"} | folders | changes, "test")


def test_all_pairs_are_found() -> None:
    pairs = find_pairs(str(TRAIN / "low"), str(TRAIN / "high"), "train")
    assert len(pairs) == 236  # the archive's ten orphans, such as 20(1).png, are none
    assert [pair.low.stem for pair in pairs] == [pair.high.stem for pair in pairs]
    assert [int(pair.name) for pair in pairs] == sorted(int(pair.name) for pair in pairs)


def test_the_split_keeps_scenes_together(thumbnails: np.ndarray) -> None:
    for seed in (0, 1, 2):
        config = configured(seed=seed)
        split = (config.val_fraction, config.scene_similarity, config.seed)
        training, validation = split_by_scene(thumbnails, *split)
        assert sorted(training + validation) == list(range(len(thumbnails)))
        assert 0.05 < len(validation) / len(thumbnails) < 0.25
        assert not find_twins(thumbnails[validation], thumbnails[training]).any()


def test_the_published_numbers_are_of_these_pairs(thumbnails: np.ndarray) -> None:
    """What README's commands name: the validation scenes of seed 0, and evaluation pairs."""
    names = {
        part: (ROOT / "benchmarks" / f"{part}_scenes.txt").read_text()
        for part in ("validation", "evaluation")
    }
    pairs = find_pairs(str(TRAIN / "low"), str(TRAIN / "high"), "train")
    config = configured()
    split = (config.val_fraction, config.scene_similarity, config.seed)
    _, validation = split_by_scene(thumbnails, *split)
    train = {f"eval_{kind}_dir": str(TRAIN / kind) for kind in ("low", "high")}
    chosen = evaluation_pairs(used(scenes=names["validation"], **train))
    assert [pair.name for pair in chosen] == [pairs[i].name for i in validation]
    assert len(evaluation_pairs(used(scenes=names["evaluation"]))) == 42


def test_a_few_steps_lower_the_loss() -> None:
    settings = dict(
        flow_channels=16,
        num_flow_blocks=1,
        thumbnail_size=32,
        image_size=[64, 64],
        learning_rate=5e-3,
    )
    config = configured(
        **settings,
        flips=False,
        window_min=1.0,
        exposure_gain=0.0,
        channel_gain=0.0,
        global_dropout=0.0,
    )
    pairs = find_pairs(config.train_low_dir, config.train_high_dir, "train")[:2]
    store = PairStore(pairs, 0)
    samples = ms.TrainingSamples(store, range(len(store)), config)
    batch = ms.Sample(*default_collate([tuple(samples[0, place]) for place in range(len(samples))]))
    torch.manual_seed(0)
    model = ms.ConditionalFlow(config)
    optimizer = torch.optim.AdamW(model.parameters(), config.learning_rate)
    losses = []
    for _ in range(15):
        loss = sum(model.losses(batch).values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-3:]) < 0.8 * losses[0]


def test_the_unenhanced_input_scores_as_published() -> None:
    """The 128x128 protocol: dark inputs are about 8.7 dB from their targets."""
    config, use = configured(), used()
    assert use.size_to_score(config) == (128, 128)
    store = PairStore(evaluation_pairs(use), 2**30)

    class Untouched(ms.System):
        def enhance(self, low: torch.Tensor, temperature: float = 0.0) -> torch.Tensor:
            return low

    runtime = choose_runtime("cpu", mixed=False)
    loaded = ms.Loaded(Untouched(config), use, runtime, {})
    scored = list(ms.score_pairs(loaded, store, [None] * len(store)))
    assert len(scored) == len(store)
    assert all(tuple(one.enhanced.shape) == (3, 128, 128) for one in scored)
    assert float(np.mean([one.row["psnr"] for one in scored])) == pytest.approx(8.7, abs=1.5)
