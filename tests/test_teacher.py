"""A small network learns a large one's pictures beside the real ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cli_tools import assert_one_line_error, main_with, make_data, tiny_config
from conftest import randomise
from torch import Tensor

import model_script as ms

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"num_flow_blocks": 1, "thumbnail_size": 32}


def network(seed: int, channels: int, **settings: object) -> ms.ConditionalFlow:
    torch.manual_seed(seed)
    config = ms.Config(**SMALL, flow_channels=channels, nll_weight=0.0, **settings)
    return randomise(ms.ConditionalFlow(config), 0.05).eval()


def sample() -> ms.Sample:
    """Two crops of 24x32, each from its own place in a picture."""
    generator = torch.Generator().manual_seed(0)
    low, high = (torch.rand(2, 3, 24, 32, generator=generator) for _ in range(2))
    thumbnail = torch.rand(2, 3, 32, 32, generator=generator)
    return ms.Sample(low * 0.2, high, thumbnail, torch.tensor([[0, 0, 0.5, 0.5], [0.2, 0, 1, 1]]))


def losses(pupil: ms.ConditionalFlow, batch: ms.Sample) -> dict[str, Tensor]:
    with torch.no_grad():
        return pupil.losses(batch)


def test_the_share_is_between_the_losses_of_either_target() -> None:
    teacher, batch = network(1, 24), sample()
    taught = teacher.answer(batch)
    assert taught.shape == batch.high.shape and taught.std() > 0.01
    alone = losses(network(2, 16), batch)
    against_teacher = losses(network(2, 16), batch._replace(high=taught))
    for share in (0.0, 0.3, 1.0):
        pupil = network(2, 16, teacher_share=share)
        pupil.teacher = teacher.answer
        found = losses(pupil, batch)
        assert set(found) == {"l1", "ssim", "colour"}
        for name, value in found.items():
            expected = (1 - share) * alone[name] + share * against_teacher[name]
            assert float(value) == pytest.approx(float(expected), rel=1e-5)
    assert abs(float(alone["l1"] - against_teacher["l1"])) > 0.1


def test_the_teacher_learns_nothing_and_is_no_part_of_its_pupil() -> None:
    teacher, pupil = network(1, 24), network(2, 16)
    names = set(pupil.state_dict())
    pupil.teacher = teacher.answer
    sum(pupil.losses(sample()).values()).backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert any(float(p.grad.abs().sum()) > 0 for p in pupil.parameters() if p.grad is not None)
    assert set(pupil.state_dict()) == names
    assert len(list(pupil.parameters())) == len(list(network(2, 16).parameters()))


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(the data's folder, the weights of a tiny training on it)."""
    folder = tmp_path_factory.mktemp("teacher")
    data = make_data(folder / "data", train=4)
    assert main_with("train", settings(data, folder, num_epochs=1)) == 0
    return data, folder / "run" / "best_model.pth"


def settings(data: Path, folder: Path, **changes: object) -> dict[str, object]:
    where = {"checkpoint_dir": str(folder / "run"), "log_dir": str(folder / "logs")}
    return tiny_config(data) | where | changes


def last_weights(folder: Path) -> dict[str, Tensor]:
    return torch.load(folder / "run" / "checkpoint_epoch_2.pth", weights_only=True)["model"]


def test_training_with_a_teacher_and_resuming_it(
    teacher_file: tuple[Path, Path], tmp_path: Path
) -> None:
    data, teacher = teacher_file
    taught = {"teacher": str(teacher), "teacher_share": 0.9, "flow_channels": 8}
    whole, part, alone = (tmp_path / name for name in ("whole", "part", "alone"))
    assert main_with("train", settings(data, whole, num_epochs=2, **taught)) == 0
    assert main_with("train", settings(data, alone, num_epochs=2, flow_channels=8)) == 0
    first = str(whole / "run" / "checkpoint_epoch_1.pth")
    places = [f"--checkpoint_dir={part / 'run'}", f"--log_dir={part / 'logs'}"]
    assert ms.main(["--mode", "train", "--resume", first, *places]) == 0
    expected, found, plain = (last_weights(folder) for folder in (whole, part, alone))
    assert set(found) == set(expected) == set(plain)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    name = "local_branch.stem.0.weight"
    assert not torch.equal(plain[name], expected[name])


def test_a_teacher_that_is_missing_or_does_not_fit(
    teacher_file: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, teacher = teacher_file

    def told() -> str:
        """What was said after the progress bars."""
        return capsys.readouterr().err.split("\r")[-1]

    status = main_with("train", settings(data, tmp_path, teacher=str(tmp_path / "none.pth")))
    assert_one_line_error(status, told(), "none.pth")
    changes = {"teacher": str(teacher), "thumbnail_size": 48}
    status = main_with("train", settings(data, tmp_path, **changes))
    assert_one_line_error(status, told(), "thumbnail_size", "teacher")
    assert not list(tmp_path.rglob("*.pth"))
