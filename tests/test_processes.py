"""Several processes under torchrun do what one does: the same losses, rows and pictures.

Killed ones restart.
"""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_tools import (
    SCRIPT,
    dark_picture,
    differing,
    environment,
    make_data,
    parsed,
    run_script,
    save_picture,
    target_picture,
    write_config,
)
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import model_script as ms
from support.checkpoints import refuse_other_run, resume_from
from support.processes import (
    all_gather,
    all_reduce,
    broadcast,
    divide,
    process_group,
    rank,
    shard,
    world_size,
)
from support.settings import UserError

STEPS = 20


def torchrun(
    *arguments: str | Path, cwd: Path, script: Path = SCRIPT, restarts: int = 0, count: int = 2
) -> subprocess.CompletedProcess[str]:
    """The finished job of `count` processes on this machine."""
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={count}",
    ]
    return subprocess.run(
        [*launch, f"--max_restarts={restarts}", str(script), *map(str, arguments)],
        cwd=cwd,
        env=environment() | {"PYTHONPATH": str(SCRIPT.parent)},
        capture_output=True,
        text=True,
        timeout=400,
    )


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and config.json: 20 epochs of one step of 5 pairs, so that every step's
    loss is logged."""
    folder = make_data(tmp_path_factory.mktemp("job"), train=5, val=3, evaluation=5)
    write_config(
        folder, batch_size=5, num_epochs=STEPS, val_freq=STEPS, save_freq=5, keep_checkpoints=9
    )
    return folder


def outputs(folder: Path) -> list[str]:
    """--set arguments that make a run write below `folder`."""
    return [
        text
        for kind, name in (("checkpoint", "ckpt"), ("log", "logs"), ("results", "results"))
        for text in ("--set", f"{kind}_dir={folder / name}")
    ]


def curves(folder: Path) -> dict[str, list[float]]:
    """Every scalar that a run logged, by name; the clock's apart."""
    (run,) = (folder / "logs").glob("*")
    events = EventAccumulator(str(run)).Reload()
    names = [
        name for name in events.Tags()["scalars"] if "second" not in name and "hparam" not in name
    ]
    return {name: [event.value for event in events.Scalars(name)] for name in names}


@pytest.fixture(scope="module")
def alone(job: Path) -> Path:
    """The folder of the run by one process."""
    folder = job / "alone"
    done = run_script("--mode", "train", "--config", job / "config.json", *outputs(folder), cwd=job)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def together(job: Path) -> Path:
    """The folder of the same run by two processes."""
    folder = job / "together"
    done = torchrun("--mode", "train", "--config", job / "config.json", *outputs(folder), cwd=job)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("best weights:") == 1  # the second process is silent
    return folder


def assert_same_curves(one: dict[str, list[float]], other: dict[str, list[float]]) -> None:
    assert one.keys() == other.keys() and len(one["loss/total"]) == STEPS
    assert len(set(one["loss/total"])) == STEPS
    for name, values in one.items():
        assert np.allclose(values, other[name], rtol=0, atol=1e-4), name


def test_two_processes_repeat_the_losses_of_one(alone: Path, together: Path) -> None:
    assert_same_curves(curves(alone), curves(together))
    one, two = (
        torch.load(f / "ckpt" / "best_model.pth", weights_only=True)["model"]
        for f in (alone, together)
    )
    assert all(torch.allclose(one[name], two[name], atol=1e-3) for name in one)


def test_accumulation_repeats_the_losses_of_one_go(job: Path, alone: Path) -> None:
    folder = job / "accumulated"
    extra = ["--set", "accumulate=3"]
    done = run_script(
        "--mode", "train", "--config", job / "config.json", *outputs(folder), *extra, cwd=job
    )
    assert done.returncode == 0, done.stderr
    assert_same_curves(curves(alone), curves(folder))


