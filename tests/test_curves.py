"""What evaluations add to a run's curves, and the commit that made weights and scores."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_tools import files_under, main_with, make_data, run_script, tiny_config, write_config
from conftest import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import model_script as ms
from support import runtime
from support.curves import is_run_name, run_folder
from support.settings import UserError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and a run of 2 epochs of 3 steps."""
    folder = make_data(tmp_path_factory.mktemp("shop"), train=3)
    assert main_with("train", tiny_config(folder)) == 0
    return folder


def evaluate(folder: Path, results: Path) -> dict[str, Any]:
    """The summary of an evaluation of the run's last weights."""
    settings = tiny_config(folder, results_dir=str(results))
    weights = folder / "ckpt" / "checkpoint_epoch_2.pth"
    assert main_with("evaluate", settings, "--checkpoint", weights) == 0
    (path,) = results.glob("eval_*/summary.json")
    return json.loads(path.read_text(encoding="utf-8"))


def test_an_evaluation_appears_beside_the_run_that_made_the_weights(
    shop: Path, tmp_path: Path
) -> None:
    config = write_config(shop, results_dir=str(tmp_path / "results"))
    weights = ("--checkpoint", "ckpt/checkpoint_epoch_2.pth")
    done = run_script("--mode", "evaluate", *weights, "--config", config, cwd=shop)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "results").glob("eval_*/summary.json")
    summary = json.loads(path.read_text(encoding="utf-8"))
    (run,) = (shop / "logs").iterdir()
    assert f"curves: the means are points of {run}" in done.stdout
    events = EventAccumulator(str(run), size_guidance={"tensors": 0}).Reload()
    for name, entry in summary["metrics"].items():
        (point,) = events.Scalars(f"evaluation/{name}")
        assert point.step == 6 and point.value == pytest.approx(entry["mean"], rel=1e-5)
    (text,) = events.Tensors("evaluation/details/text_summary")
    assert str(path.parent) in text.tensor_proto.string_val[0].decode()


def test_without_the_run_no_folder_is_made(shop: Path, tmp_path: Path) -> None:
    shutil.copytree(shop / "data", tmp_path / "data")
    shutil.copytree(shop / "ckpt", tmp_path / "ckpt")
    path = tmp_path / "ckpt" / "checkpoint_epoch_2.pth"
    content = torch.load(path, weights_only=True)
    content["config"]["log_dir"] = str(tmp_path / "logs")
    torch.save(content, path)
    evaluate(tmp_path, tmp_path / "results")
    assert not (tmp_path / "logs").exists()


def test_curves_that_cannot_be_written_cost_no_evaluation(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(folder: Path) -> None:
        raise UserError(f"{folder}: cannot write (no space left on device)")

    monkeypatch.setattr("support.curves.curves_in", full)
    assert evaluate(shop, tmp_path / "results")["num_images"] == 1
    assert "curves: " in capsys.readouterr().out


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "../a", 5, None, "a\0b"])
def test_odd_names_of_runs_lead_nowhere(tmp_path: Path, name: Any) -> None:
    (tmp_path / "events.out.tfevents.1").write_bytes(b"")
    assert not is_run_name(name)
    checkpoint = {"config": {"log_dir": str(tmp_path / "logs")}, "run_id": name}
    assert run_folder(checkpoint) is None


def test_a_folder_is_a_runs_only_with_curves_in_it(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    checkpoint = {"config": {"log_dir": str(tmp_path)}, "run_id": "run"}
    assert run_folder(checkpoint) is None
    (tmp_path / "run" / "events.out.tfevents.1").write_bytes(b"")
    assert run_folder(checkpoint) == tmp_path / "run"
    for odd in (5, None, "a" * 9999):
        assert run_folder({"config": {"log_dir": odd}, "run_id": "run"}) is None
    before = files_under(tmp_path)
    assert run_folder({"config": {}, "run_id": "run"}) is None and files_under(tmp_path) == before


# the commit ---------------------------------------------------------------------------------------


@pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"), reason="no git")
def test_weights_scores_and_curves_name_the_commit(shop: Path, tmp_path: Path) -> None:
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    path = shop / "ckpt" / "best_model.pth"
    assert torch.load(path, weights_only=True)["commit"] == commit
    summary = evaluate(shop, tmp_path / "results")
    assert summary["commit"] == summary["checkpoint_commit"] == commit
    (run,) = (shop / "logs").iterdir()
    events = EventAccumulator(str(run), size_guidance={"tensors": 0}).Reload()
    (text,) = events.Tensors("commit/text_summary")
    assert text.tensor_proto.string_val[0].decode() == commit


def test_without_git_there_is_no_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert runtime.git_commit.__wrapped__() == ""
    monkeypatch.undo()
    (tmp_path / "support").mkdir()
    monkeypatch.setattr(runtime, "__file__", str(tmp_path / "support" / "runtime.py"))
    assert runtime.git_commit.__wrapped__() == ""
    (tmp_path / ".git").write_text("gitdir: nowhere")
    assert runtime.git_commit.__wrapped__() == ""


def test_odd_commits_of_a_checkpoint_are_passed_over() -> None:
    for odd in (5, None, "a" * 65, torch.zeros(3)):
        assert runtime.commits({"commit": odd})["checkpoint_commit"] == ""
    assert runtime.commits({"commit": "abc"})["checkpoint_commit"] == "abc"
    assert runtime.commits({}) == {"commit": runtime.git_commit(), "checkpoint_commit": ""}
    assert ms.git_commit is runtime.git_commit
