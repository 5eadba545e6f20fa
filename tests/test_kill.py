"""A run that is killed at any moment loses no finished epoch.

It ends with the weights of a run that nobody disturbed. A full disk costs no checkpoint. A folder
that cannot be written to is reported before the first step.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_tools import (
    SCRIPT,
    assert_one_line_error,
    command,
    differing,
    environment,
    files_under,
    make_data,
    run_script,
    write_config,
)

from support.files import write_bytes

ROOT = SCRIPT.parent
STEPS = 4  # of an epoch
PR_SET_SECUREBITS, SECBIT_NOROOT = 28, 1  # prctl(2), capabilities(7)


def test_who_reads_a_file_that_is_written_anew_reads_the_old_one_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(b"old")
    with open(path, "rb", buffering=0) as reader:
        write_bytes(path, b"newer")
        assert reader.read() == b"old" and path.read_bytes() == b"newer"
    assert files_under(tmp_path) == {"weights.pth"}


def rehearse(folder: Path, kills: int, epochs: int, seed: int = 0) -> list[dict[str, Any]]:
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
    return {
        "training": training,
        "averaged": last["model"],
        "best": best["model"],
        "best epoch": best["epoch"],
    }


def kill_and_compare(folder: Path, kills: int, epochs: int) -> Counter[str]:
    """Kill a run, check that it lost nothing, and count what it was about when it died; `torn` are
    half-written files."""
    rehearse(folder / "calm", 0, epochs)
    lives = rehearse(folder / "killed", kills, epochs)
    assert len(lives) == kills
    # the child's own word against the folder's: what it said to be saved is there, and the next one
    # goes on from there
    for life, saved in zip(
        lives, itertools.accumulate((life["finished"] for life in lives), max), strict=True
    ):
        assert life["found"] >= saved and life["found"] % STEPS == 0
    for earlier, later in itertools.pairwise([{"found": 0}, *lives]):
        assert later["began"] in (None, earlier["found"])
    assert not differing(
        final_state(folder / "calm", epochs), final_state(folder / "killed", epochs)
    )
    kept = {f"checkpoint_epoch_{epoch}.pth" for epoch in range(epochs - 2, epochs + 1)} | {
        "best_model.pth"
    }
    names = {path.name for path in (folder / "killed" / "ckpt").iterdir()}
    # none that a kill kept from being removed
    assert {name for name in names if not name.startswith(".")} == kept
    return Counter(word for life in lives for word in [*life["within"], *["torn"] * life["torn"]])


def test_six_kills_change_nothing(tmp_path: Path) -> None:
    hits = kill_and_compare(tmp_path, kills=6, epochs=50)
    assert hits.total() >= 3, hits  # most of them in the midst of something


@pytest.mark.slow
def test_fifty_kills_change_nothing(tmp_path: Path) -> None:
    hits = kill_and_compare(tmp_path, kills=50, epochs=400)
    assert all(hits[kind] >= 3 for kind in ("step", "validation", "checkpoint", "best", "torn")), (
        hits
    )


# a disk that is full ------------------------------------------------------------------------------

LIMITED = """
import pathlib, resource, runpy, signal, sys
sys.path.insert(0, str(pathlib.Path({script!r}).parent))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
sys.argv = [{script!r}, *sys.argv[1:]]
runpy.run_path({script!r}, run_name="__main__")
"""


def run_limited(limit: int, *arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The script under a limit on the size of any file it writes: the kernel refuses the write in
    its middle."""
    code = LIMITED.format(limit=limit, script=str(SCRIPT))
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )


def assert_one_error_beside_the_bars(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """The promise of every mistake, where progress bars share stderr with it."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    for word in words:
        assert word in lines[0], lines[0]


def test_a_write_that_the_disk_refuses_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    make_data(tmp_path, train=STEPS)
    config = write_config(tmp_path, num_epochs=1)
    assert run_script("--mode", "train", "--config", config, cwd=tmp_path).returncode == 0
    good = tmp_path / "ckpt" / "checkpoint_epoch_1.pth"
    content, names = good.read_bytes(), files_under(tmp_path / "ckpt")
    resume: list[str | Path] = ["--mode", "train", "--resume", good, "--set", "num_epochs=2"]
    done = run_limited(good.stat().st_size // 2, *resume, cwd=tmp_path)
    assert_one_error_beside_the_bars(done, "checkpoint_epoch_2.pth", "free space")
    assert good.read_bytes() == content and files_under(tmp_path / "ckpt") == names
    assert run_script(*resume, cwd=tmp_path).returncode == 0  # with room again it goes on


# the curves' file has no room for its first record, or for its third epoch's
@pytest.mark.parametrize("limit", [64, 1500])
def test_curves_that_the_disk_refuses_are_one_line(limit: int, tmp_path: Path) -> None:
    make_data(tmp_path, train=STEPS)
    # nothing else is written in nine epochs
    config = write_config(tmp_path, num_epochs=10, val_freq=10, save_freq=10)
    done = run_limited(limit, "--mode", "train", "--config", config, cwd=tmp_path)
    assert_one_error_beside_the_bars(done, str(tmp_path / "logs"), "free space")
    assert not list((tmp_path / "ckpt").glob("*.pth"))


def test_an_enhancement_that_the_disk_refuses_leaves_nothing(tmp_path: Path) -> None:
    make_data(tmp_path, train=STEPS)
    config = write_config(tmp_path, num_epochs=1)
    assert run_script("--mode", "train", "--config", config, cwd=tmp_path).returncode == 0
    before = files_under(tmp_path)
    weights, low = (
        tmp_path / "ckpt" / "best_model.pth",
        tmp_path / "data" / "eval" / "low" / "0.png",
    )
    done = run_limited(
        300,
        "--mode",
        "enhance",
        "--checkpoint",
        weights,
        "--input",
        low,
        "--output",
        tmp_path / "o.png",
        cwd=tmp_path,
    )
    assert_one_line_error(done.returncode, done.stderr, "o.png", "free space")
    assert files_under(tmp_path) == before


# folders that cannot be written to ----------------------------------------------------------------

LIBC = ctypes.CDLL(None)


def lay_down_roots_rights() -> None:
    """From the next exec on root is bound by a folder's permissions, as any owner is; says nothing
    where it cannot be."""
    if hasattr(LIBC, "prctl"):
        LIBC.prctl(PR_SET_SECUREBITS, ctypes.c_ulong(SECBIT_NOROOT), *[ctypes.c_ulong(0)] * 3)


def run_bound(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A process that may write where permissions let it, whoever runs the tests."""
    return subprocess.run(
        arguments,
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lay_down_roots_rights,
    )


@pytest.mark.parametrize("name", ["ckpt", "logs"])
def test_a_read_only_folder_is_one_line_before_the_first_step(name: str, tmp_path: Path) -> None:
    make_data(tmp_path, train=STEPS)
    config = write_config(tmp_path, num_epochs=1)
    (tmp_path / name).mkdir(mode=0o500)
    if (
        run_bound(
            sys.executable, "-c", f"open({str(tmp_path / name / 'probe')!r}, 'w')", cwd=tmp_path
        ).returncode
        == 0
    ):
        pytest.skip("root may write anywhere, and cannot lay down its rights here")
    done = run_bound(*command("--mode", "train", "--config", config), cwd=tmp_path)
    assert_one_error_beside_the_bars(done, str(tmp_path / name))
    assert "epoch 1/1" not in done.stderr and not list(tmp_path.rglob("*.pth"))
    assert not list((tmp_path / name).iterdir())