def test_accumulation_in_two_processes_repeats_them_too(job: Path, alone: Path) -> None:
    folder = job / "accumulated_together"
    extra = ["--set", "accumulate=2"]  # of 3 and 2 pairs
    done = torchrun(
        "--mode", "train", "--config", job / "config.json", *outputs(folder), *extra, cwd=job
    )
    assert done.returncode == 0, done.stderr
    assert_same_curves(curves(alone), curves(folder))


KILLED = """
import os, signal, sys
import model_script as ms

class Killed(ms.ConditionalFlow):
    def losses(self, batch):
        killed = os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        self.calls = getattr(self, "calls", 0) + 1
        if killed and self.calls == 13:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().losses(batch)

sys.exit(ms.main(None, Killed))
"""


def test_a_killed_process_is_restarted_and_the_run_ends_the_same(job: Path, together: Path) -> None:
    folder, script = job / "killed", job / "killed.py"
    script.write_text(KILLED)
    done = torchrun(
        "--mode",
        "train",
        "--config",
        job / "config.json",
        *outputs(folder),
        cwd=job,
        script=script,
        restarts=1,
    )
    assert done.returncode == 0, done.stderr
    assert "steps 10 to 20" in done.stdout  # step 13 was lost, the checkpoint of step 10 was not
    last = f"ckpt/checkpoint_epoch_{STEPS}.pth"
    one, two = (torch.load(f / last, weights_only=True) for f in (together, folder))
    assert not differing(one["model"], two["model"]) and not differing(
        one["training"]["model"], two["training"]["model"]
    )


THREADS = """
import os, sys
from pathlib import Path
import model_script as ms

status = ms.main()
names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
left = [name for name in names if "gloo" in name]
sys.exit(f"{left} outlived their group" if left else status)
"""


@pytest.mark.skipif(
    not Path("/proc/self/task").is_dir(), reason="reads the names of threads from Linux's /proc"
)
def test_no_thread_of_the_group_outlives_it(job: Path) -> None:
    """One that asks for the interpreter's lock while that shuts down aborts the process, and so the
    finished job."""
    folder, script = job / "threads", job / "threads.py"
    script.write_text(THREADS)
    few = ["--set", "num_epochs=2", "--set", "val_freq=1"]
    done = torchrun(
        "--mode",
        "train",
        "--config",
        job / "config.json",
        *outputs(folder),
        *few,
        cwd=job,
        script=script,
    )
    assert done.returncode == 0, done.stderr


