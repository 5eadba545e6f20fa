"""The demo as a newcomer runs it, and the sensor that it simulates."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from cli_tools import assert_one_line_error, run_script, target_picture
from PIL import Image

import model_script as ms
from support import simulated
from support.pictures import linear_to_srgb, srgb_to_linear
from support.simulated import DEMO_TEST, DEMO_TRAIN, demo_crops, simulate_infrared


def test_srgb_round_trip() -> None:
    values = np.linspace(0, 1, 1001)
    assert np.allclose(linear_to_srgb(srgb_to_linear(values)), values, atol=1e-6)
    assert np.allclose(srgb_to_linear(linear_to_srgb(values)), values, atol=1e-6)
    # IEC 61966-2-1: middle grey 0.5 is 0.2140 in linear light
    assert float(srgb_to_linear(np.array(0.5))) == pytest.approx(0.21404, abs=1e-5)
    assert float(linear_to_srgb(np.array(0.0031308))) == pytest.approx(0.04045, abs=1e-5)


def test_the_simulated_sensor_is_dark_and_reddish() -> None:
    grey = np.full((64, 64, 3), 128, np.uint8)
    dark = simulate_infrared(grey, np.random.default_rng(0))
    assert dark.shape == grey.shape and dark.dtype == np.uint8
    red, green, blue = dark.reshape(-1, 3).mean(0)
    assert red > blue > green
    assert 0 < dark.mean() < 0.4 * grey.mean()


def test_the_simulated_sensor_keeps_the_picture() -> None:
    high = target_picture(0, 64, 64)
    dark = simulate_infrared(high, np.random.default_rng(0))
    assert (dark.mean((0, 1)) < high.mean((0, 1))).all()
    assert np.corrcoef(dark.mean(2).ravel(), high.mean(2).ravel())[0, 1] > 0.7


def test_the_simulated_sensor_follows_its_seed() -> None:
    high = target_picture(1, 64, 64)
    first, again, other = (
        simulate_infrared(high, np.random.default_rng(seed)) for seed in (3, 3, 4)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_demo_crops_follow_their_seed_and_size() -> None:
    draws = [
        list(demo_crops("chelsea", 3, 48, recolour, np.random.default_rng(7)))
        for recolour in (False, False, True)
    ]
    assert all(
        crop.shape == (48, 48, 3) and crop.dtype == np.uint8 for crops in draws for crop in crops
    )
    assert np.array_equal(draws[0], draws[1])
    assert not np.array_equal(draws[0], draws[2])
    assert not set(DEMO_TRAIN) & set(DEMO_TEST)


def test_the_demo_refuses_a_checkpoint(tmp_path: Path) -> None:
    done = run_script("--mode", "demo", "--checkpoint", "weights.pth", cwd=tmp_path)
    assert_one_line_error(done.returncode, done.stderr, "--checkpoint")


# epochs of the demo: half of them, or all
@pytest.fixture(scope="module", params=[4, pytest.param(8, marks=pytest.mark.slow)])
def newcomer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the demo ran beside weights that matter to somebody."""
    folder = tmp_path_factory.mktemp("newcomer")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "best_model.pth").write_bytes(b"weeks of training")
    recipe = Path(ms.__file__).with_name("cpu_train_config.json")
    # no time limit: a busy machine may take longer, but must arrive at the same picture
    done = run_script(
        "--mode",
        "demo",
        "--config",
        recipe,
        "--set",
        "max_minutes=0",
        "--set",
        f"num_epochs={request.param}",
        cwd=folder,
        timeout=900,
        threads=None,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    (folder / "printed.txt").write_text(done.stdout)
    return folder


def rows_of(folder: Path) -> dict[str, dict[str, float]]:
    """demo.csv by method."""
    (path,) = (folder / "results").glob("demo_*/demo.csv")
    with open(path, newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    return {row.pop("method"): {name: float(value) for name, value in row.items()} for row in rows}


def test_the_demo_beats_input_and_gamma(newcomer: Path) -> None:
    rows = rows_of(newcomer)
    first, _, last = rows
    assert (first, last) == ("input", "ours")
    baseline = max(values["psnr"] for name, values in rows.items() if name != "ours")
    print(json.dumps(rows, indent=1))
    assert rows["ours"]["psnr"] >= baseline + 3
    assert rows["ours"]["colourfulness_ratio"] >= 0.6
    printed = (newcomer / "printed.txt").read_text()
    assert f"{rows['ours']['psnr']:.3f}" in printed and "overview.png" in printed


def test_the_demo_writes_only_where_it_should(newcomer: Path) -> None:
    assert {path.name for path in newcomer.iterdir()} == {
        "checkpoints",
        "results",
        "logs",
        "printed.txt",
    }
    assert [path.name.split("_")[0] for path in (newcomer / "results").iterdir()] == ["demo"]
    weights = sorted(path.name.split("_")[0] for path in (newcomer / "checkpoints").iterdir())
    assert weights == ["best", "demo"]
    assert (newcomer / "checkpoints" / "best_model.pth").read_bytes() == b"weeks of training"
    (overview,) = (newcomer / "results").glob("demo_*/eval_*/overview.png")
    assert Image.open(overview).width >= 1200


def test_the_demo_keeps_its_folders_whatever_is_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulated, "DEMO_TRAIN", ("coffee", "chelsea"))
    monkeypatch.setattr(simulated, "DEMO_TEST", ("rocket",))
    sets = dict(image_size="32,32", thumbnail_size=32, max_minutes=0.0001, device="cpu")
    sets |= dict(results_dir=tmp_path / "r", checkpoint_dir=tmp_path / "c", log_dir=tmp_path / "l")
    words = [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]
    assert ms.main(["--mode", "demo", *words, "--set", "scenes=7"]) == 0
    (folder,) = (tmp_path / "r").glob("demo_*")
    assert (folder / "demo.csv").exists() and (tmp_path / "c" / folder.name).is_dir()
