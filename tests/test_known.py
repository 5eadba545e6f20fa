"""Pictures unlike those of the training: who is warned of, by which words, and hostile tables."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_tools import save_picture
from conftest import ROOT, randomise, smooth_scene, write_pairs

import model_script as ms
from support import known
from support.checkpoints import load_checkpoint, save_checkpoint
from support.pairs import PairStore, find_pairs

VAL = Path("data/val")


def dark(seed: int, size: tuple[int, int] = (80, 96)) -> np.ndarray:
    """A dark, warm, noisy picture."""
    rng = np.random.default_rng((3, seed))
    low = smooth_scene(seed, *size) * np.array([0.2, 0.13, 0.1]) * rng.uniform(0.6, 1.4)
    return np.clip(np.rint(low + rng.normal(3, 1, low.shape)), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def stored() -> dict[str, torch.Tensor]:
    looks = np.stack([known.look_of(dark(seed)) for seed in range(120)])
    found = known.fitted(looks, np.arange(120))
    assert found is not None
    return found


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, stored: dict[str, torch.Tensor]) -> Path:
    torch.manual_seed(0)
    config = ms.Config(flow_channels=8, num_flow_blocks=1, thumbnail_size=32)
    model = randomise(ms.ConditionalFlow(config), 0.05)
    path = tmp_path_factory.mktemp("weights") / "mine.pth"
    content = {"config": dataclasses.asdict(config), "model": model.state_dict()}
    save_checkpoint(path, content | {"known": stored})
    return path


def enhance(weights: Path, source: Path, target: Path) -> int:
    arguments = ["--mode", "enhance", "--checkpoint", weights, "--input", source]
    return ms.main([*map(str, arguments), "--output", str(target)])


def strange_ones() -> dict[str, np.ndarray]:
    """Blue, black and white, bright, and noise."""
    rng = np.random.default_rng(0)
    return {
        "blue": np.ascontiguousarray(dark(900)[..., ::-1]),
        "grey": np.repeat(dark(901).mean(-1, keepdims=True).astype(np.uint8), 3, -1),
        "bright": smooth_scene(902, 80, 96),
        "noise": rng.integers(0, 256, (80, 96, 3), dtype=np.uint8),
    }


def test_a_look_knows_nothing_of_size_or_depth() -> None:
    look = known.look_of(dark(0, (64, 128)))
    assert look.shape == (known.LENGTH,) and look.dtype == np.float32
    big = np.kron(dark(0, (64, 128)), np.ones((3, 3, 1), np.uint8))
    np.testing.assert_allclose(known.look_of(big), look, atol=0.02)
    deep = dark(0, (64, 128)).astype(np.uint16) * 257
    np.testing.assert_array_equal(known.look_of(deep), look)


def test_a_look_of_one_colour_is_finite() -> None:
    for level in (0, 255):
        assert np.isfinite(known.look_of(np.full((16, 16, 3), level, np.uint8))).all()


def test_whitened_looks_have_deviation_one() -> None:
    rng = np.random.default_rng(0)
    looks = (rng.normal(0, 1, (4000, 24)) * np.geomspace(0.1, 10, 24)).astype(np.float32)
    np.testing.assert_allclose(np.cov((looks @ known.whitening(looks)).T), np.eye(24), atol=0.06)


def test_distances_are_those_to_the_second_nearest_of_another_scene() -> None:
    rng = np.random.default_rng(0)
    looks = rng.normal(0, 1, (30, 24)).astype(np.float32)
    scenes = np.arange(30) // 3
    white = looks @ known.whitening(looks)
    for place, found in enumerate(known.distances(looks, scenes)):
        others = white[scenes != scenes[place]]
        expected = np.sort(np.linalg.norm(others - white[place], axis=1))[1]
        assert found == pytest.approx(expected, rel=1e-3)


def test_few_of_the_same_kind_are_strange_and_most_others(stored: dict[str, torch.Tensor]) -> None:
    judge = known.Known(stored)
    same = [judge.strange(dark(seed)) for seed in range(1000, 1100)]
    assert sum(same) <= 8
    assert [name for name, one in strange_ones().items() if not judge.strange(one)] == []
    assert judge.distance(dark(1000)) < judge.distance(strange_ones()["noise"])


def test_too_few_pictures_or_scenes_say_nothing() -> None:
    looks = np.stack([known.look_of(dark(seed)) for seed in range(50)])
    assert known.fitted(looks[: known.FEWEST - 1], np.arange(known.FEWEST - 1)) is None
    assert known.fitted(looks, np.arange(50) % 4) is None
    assert known.fitted(looks, np.arange(50) % 5) is not None
    assert known.known_of({}) is None


def test_further_pictures_of_another_camera_are_no_longer_strange(
    stored: dict[str, torch.Tensor],
) -> None:
    """However few they are: that is what adapting is for."""
    blue = [np.ascontiguousarray(dark(seed)[..., ::-1]) for seed in range(200, 224)]
    assert all(known.Known(stored).strange(one) for one in blue)
    looks = np.stack([known.look_of(one) for one in blue[:12]])
    both = known.extended(stored, looks, np.arange(12))
    assert both is not None and len(both["looks"]) == 132
    assert len(both["scenes"].unique()) == 132 and float(both["limit"]) >= float(stored["limit"])
    assert sum(known.Known(both).strange(one) for one in blue[12:]) <= 2
    assert known.extended(None, looks, np.arange(12)) is None


def test_one_picture_is_told_in_one_line(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_picture(tmp_path / "cat.png", strange_ones()["blue"])
    save_picture(tmp_path / "dog.png", dark(1001))
    assert enhance(weights, tmp_path / "cat.png", tmp_path / "a.png") == 0
    (note,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith("note: "))
    assert note.startswith("note: ") and note.endswith(
        "cat.png looks like no camera that these weights were trained on (mine.pth); "
        "the colours may be wrong"
    )
    assert enhance(weights, tmp_path / "dog.png", tmp_path / "b.png") == 0
    assert "note: " not in capsys.readouterr().out


def test_a_folder_is_told_once_with_five_names(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in range(7):
        save_picture(tmp_path / "in" / f"{seed}.png", np.ascontiguousarray(dark(seed)[..., ::-1]))
    save_picture(tmp_path / "in" / "x.png", dark(1001))
    assert enhance(weights, tmp_path / "in", tmp_path / "out") == 0
    (note,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith("note: "))
    assert note == (
        "note: 7 look like no camera that these weights were trained on (mine.pth): 0.png, 1.png, "
        "2.png, 3.png, 4.png and 2 more; their colours may be wrong"
    )
    with open(tmp_path / "out" / "enhance.csv", newline="") as stream:
        told = {Path(row["file"]).name: row["known"] for row in csv.DictReader(stream)}
    assert told == {f"{seed}.png": "no" for seed in range(7)} | {"x.png": "yes"}


@pytest.mark.parametrize(
    "change",
    [
        {"looks": torch.zeros(120, 23)},
        {"looks": torch.zeros(120, 24, dtype=torch.float64)},
        {"looks": torch.full((120, 24), torch.nan)},
        {"looks": torch.full((120, 24), 1e30)},
        {"looks": torch.zeros(24).expand(120, 24)},
        {"looks": torch.zeros(0, 24), "scenes": torch.zeros(0, dtype=torch.int32)},
        {"looks": "looks"},
        {"scenes": torch.zeros(7, dtype=torch.int32)},
        {"scenes": None},
        {"limit": torch.tensor(-1.0)},
        {"limit": torch.tensor(torch.nan)},
        {"limit": torch.zeros(3)},
        {"limit": 4.0},
    ],
)
def test_a_damaged_table_is_no_table(stored: dict[str, torch.Tensor], change: Any) -> None:
    assert known.known_of({"known": stored}) is not None
    assert known.known_of({"known": stored | change}) is None
    assert known.known_of({"known": [1]}) is None


def test_weights_without_looks_say_nothing(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = load_checkpoint(str(weights))
    del content["known"]
    save_checkpoint(tmp_path / "old.pth", content)
    save_picture(tmp_path / "cat.png", strange_ones()["blue"])
    assert enhance(tmp_path / "old.pth", tmp_path / "cat.png", tmp_path / "a.png") == 0
    assert "note: " not in capsys.readouterr().out
    loaded = ms.load_model(str(tmp_path / "old.pth"), {}, ms.ConditionalFlow)
    assert loaded.knows(dark(1)) is None


def test_a_training_stores_the_looks_of_its_dark_pictures(tmp_path: Path) -> None:
    low, high = write_pairs(tmp_path, 44)
    config = ms.Config(
        **dict(train_low_dir=str(low), train_high_dir=str(high), checkpoint_dir=str(tmp_path)),
        **dict(flow_channels=8, num_flow_blocks=1, thumbnail_size=32, image_size=[32, 32]),
    )
    trainer = ms.Trainer(config, ms.Use(device="cpu"), ms.ConditionalFlow)
    found = trainer._deployable()["known"]
    store = PairStore(find_pairs(str(low), str(high), "train"), 0)
    assert known.sound(found) and len(found["looks"]) == 44
    np.testing.assert_array_equal(found["looks"][3].numpy(), known.look_of(store[3][0]))
    lit = known.looks_in(store, 0.85, [""])[0]
    assert len(lit) == 88  # each as it is, and darkened
    assert lit[1][:5].mean() < known.look_of(store[0][1])[:5].mean() - 1


@pytest.mark.skipif(not (ROOT / VAL).exists(), reason="needs the held-out pictures")
@pytest.mark.parametrize("name", ["eliei", "lol", "sice", "bsds"])
def test_few_held_out_pictures_are_strange_to_the_released_weights(name: str) -> None:
    judge = known.known_of(load_checkpoint(str(ms.RELEASED)))
    assert judge is not None
    files = sorted((ROOT / VAL / name / "low").iterdir())
    pixels = [ms.read_image(path) for path in files]
    assert sum(judge.strange(one) for one in pixels) <= 0.05 * len(files)