def test_a_restart_goes_on_and_a_first_start_never_takes_up_an_older_run(
    together: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = together / "ckpt" / f"checkpoint_epoch_{STEPS}.pth"
    folder = tmp_path / "ckpt"
    shutil.copytree(together / "ckpt", folder)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert resume_from(None, folder) == str(folder / newest.name)
    assert resume_from(None, tmp_path) is None  # it died before its first checkpoint
    # a first start is no restart: what lies there is another run's, and is refused
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert resume_from(None, folder) is None
    with pytest.raises(UserError, match="holds another run"):
        refuse_other_run(folder)


def test_a_resumed_run_is_restarted_from_its_own_newest_checkpoint(
    together: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder stands in the checkpoint: neither --config nor --set names it."""
    weights, started = together / "ckpt", []
    monkeypatch.setattr(
        ms,
        "Trainer",
        lambda config, use, system, resume: started.append((config, resume)) or Finished(),
    )
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "night")
    first = weights / "checkpoint_epoch_5.pth"
    arguments = parsed(["--mode", "train", "--resume", str(first)])
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert ms.train(arguments, ms.ConditionalFlow) == 0
    ((config, resume),) = started
    assert resume == str(
        weights / f"checkpoint_epoch_{STEPS}.pth"
    ) and config.checkpoint_dir == str(weights)


class Finished:
    """A training that has nothing left to do."""

    def fit(self) -> int:
        return 0


def test_restarts_on_several_hosts_need_a_store_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = dict(
        TORCHELASTIC_RUN_ID="night",
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_MAX_RESTARTS="3",
    )
    told |= dict(GROUP_WORLD_SIZE="2", WORLD_SIZE="2", LOCAL_WORLD_SIZE="1", LOCAL_RANK="0")
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(UserError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"),
        process_group("train", "cpu"),
    ):
        pass


def test_evaluation_by_two_processes_writes_the_same_rows(job: Path, together: Path) -> None:
    tables = []
    for name, run in (("one", run_script), ("two", torchrun)):
        arguments = ["--mode", "evaluate", "--config", job / "config.json", *outputs(job / name)]
        done = run(*arguments, "--checkpoint", together / "ckpt" / "best_model.pth", cwd=job)
        assert done.returncode == 0, done.stderr
        (folder,) = (job / name / "results").glob("eval_*")
        assert (folder / "overview.png").exists() and len(
            list((folder / "images").glob("*_viz.png"))
        ) == 5
        with open(folder / "metrics.csv", newline="") as stream:
            tables.append(
                [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(stream)]
            )
        assert not [
            path for path in (job / name / "results").iterdir() if path.name.startswith(".")
        ]
    assert len(tables[0]) == 5 and tables[0] == tables[1]


def test_a_folder_is_shared_out_and_listed_once(job: Path, together: Path) -> None:
    inputs = job / "inputs"
    for seed in range(5):
        save_picture(inputs / f"{seed}.png", dark_picture(target_picture(seed), seed))
    (inputs / "broken.png").write_bytes(b"no picture")
    for name, run in (("out1", run_script), ("out2", torchrun)):
        weights = ["--checkpoint", together / "ckpt" / "best_model.pth"]
        done = run(
            "--mode", "enhance", *weights, "--input", inputs, "--output", job / name, cwd=job
        )
        assert done.returncode == 1 and done.stderr.count("failed: ") == 1, done.stderr
    for seed in range(5):
        assert (job / "out1" / f"{seed}.png").read_bytes() == (
            job / "out2" / f"{seed}.png"
        ).read_bytes()
    names = [
        [row["file"] for row in csv.DictReader((job / n / "enhance.csv").open())]
        for n in ("out1", "out2")
    ]
    assert names[0] == names[1] and len(names[0]) == 6


def test_work_for_one_process_is_refused(tmp_path: Path) -> None:
    done = torchrun("--mode", "demo", cwd=tmp_path)
    assert done.returncode != 0 and "error: --mode demo is the work of one process" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_mistake_is_told_and_leaves_nothing(job: Path, tmp_path: Path) -> None:
    arguments = [
        "--config",
        job / "config.json",
        *outputs(tmp_path),
        "--set",
        f"train_low_dir={tmp_path / 'nowhere'}",
    ]
    done = torchrun("--mode", "train", *arguments, cwd=tmp_path)
    assert done.returncode != 0 and "error: train_low_dir" in done.stderr
    assert 'model_script.py", line' not in done.stderr
    assert not list(tmp_path.iterdir())


@given(count=st.integers(1, 40), of=st.integers(1, 9), parts=st.integers(1, 9))
def test_processes_and_parts_divide_a_batch_without_rest(count: int, of: int, parts: int) -> None:
    batch = list(range(count))
    shares = [divide(batch, place, of, parts) for place in range(of)]
    assert [
        item for share in shares for chunk, weight in share if weight for item in chunk
    ] == batch
    assert sum(weight for share in shares for _, weight in share) == pytest.approx(1)
    assert all(share and all(chunk for chunk, _ in share) for share in shares)


def test_one_process_needs_no_group() -> None:
    assert (rank(), world_size()) == (0, 1)
    assert broadcast("x") == "x" and all_gather(3) == [3] and list(shard([1, 2])) == [1, 2]
    assert all_reduce(torch.ones(2)).tolist() == [1, 1]
    assert "RANK" not in os.environ
