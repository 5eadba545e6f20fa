"""A run that is killed at any moment loses no finished epoch and ends with the weights of a run that nobody disturbed; a
full disk costs no checkpoint."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_tools import SCRIPT, assert_one_line_error, differing, environment, files_under, make_data, run_script, write_config

ROOT = SCRIPT.parent
STEPS = 4  # of an epoch


def rehearse(folder: Path, kills: int, epochs: int, seed: int = 0) -> list[dict[str, int]]:
    """What tests/killer.py told of a run of `epochs` that was killed `kills` times."""
    make_data(folder, train=STEPS)
    config = write_config(folder, num_epochs=epochs, keep_checkpoints=3)
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "killer.py"), str(config), str(kills), str(seed)],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def final_state(folder: Path, epochs: int) -> dict[str, object]:
    """The last checkpoint and the best weights, without the clock and the run's name."""
    last = torch.load(folder / "ckpt" / f"checkpoint_epoch_{epochs}.pth", weights_only=True)
    best = torch.load(folder / "ckpt" / "best_model.pth", weights_only=True)
    training = {key: value for key, value in last["training"].items() if key != "minutes"}
    return {"training": training, "averaged": last["model"], "best": best["model"], "best epoch": best["epoch"]}


def kill_and_compare(folder: Path, kills: int, epochs: int) -> None:
    rehearse(folder / "calm", 0, epochs)
    told = rehearse(folder / "killed", kills, epochs)
    assert len(told) == kills
    for one in told:
        assert one["after"] >= one["before"] and one["after"] % STEPS == 0
    # a checkpoint may be a part of an epoch late, never an epoch: where a later start found more, nothing was lost between
    assert all(later["before"] == earlier["after"] for earlier, later in itertools.pairwise(told))
    assert not differing(final_state(folder / "calm", epochs), final_state(folder / "killed", epochs))
    kept = {f"checkpoint_epoch_{epoch}.pth" for epoch in range(epochs - 2, epochs + 1)} | {"best_model.pth"}
    # what a run that died before its first checkpoint had found best was set aside by the run that began anew
    names = {path.name for path in (folder / "killed" / "ckpt").iterdir() if path.stem.count("_") <= 2}
    assert {name for name in names if not name.startswith(".")} == kept  # none that a kill kept from being removed


def test_six_kills_change_nothing(tmp_path: Path) -> None:
    kill_and_compare(tmp_path, kills=6, epochs=30)


@pytest.mark.slow
def test_fifty_kills_change_nothing(tmp_path: Path) -> None:
    kill_and_compare(tmp_path, kills=50, epochs=300)


# a disk that is full -------------------------------------------------------------------------------------------------

LIMITED = """
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
sys.argv = [{script!r}, *sys.argv[1:]]
runpy.run_path({script!r}, run_name="__main__")
"""


def run_limited(limit: int, *arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The script under a limit on the size of any file it writes: the kernel refuses the write in its middle."""
    code = LIMITED.format(limit=limit, script=str(SCRIPT))
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=120)


def test_a_write_that_the_disk_refuses_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    make_data(tmp_path, train=STEPS)
    config = write_config(tmp_path, num_epochs=1)
    assert run_script("--mode", "train", "--config", config, cwd=tmp_path).returncode == 0
    good = tmp_path / "ckpt" / "checkpoint_epoch_1.pth"
    content, names = good.read_bytes(), files_under(tmp_path / "ckpt")
    resume = ["--mode", "train", "--resume", good, "--set", "num_epochs=2"]
    done = run_limited(good.stat().st_size // 2, *resume, cwd=tmp_path)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    assert "checkpoint_epoch_2.pth" in lines[0] and "free space" in lines[0]
    assert good.read_bytes() == content and files_under(tmp_path / "ckpt") == names
    assert run_script(*resume, cwd=tmp_path).returncode == 0  # with room again it goes on


def test_an_enhancement_that_the_disk_refuses_leaves_nothing(tmp_path: Path) -> None:
    make_data(tmp_path, train=STEPS)
    config = write_config(tmp_path, num_epochs=1)
    assert run_script("--mode", "train", "--config", config, cwd=tmp_path).returncode == 0
    before = files_under(tmp_path)
    weights, low = tmp_path / "ckpt" / "best_model.pth", tmp_path / "data" / "eval" / "low" / "0.png"
    done = run_limited(
        300, "--mode", "enhance", "--checkpoint", weights, "--input", low, "--output", tmp_path / "o.png", cwd=tmp_path
    )
    assert_one_line_error(done.returncode, done.stderr, "o.png", "free space")
    assert files_under(tmp_path) == before


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_one_line(tmp_path: Path) -> None:
    make_data(tmp_path, train=STEPS)
    config = write_config(tmp_path, num_epochs=1)
    (tmp_path / "ckpt").mkdir(mode=0o500)
    done = run_script("--mode", "train", "--config", config, cwd=tmp_path)
    assert_one_line_error(done.returncode, done.stderr, "ckpt")
