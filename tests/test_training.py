"""Training as a whole: it learns, resumes bit for bit, keeps its checkpoints and reports."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_tools import (
    TINY,
    assert_one_line_error,
    differing,
    main_with,
    make_data,
    make_pairs,
    run_script,
    start_script,
    stop_when,
    tiny_config,
    write_config,
)
from torch import Tensor, nn

import model_script as ms
from support.checkpoints import FORMAT_VERSION, stored_config
from support.runtime import cpp_compiler
from support.settings import build, knob

EPOCHS, STEPS = 5, 4  # of the run that the resumed ones must repeat; STEPS pairs, one a step


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny training, validation and evaluation pairs."""
    return make_data(tmp_path_factory.mktemp("data"), train=STEPS)


def settings_in(data: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """The tiny settings, reading `data` and writing below `folder`."""
    outputs = {
        f"{kind}_dir": str(folder / name)
        for kind, name in (("checkpoint", "ckpt"), ("log", "logs"), ("results", "res"))
    }
    return tiny_config(data) | outputs | changes


def content(path: Path) -> dict[str, Any]:
    """A checkpoint, read the safe way."""
    return torch.load(path, weights_only=True)


def state(path: Path) -> dict[str, Any]:
    """What two equal runs must share: all but the clock, the run's name and where it writes."""
    found = content(path)
    training = {key: value for key, value in found["training"].items() if key != "minutes"}
    return {"model": found["model"], "epoch": found["epoch"], "training": training}


def model_that(act: Any) -> type[ms.System]:
    """The model, but `act(call, terms)` sees the losses of each call in training, counted from 1,
    and returns them."""
    calls = [0]

    class Acting(ms.ConditionalFlow):
        def losses(self, batch: ms.Sample) -> dict[str, Tensor]:
            if not self.training:  # of validation
                return super().losses(batch)
            calls[0] += 1
            return act(calls[0], super().losses(batch), self)

    return Acting


def interrupt_at(step: int) -> type[ms.System]:
    """The model of a user who presses Ctrl-C during that step, counted from 1."""

    def act(call: int, terms: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        if call == step:
            os.kill(os.getpid(), signal.SIGINT)
        return terms

    return model_that(act)


@pytest.fixture(scope="module")
def straight(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nobody interrupts; it keeps every epoch's checkpoint."""
    folder = tmp_path_factory.mktemp("straight")
    assert (
        main_with("train", settings_in(data, folder, num_epochs=EPOCHS, keep_checkpoints=100)) == 0
    )
    return folder


def resume(checkpoint: Path, folder: Path, *arguments: str) -> int:
    """Go on from `checkpoint` with what it recorded, writing weights below `folder`."""
    outputs = ["--set", f"checkpoint_dir={folder / 'ckpt'}", "--set", f"log_dir={folder / 'logs'}"]
    return ms.main(["--mode", "train", "--resume", str(checkpoint), *outputs, *arguments])


# learning -----------------------------------------------------------------------------------------


def test_overfits_two_pairs_to_30_db(tmp_path: Path) -> None:
    make_pairs(tmp_path / "data" / "train", 2)
    same = {f"val_{kind}_dir": str(tmp_path / "data" / "train" / kind) for kind in ("low", "high")}
    still = dict(
        flips=False, exposure_gain=0.0, channel_gain=0.0, window_min=1.0, global_dropout=0.0
    )
    schedule = dict(
        num_epochs=150,
        val_freq=150,
        save_freq=150,
        learning_rate=1e-2,
        warmup_steps=10,
        ema_decay=0.9,
    )
    settings = tiny_config(
        tmp_path, flow_channels=16, batch_size=2, nll_weight=0.1, **schedule, **same, **still
    )
    assert main_with("train", settings) == 0
    assert content(tmp_path / "ckpt" / "best_model.pth")["validation"]["psnr"] >= 30


def test_every_step_is_repeatable(straight: Path, data: Path, tmp_path: Path) -> None:
    assert (
        main_with("train", settings_in(data, tmp_path, num_epochs=EPOCHS, keep_checkpoints=100))
        == 0
    )
    last = f"ckpt/checkpoint_epoch_{EPOCHS}.pth"
    assert not differing(state(straight / last), state(tmp_path / last))
    assert differing(state(straight / "ckpt/checkpoint_epoch_1.pth"), state(straight / last))


# resuming -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("epoch", [1, 3])
def test_resuming_after_an_epoch_equals_the_uninterrupted_run(
    straight: Path, tmp_path: Path, epoch: int
) -> None:
    assert resume(straight / "ckpt" / f"checkpoint_epoch_{epoch}.pth", tmp_path) == 0
    last = f"ckpt/checkpoint_epoch_{EPOCHS}.pth"
    assert not differing(state(straight / last), state(tmp_path / last))


@pytest.mark.parametrize(
    "step",
    [1, STEPS + 2, 2 * STEPS, EPOCHS * STEPS],
    ids=["first", "mid-epoch", "epoch-end", "last"],
)
def test_resuming_after_ctrl_c_equals_the_uninterrupted_run(
    straight: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], step: int
) -> None:
    settings = settings_in(data, tmp_path, num_epochs=EPOCHS, keep_checkpoints=100)
    status = main_with("train", settings, system=interrupt_at(step))
    if step < EPOCHS * STEPS:
        assert status == 130
        path = tmp_path / "ckpt" / "checkpoint_interrupted.pth"
        lines = [
            line
            for line in re.split(r"[\r\n]+", "".join(capsys.readouterr()))
            if "--resume" in line
        ]
        assert len(lines) == 1
        assert f"stopped at step {step}" in lines[0]
        assert str(path) in lines[0]
        assert content(path)["training"]["step"] == step
    else:  # nothing is left to do, so the run may end as usual or be resumed
        assert status in (0, 130)
    if status == 130:
        assert resume(tmp_path / "ckpt" / "checkpoint_interrupted.pth", tmp_path) == 0
    last = f"ckpt/checkpoint_epoch_{EPOCHS}.pth"
    assert not differing(state(straight / last), state(tmp_path / last))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill -9"])
def test_resuming_a_stopped_process_equals_the_uninterrupted_run(
    straight: Path, data: Path, tmp_path: Path, number: signal.Signals
) -> None:
    settings = settings_in(data, tmp_path, num_epochs=EPOCHS, keep_checkpoints=100)
    config = write_config(tmp_path, **settings)
    process = start_script("--mode", "train", "--config", config, cwd=tmp_path)
    printed = stop_when(process, tmp_path / "ckpt" / "checkpoint_epoch_1.pth", number)
    if number == signal.SIGINT:
        assert process.returncode == 130, printed
        assert printed.count("--resume") == 1
        assert "Traceback" not in printed
        checkpoint = tmp_path / "ckpt" / "checkpoint_interrupted.pth"
    else:
        assert process.returncode == -signal.SIGKILL, printed
        checkpoint = max(
            (tmp_path / "ckpt").glob("checkpoint_epoch_*.pth"),
            key=lambda p: int(p.stem.split("_")[-1]),
        )
    assert content(checkpoint)["training"]["step"] < EPOCHS * STEPS
    assert resume(checkpoint, tmp_path) == 0
    last = f"ckpt/checkpoint_epoch_{EPOCHS}.pth"
    assert not differing(state(straight / last), state(tmp_path / last))


@pytest.mark.slow  # a minute and a half of compilation
@pytest.mark.skipif(not shutil.which(cpp_compiler()), reason="no C++ compiler")
def test_compiled_training_has_the_same_losses(data: Path, tmp_path: Path) -> None:
    """Over 20 steps, dropout and dequantisation noise included."""
    curves = []
    for compiled in (False, True):
        given = settings_in(data, tmp_path, compile=compiled, global_dropout=0.5)
        parts = [build(kind, given, "here") for kind in (ms.Config, ms.Use)]
        trainer = ms.Trainer(*parts, ms.ConditionalFlow)
        assert hasattr(trainer.parallel, "_orig_mod") == compiled
        trainer.model.train()
        batches = trainer._loader([[ms.Draw(0, step % STEPS)] for step in range(20)])
        curves.append([trainer._train_step([(batch, 1.0)])[0] for batch in batches])
    for eager, other in zip(*curves, strict=True):
        assert other.pop("nll") == pytest.approx(eager.pop("nll"), abs=1e-3)
        assert other == pytest.approx(eager, abs=5e-5)  # other noise changes them by 1e-3


def test_compiling_without_a_compiler_is_one_line(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert main_with("train", settings_in(data, tmp_path, compile=True)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(
        "error: compile: needs a C++ compiler, and no-such-compiler is not here"
    )
    assert "--set compile=false" in error
    assert not (tmp_path / "ckpt").exists()


def test_a_compiler_that_fails_is_one_line(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "false")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    config = write_config(tmp_path, **settings_in(data, tmp_path, compile=True))
    done = run_script("--mode", "train", "--config", config, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: compile: ")
    assert error.endswith("; use --set compile=false")


def test_resuming_weights_without_training_state_is_one_line(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert resume(straight / "ckpt" / "best_model.pth", tmp_path) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert "holds weights only" in error and "init_from" in error


def test_a_finished_run_can_be_prolonged(straight: Path, tmp_path: Path) -> None:
    checkpoint = straight / "ckpt" / f"checkpoint_epoch_{EPOCHS}.pth"
    assert resume(checkpoint, tmp_path, "--set", f"num_epochs={EPOCHS + 1}") == 0
    after = content(tmp_path / "ckpt" / f"checkpoint_epoch_{EPOCHS + 1}.pth")
    assert after["training"]["step"] == (EPOCHS + 1) * STEPS
    assert differing(content(checkpoint)["model"], after["model"])


def test_init_from_starts_from_the_weights(straight: Path, data: Path, tmp_path: Path) -> None:
    source = straight / "ckpt" / "best_model.pth"
    settings = settings_in(
        data,
        tmp_path,
        init_from=str(source),
        num_epochs=1,
        learning_rate=1e-8,
        weight_decay=0.0,
        ema_decay=0.0,
    )
    assert main_with("train", settings) == 0
    started, after = content(source)["model"], content(tmp_path / "ckpt" / "checkpoint_epoch_1.pth")
    assert all(
        torch.allclose(started[name], value, atol=1e-6) for name, value in after["model"].items()
    )
    assert after["training"]["step"] == STEPS


def test_the_start_is_the_first_candidate_for_the_best_weights(
    straight: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training whose scores only fall leaves the weights that it started from."""
    falling = iter([{"psnr": 20.0}, {"psnr": 10.0}])
    monkeypatch.setattr(
        ms.metrics, "validation_means", lambda scores: ((row := next(falling)), row["psnr"])
    )
    source = straight / "ckpt" / "best_model.pth"
    assert main_with("train", settings_in(data, tmp_path, init_from=str(source), num_epochs=1)) == 0
    best = content(tmp_path / "ckpt" / "best_model.pth")
    last = content(tmp_path / "ckpt" / "checkpoint_epoch_1.pth")
    assert not differing(best["model"], content(source)["model"])
    assert best["epoch"] == best["step"] == 0 and last["step"] == STEPS
    assert best["validation"]["psnr"] == last["training"]["best"]
    (folder,) = (tmp_path / "logs").iterdir()
    points = events_in(folder).Scalars("validation/psnr")
    assert [point.step for point in points] == [0, STEPS]
    assert [point.value for point in points] == [20, 10]


def test_a_resumed_run_is_not_validated_at_its_start(
    straight: Path, data: Path, tmp_path: Path
) -> None:
    source = straight / "ckpt" / "best_model.pth"
    settings = settings_in(data, tmp_path, init_from=str(source), num_epochs=1)
    assert main_with("train", settings) == 0
    assert main_with("train", settings | {"num_epochs": 2}, "--resume", tmp_path / "ckpt") == 0
    (folder,) = (tmp_path / "logs").iterdir()
    steps = [point.step for point in events_in(folder).Scalars("validation/psnr")]
    assert steps == [0, STEPS, 2 * STEPS]


# schedule and averaging ---------------------------------------------------------------------------


def test_learning_rate_schedule() -> None:
    config = ms.Config(learning_rate=2.0, warmup_steps=10)
    assert ms.learning_rate_at(0.0, 0, config) == pytest.approx(0.2)
    assert ms.learning_rate_at(0.0, 4, config) == pytest.approx(1.0)
    assert ms.learning_rate_at(0.0, 9, config) == pytest.approx(2.0)
    assert ms.learning_rate_at(0.0, 500, config) == pytest.approx(2.0)
    assert ms.learning_rate_at(0.5, 500, config) == pytest.approx(2.0 * 0.505)
    assert ms.learning_rate_at(0.25, 500, config) == pytest.approx(
        2.0 * (0.01 + 0.99 * (1 + math.sqrt(0.5)) / 2)
    )
    assert ms.learning_rate_at(1.0, 500, config) == pytest.approx(0.02)
    assert ms.learning_rate_at(1.5, 500, config) == pytest.approx(0.02)
    assert ms.learning_rate_at(
        0.0, 0, dataclasses.replace(config, warmup_steps=0)
    ) == pytest.approx(2.0)


def test_a_run_follows_the_schedule_to_its_end(straight: Path) -> None:
    for epoch in (1, EPOCHS):
        step = epoch * STEPS - 1
        share = step / (EPOCHS * STEPS)
        expected = (
            TINY["learning_rate"]
            * min(1, (step + 1) / 2)
            * (0.01 + 0.99 * (1 + math.cos(math.pi * share)) / 2)
        )
        groups = content(straight / "ckpt" / f"checkpoint_epoch_{epoch}.pth")["training"][
            "optimizer"
        ]["param_groups"]
        assert [group["lr"] for group in groups] == pytest.approx([expected] * len(groups))


def test_averaged_weights_equal_a_hand_written_loop() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    averaged = ms.averaged_model(model, 0.6)
    expected: Tensor | None = None
    for count in range(30):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3))
        averaged.update_parameters(model)
        now = min(0.6, (1 + count) / (10 + count))
        raw = model.weight.detach().clone()
        expected = raw if expected is None else now * expected + (1 - now) * raw
        assert torch.allclose(averaged.module.weight, expected, atol=1e-5), count


def test_averaged_weights_are_those_saved(data: Path, tmp_path: Path) -> None:
    """The saved weights are the loop's average over every step of a run, and not the raw ones."""
    seen: list[Tensor] = []

    def act(call: int, terms: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        seen.append(model.local_branch.down2.weight.detach().clone())  # as the steps before left it
        return terms

    assert (
        main_with(
            "train",
            settings_in(data, tmp_path, num_epochs=1, ema_decay=0.3),
            system=model_that(act),
        )
        == 0
    )
    saved = content(tmp_path / "ckpt" / "checkpoint_epoch_1.pth")
    name = "local_branch.down2.weight"
    steps = [*seen[1:], saved["training"]["model"][name]]
    average = steps[0]
    for count, raw in enumerate(steps[1:], start=1):
        now = min(0.3, (1 + count) / (10 + count))
        average = now * average + (1 - now) * raw
    assert torch.allclose(saved["model"][name], average, atol=1e-6)
    assert not torch.equal(saved["model"][name], steps[-1])
    assert saved["training"]["averaged"] == STEPS


def test_ema_decay_0_gives_the_raw_weights(data: Path, tmp_path: Path) -> None:
    assert main_with("train", settings_in(data, tmp_path, num_epochs=1, ema_decay=0.0)) == 0
    saved = content(tmp_path / "ckpt" / "checkpoint_epoch_1.pth")
    assert not differing(saved["model"], saved["training"]["model"])


# checkpoints --------------------------------------------------------------------------------------


def test_keep_checkpoints_holds_through_a_resume(data: Path, tmp_path: Path) -> None:
    assert main_with("train", settings_in(data, tmp_path, num_epochs=3, keep_checkpoints=2)) == 0
    epochs = lambda: sorted(path.name for path in (tmp_path / "ckpt").glob("checkpoint_epoch_*"))  # noqa: E731
    assert epochs() == ["checkpoint_epoch_2.pth", "checkpoint_epoch_3.pth"]
    assert (
        resume(tmp_path / "ckpt" / "checkpoint_epoch_3.pth", tmp_path, "--set", "num_epochs=4") == 0
    )
    assert epochs() == ["checkpoint_epoch_3.pth", "checkpoint_epoch_4.pth"]


def test_save_and_validation_frequency(data: Path, tmp_path: Path) -> None:
    assert (
        main_with(
            "train",
            settings_in(data, tmp_path, num_epochs=5, save_freq=2, val_freq=4, keep_checkpoints=9),
        )
        == 0
    )
    names = sorted(path.name for path in (tmp_path / "ckpt").glob("checkpoint_epoch_*"))
    # the last epoch is always saved
    assert names == [f"checkpoint_epoch_{epoch}.pth" for epoch in (2, 4, 5)]
    assert {"best_model.pth", *names} == {path.name for path in (tmp_path / "ckpt").glob("[!.]*")}
    assert content(tmp_path / "ckpt" / "checkpoint_epoch_2.pth")["training"]["best"] == -math.inf
    assert content(tmp_path / "ckpt" / "checkpoint_epoch_4.pth")["training"]["best"] > 0


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, with its content."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


RUNS = ("best_model.pth", "checkpoint_epoch_3.pth", "checkpoint_interrupted.pth")


@pytest.mark.parametrize("name", RUNS)
def test_a_folder_that_holds_another_run_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """Whatever the file holds: it is somebody's."""
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt" / name).write_bytes(b"somebody's work")
    before = snapshot(tmp_path / "ckpt")
    assert main_with("train", settings_in(data, tmp_path)) == 2
    # there is nothing to resume from best_model.pth alone
    way = "remove it" if name == "best_model.pth" else "--resume"
    told = capsys.readouterr().err
    assert_one_line_error(2, told, str(tmp_path / "ckpt"), "another run", name, way)
    assert snapshot(tmp_path / "ckpt") == before and not (tmp_path / "logs").exists()


def test_a_second_training_is_refused_and_the_first_goes_on(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = settings_in(data, tmp_path, num_epochs=1)
    assert main_with("train", settings) == 0
    weights = snapshot(tmp_path / "ckpt")
    capsys.readouterr()
    assert main_with("train", settings | {"seed": 5}) == 2
    assert_one_line_error(2, capsys.readouterr().err, "holds another run", "checkpoint_dir")
    assert snapshot(tmp_path / "ckpt") == weights
    # the hint works: its own folder is no other run's
    config = ["--set", "num_epochs=2"]
    assert ms.main(["--mode", "train", "--resume", str(tmp_path / "ckpt"), *config]) == 0
    assert (tmp_path / "ckpt" / "checkpoint_epoch_2.pth").exists()


def test_training_touches_nothing_that_is_shipped(data: Path, tmp_path: Path) -> None:
    """The released weights lie where the default recipe trains to."""
    shipped = {"released.pth": b"released weights", "README.md": b"about them"}
    (tmp_path / "ckpt").mkdir()
    for name, content_of in shipped.items():
        (tmp_path / "ckpt" / name).write_bytes(content_of)
        os.utime(tmp_path / "ckpt" / name, (0, 0))
    settings = settings_in(data, tmp_path, num_epochs=3, keep_checkpoints=1)
    assert main_with("train", settings) == 0
    for name, content_of in shipped.items():
        assert (tmp_path / "ckpt" / name).read_bytes() == content_of
    assert "model" in content(tmp_path / "ckpt" / "best_model.pth")


def test_a_run_is_not_resumed_into_another_runs_folder(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    assert main_with("train", settings_in(data, mine, num_epochs=1)) == 0
    assert main_with("train", settings_in(data, theirs, num_epochs=1, seed=5)) == 0
    before = snapshot(theirs)
    capsys.readouterr()
    assert resume(mine / "ckpt" / "checkpoint_epoch_1.pth", theirs, "--set", "num_epochs=2") == 2
    assert_one_line_error(2, capsys.readouterr().err, str(theirs / "ckpt"), "another run")
    assert snapshot(theirs) == before


def plain_leaves(tree: Any) -> Iterator[Any]:
    """The values at the ends of nested dicts and lists."""
    if isinstance(tree, dict):
        assert all(isinstance(key, (str, int)) for key in tree)
        tree = list(tree.values())
    if isinstance(tree, (list, tuple)):
        for item in tree:
            yield from plain_leaves(item)
    else:
        yield tree


def test_checkpoints_hold_tensors_and_plain_data(straight: Path) -> None:
    for name in ("best_model.pth", f"checkpoint_epoch_{EPOCHS}.pth"):
        saved = content(straight / "ckpt" / name)
        assert saved["format_version"] == FORMAT_VERSION
        assert {type(leaf) for leaf in plain_leaves(saved)} <= {
            Tensor,
            int,
            float,
            str,
            bool,
            type(None),
        }
        assert saved["config"].keys() == {key.name for key in dataclasses.fields(ms.Config)}
        config = stored_config(saved, name, {}, ms.Config)
        assert dataclasses.asdict(config) == saved["config"]
        assert config.flow_channels == TINY["flow_channels"]
        assert saved["training_thumbnails"].shape == (STEPS, 16, 16, 3)
    # weights only: half the size, and shareable
    assert "training" not in content(straight / "ckpt" / "best_model.pth")


def test_best_model_is_the_best_validated_epoch(straight: Path) -> None:
    best = content(straight / "ckpt" / "best_model.pth")
    last = content(straight / "ckpt" / f"checkpoint_epoch_{EPOCHS}.pth")
    assert best["validation"]["psnr"] == last["training"]["best"]
    same_epoch = content(straight / "ckpt" / f"checkpoint_epoch_{best['epoch']}.pth")
    assert not differing(best["model"], same_epoch["model"])


# what ends a run ----------------------------------------------------------------------------------


def spoil(name: str) -> Any:
    """Makes a term, or with "gradient" only its gradient, not finite from the sixth step on."""

    def act(call: int, terms: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        if call <= 5:
            return terms
        if name == "gradient":  # the value is 0, the derivative 0 * inf
            return terms | {
                "l1": terms["l1"] + (model.log_sigma - model.log_sigma.detach()).square().sqrt()
            }
        return terms | {name: terms[name] * math.nan}

    return act


@pytest.mark.parametrize("name", ["nll", "colour", "gradient"])
def test_a_loss_that_is_not_finite_ends_the_run(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert main_with("train", settings_in(data, tmp_path), system=model_that(spoil(name))) == 1
    errors = [line for line in re.split(r"[\r\n]+", capsys.readouterr().err) if "error" in line]
    assert len(errors) == 1 and errors[0].startswith("error: ")
    good = tmp_path / "ckpt" / "checkpoint_epoch_1.pth"
    assert "step 5" in errors[0] and f"term {name}" in errors[0] and str(good) in errors[0]
    saved = content(good)
    assert all(bool(value.isfinite().all()) for value in saved["training"]["model"].values())
    assert {path.name for path in good.parent.iterdir()} == {
        "best_model.pth",
        good.name,
    }


class Overflown(ms.ConditionalFlow):
    """Its losses are fine, and what it shows is not."""

    def decode(self, condition: ms.Condition, noise: Tensor | None = None) -> Tensor:
        return super().decode(condition, noise) * (1.0 if self.training else math.nan)


def test_a_picture_that_is_not_finite_ends_training_and_evaluation(
    data: Path, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main_with("train", settings_in(data, tmp_path), system=Overflown) == 1
    errors = [line for line in re.split(r"[\r\n]+", capsys.readouterr().err) if "error" in line]
    assert (
        len(errors) == 1
        and "picture is not finite" in errors[0]
        and not (tmp_path / "ckpt" / "best_model.pth").exists()
    )
    weights = straight / "ckpt" / "best_model.pth"
    assert (
        main_with(
            "evaluate", settings_in(data, tmp_path), "--checkpoint", weights, system=Overflown
        )
        == 2
    )
    errors = [line for line in re.split(r"[\r\n]+", capsys.readouterr().err) if "error" in line]
    assert (
        len(errors) == 1
        and "no finite picture" in errors[0]
        and not list((tmp_path / "res").glob("*"))
    )


def test_a_file_of_any_name_beside_the_checkpoints_is_left_alone(
    data: Path, tmp_path: Path
) -> None:
    names = {"checkpoint_epoch_final.pth", ".mine.pth", "checkpoint_epoch_.pth"}
    (tmp_path / "ckpt").mkdir()
    for name in names:
        (tmp_path / "ckpt" / name).write_bytes(b"mine")
        os.utime(tmp_path / "ckpt" / name, (0, 0))
    assert main_with("train", settings_in(data, tmp_path, num_epochs=1)) == 0
    assert all((tmp_path / "ckpt" / name).read_bytes() == b"mine" for name in names)


def test_a_loss_that_is_never_finite_says_that_no_checkpoint_exists(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    worthless = model_that(lambda call, terms, model: terms | {"ssim": terms["ssim"] + math.inf})
    assert main_with("train", settings_in(data, tmp_path), system=worthless) == 1
    errors = [
        line for line in re.split(r"[\r\n]+", capsys.readouterr().err) if line.startswith("error: ")
    ]
    assert len(errors) == 1
    assert (
        "step 0" in errors[0]
        and "term ssim" in errors[0]
        and "no checkpoint was written yet" in errors[0]
    )


def test_max_minutes_ends_the_run_with_usable_weights(data: Path, tmp_path: Path) -> None:
    settings = settings_in(
        data, tmp_path, num_epochs=100_000, max_minutes=0.01, val_freq=1000, save_freq=1000
    )
    assert main_with("train", settings) == 0
    (path,) = (tmp_path / "ckpt").glob("checkpoint_epoch_*.pth")
    training = content(path)["training"]
    assert 0.01 <= training["minutes"] < 0.1
    assert 0 < training["step"] < 5000
    assert training["best"] > 0 and "model" in content(tmp_path / "ckpt" / "best_model.pth")
    # the schedule is shortened with the run: the last step is far below the peak
    assert training["optimizer"]["param_groups"][0]["lr"] < 0.5 * settings["learning_rate"]


# logs ---------------------------------------------------------------------------------------------


def events_in(folder: Path) -> Any:
    """All that TensorBoard finds in a run's folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    everything = {"images": 0, "scalars": 0, "histograms": 0, "tensors": 0}
    return EventAccumulator(str(folder), size_guidance=everything).Reload()


def test_tensorboard_holds_the_whole_story(straight: Path) -> None:
    (folder,) = (straight / "logs").iterdir()
    events = events_in(folder)
    tags = events.Tags()
    losses = {f"loss/{name}" for name in ("nll", "l1", "ssim", "colour", "total")}
    rates = {f"train/{name}" for name in ("learning_rate", "gradient_norm", "images_per_second")}
    names = ("psnr", "ssim", "bits_per_dim", "ciede2000", "colourfulness_ratio", "psnr_gt_mean")
    scores = {f"validation/{name}" for name in names}
    scores |= {tag.replace("loss/", "validation/loss_") for tag in losses}
    assert losses | rates | scores <= set(tags["scalars"])
    assert "validation/low_enhanced_high_0" in tags["images"]
    assert "validation/standardised_latent" in tags["histograms"]
    epochs = [STEPS * (1 + epoch) for epoch in range(EPOCHS)]
    for tag in losses | rates | scores:
        scalars = events.Scalars(tag)
        assert [scalar.step for scalar in scalars] == epochs, tag
        assert all(math.isfinite(scalar.value) for scalar in scalars), tag
    total = [
        sum(events.Scalars(tag)[place].value for tag in losses - {"loss/total"})
        for place in range(EPOCHS)
    ]
    assert [scalar.value for scalar in events.Scalars("loss/total")] == pytest.approx(
        total, rel=1e-4
    )
    best = content(straight / "ckpt" / "best_model.pth")["validation"]["psnr"]
    assert max(scalar.value for scalar in events.Scalars("validation/psnr")) == pytest.approx(
        best, rel=1e-5
    )
    picture = events.Images("validation/low_enhanced_high_0")[-1]
    assert (picture.width, picture.height) == (3 * 32, 32)


@pytest.mark.parametrize("nll_every", [2, 20])
def test_the_likelihood_is_logged_although_it_is_computed_now_and_then(
    data: Path, tmp_path: Path, nll_every: int
) -> None:
    """Steps are logged after they were counted, so none of the logged ones computes it."""
    assert main_with("train", settings_in(data, tmp_path, num_epochs=6, nll_every=nll_every)) == 0
    (folder,) = (tmp_path / "logs").iterdir()
    events = events_in(folder)
    likelihood = events.Scalars("loss/nll")
    assert [point.step for point in likelihood] == [STEPS * epoch for epoch in range(1, 7)]
    # of 24 steps the first, and with 20 the twenty-first, computed it
    values = [point.value for point in likelihood]
    assert len(set(values)) == (2 if nll_every == 20 else 6)
    totals = [point.value for point in events.Scalars("loss/total")]
    parts = [[p.value for p in events.Scalars(f"loss/{n}")] for n in ("nll", "l1", "ssim")]
    colour = [point.value for point in events.Scalars("loss/colour")]
    sums = [sum(terms) for terms in zip(*parts, colour, strict=True)]
    assert totals == pytest.approx(sums, rel=1e-4)


def test_validation_losses_are_of_the_same_samples_and_disturb_nothing(
    data: Path, tmp_path: Path
) -> None:
    given = settings_in(data, tmp_path, nll_every=2, global_dropout=0.5)
    config, use = (build(kind, given, "here") for kind in (ms.Config, ms.Use))
    trainer = ms.Trainer(config, use, ms.ConditionalFlow)
    trainer.averaged.eval()
    trainer.step = 1
    before, modes = torch.get_rng_state(), trainer.model.training
    first, again = trainer._validation_losses(), trainer._validation_losses()
    assert torch.equal(before, torch.get_rng_state()) and trainer.model.training == modes
    assert first == again
    assert list(first) == [f"loss_{name}" for name in ("nll", "l1", "ssim", "colour", "total")]
    assert not any(value.requires_grad and value.grad for value in trainer.averaged.parameters())


def test_validation_losses_are_without_augmentation(data: Path, tmp_path: Path) -> None:
    every = dict(flips=True, exposure_gain=2.0, channel_gain=0.5, window_min=0.3)
    every |= dict(identity_share=0.5, paste_share=0.5, jpeg_share=1.0, mixup_share=1.0)
    none = {key: type(value)(0) for key, value in every.items()} | {"window_min": 1.0}
    config, plain = (build(ms.Config, settings_in(data, tmp_path, **c), "") for c in (every, none))
    store, chosen, *_ = ms.training_data(plain, ms.Use())
    samples = ms.TrainingSamples(store, chosen, ms.unaltered(config))
    for place in range(len(chosen)):
        wanted = ms.TrainingSamples(store, chosen, plain)[0, place]
        assert all(map(torch.equal, samples[0, place], wanted))


# settings that must, or must not, change the result -----------------------------------------------


@pytest.fixture(scope="module")
def reference(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights after one epoch of the unchanged settings."""
    folder = tmp_path_factory.mktemp("reference")
    assert main_with("train", settings_in(data, folder, num_epochs=1)) == 0
    return folder / "ckpt" / "checkpoint_epoch_1.pth"


def trained_with(data: Path, folder: Path, **changes: Any) -> dict[str, Tensor]:
    """The raw weights after one epoch with `changes`."""
    assert main_with("train", settings_in(data, folder, num_epochs=1, **changes)) == 0
    return content(folder / "ckpt" / "checkpoint_epoch_1.pth")["training"]["model"]


@pytest.mark.parametrize(
    "changes",
    [
        {"nll_weight": 0.0},
        {"l1_weight": 0.0},
        {"ssim_weight": 0.0},
        {"colour_weight": 0.0},
        {"histogram_bins": 8},
        {"histogram_kernel": "inverse_quadratic"},
        {"histogram_size": 4},
        {"window_min": 1.0},
        {"flips": False},
        {"exposure_gain": 0.0},
        {"channel_gain": 0.0},
        {"crop_size": 32},
        {"image_size": [24, 32]},
        {"global_dropout": 0.5},
        {"batch_size": 2},
        {"gradient_clip": 0.01},
        {"weight_decay": 0.5},
        {"warmup_steps": 50},
        {"seed": 1},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_knob_changes_the_weights(
    data: Path, reference: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    assert differing(
        content(reference)["training"]["model"], trained_with(data, tmp_path, **changes)
    )


@pytest.mark.parametrize(
    ("base", "changes"),
    [
        ({"histogram_kernel": "inverse_quadratic"}, {"histogram_sigma": 0.1}),
        ({"crop_size": 32}, {"crop_scales": [0.0]}),
        ({"crop_size": 32}, {"whole_share": 0.6}),
    ],
    ids=["histogram_sigma", "crop_scales", "whole_share"],
)
def test_dependent_knobs_change_the_weights(
    data: Path, tmp_path: Path, base: dict[str, Any], changes: dict[str, Any]
) -> None:
    without = trained_with(data, tmp_path / "without", **base)
    assert differing(without, trained_with(data, tmp_path / "with", **base, **changes))


def test_loader_processes_and_cache_do_not_change_the_weights(
    data: Path, reference: Path, tmp_path: Path
) -> None:
    expected = content(reference)["training"]["model"]
    assert not differing(expected, trained_with(data, tmp_path / "workers", num_workers=2))
    assert not differing(expected, trained_with(data, tmp_path / "uncached", cache_megabytes=0))


def test_mixed_precision_on_the_cpu(
    data: Path,
    reference: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """bf16 as on a processor that has it; the weights stay float32 and finite, and near those of
    full precision."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    weights = trained_with(data, tmp_path, use_amp=True)
    assert "bfloat16" in capsys.readouterr().out
    expected = content(reference)["training"]["model"]
    assert differing(expected, weights)
    for name, value in weights.items():
        assert value.dtype == torch.float32
        assert torch.allclose(value, expected[name], atol=0.02), name


def test_use_amp_runs_whatever_the_processor(data: Path, tmp_path: Path) -> None:
    weights = trained_with(data, tmp_path, use_amp=True)
    assert all(bool(value.isfinite().all()) for value in weights.values())


# another system under the same roof ---------------------------------------------------------------


@dataclasses.dataclass
class GammaConfig(ms.Config):
    """A config of its own, with one more key."""

    start: float = knob(1.0, "the exponent to start from", low=0.1, high=10.0)


class Gamma(ms.System):
    """A model of two numbers, trained in two stages by two groups of one optimizer, with a picture
    of its own."""

    config_class = GammaConfig

    def __init__(self, config: GammaConfig) -> None:
        super().__init__(config)
        self.exponent = torch.nn.Parameter(torch.tensor(config.start))
        self.gain = torch.nn.Parameter(torch.tensor(1.0))
        self.seen: list[float] = []

    def make_optimizer(self) -> torch.optim.Optimizer:
        return ms.adamw(
            [{"params": [self.exponent]}, {"params": [self.gain], "lr_scale": 0.5}], self.config
        )

    def learning_rate_at(self, progress: float, step: int) -> float:
        return 0.01 if progress < 0.5 else 0.001

    def begin_step(self, progress: float, step: int = 0) -> None:
        if self.training:  # validation asks, too
            assert step == len(self.seen)
            self.seen.append(progress)
        self.exponent.requires_grad_(progress < 0.5)
        self.gain.requires_grad_(progress >= 0.5)

    def enhance(self, low: torch.Tensor, temperature: float = 0.0) -> torch.Tensor:
        return (self.gain * low.clamp(min=1e-3) ** self.exponent).clamp(0, 1)

    def losses(self, batch: ms.Sample) -> dict[str, torch.Tensor]:
        return {"l1": (self.enhance(batch.low) - batch.high).abs().mean()}

    def pictures(self, low: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"negative": 1 - low}


def test_another_system_trains_in_stages_and_is_evaluated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_data(tmp_path)
    settings = tiny_config(tmp_path, start=1.5, num_epochs=4, weight_decay=0.0)
    path = tmp_path / "gamma.json"
    path.write_text(json.dumps(settings))

    def run(*arguments: str) -> int:
        return ms.main([*arguments, "--config", str(path)], Gamma)

    trainers: list[ms.Trainer] = []
    train_step = ms.Trainer._train_step

    def spy(trainer: ms.Trainer, batch: ms.Sample) -> object:
        before = trainer.model.exponent.item(), trainer.model.gain.item()
        result = train_step(trainer, batch)
        rates = [group["lr"] for group in trainer.optimizer.param_groups]
        early = trainer.model.seen[-1] < 0.5
        assert rates == ([0.01, 0.005] if early else [0.001, 0.0005])
        assert (trainer.model.exponent.item() != before[0]) == early and (
            trainer.model.gain.item() != before[1]
        ) != early
        trainers.append(trainer)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ms.Trainer, "_train_step", spy)
        assert run("--mode", "train") == 0
    assert trainers[-1].model.seen == [step / 20 for step in range(20)]
    assert "bits_per_dim" not in capsys.readouterr().out
    assert run("--mode", "evaluate") == 0  # its own best_model.pth is the default
    (results,) = (tmp_path / "results").glob("eval_*")
    assert (results / "images" / "0_negative.png").exists()
    assert (
        run(
            "--mode",
            "enhance",
            "--input",
            str(tmp_path / "data/eval/low/0.png"),
            "--output",
            str(tmp_path / "o.png"),
        )
        == 0
    )
    capsys.readouterr()
    weights = str(tmp_path / "ckpt" / "best_model.pth")
    assert ms.main(["--mode", "evaluate", "--checkpoint", weights, *flow_folders(tmp_path)]) == 2
    assert "weights of Gamma, not of ConditionalFlow" in capsys.readouterr().err


def flow_folders(folder: Path) -> list[str]:
    return [
        "--set",
        f"eval_low_dir={folder / 'data/eval/low'}",
        "--set",
        f"eval_high_dir={folder / 'data/eval/high'}",
    ]
