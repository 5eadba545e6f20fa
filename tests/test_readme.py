"""Every command of the README that takes less than a minute, as the README has it, does what it
says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cli_tools import dark_picture, environment, save_picture, target_picture

import model_script as ms

ROOT = Path(__file__).resolve().parent.parent
# what sets an environment up, waits for a browser or takes minutes is tried elsewhere
ELSEWHERE = ("make ", "pip ", "tensorboard ", "python model_script.py --mode demo")


def commands() -> list[str]:
    """The README's commands: lines of fenced blocks, continued ones joined, then those in text."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    fenced = re.compile(r"^```\n(.*?)^```", re.M | re.S)
    lines = "\n".join(fenced.findall(text)).replace("\\\n", " ").splitlines()
    lines += re.findall(r"`(python [^`]+)`", fenced.sub("", text))
    return [line for line in lines if re.match(r"(python|make|pip|tensorboard) ", line)]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository as a newcomer has it, by links, with the data that the README speaks of."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("model_script.py", "support", "configs", "baselines", "benchmarks", "tools"):
        (folder / name).symlink_to(ROOT / name)
    for name in ("cpu_train_config.json", "docs"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "released.pth").symlink_to(ms.RELEASED)
    save_picture(folder / "low.jpg", dark_picture(target_picture(0, 64, 96)))
    scenes = (ROOT / "benchmarks" / "evaluation_scenes.txt").read_text().strip().split(",")
    few = [str(number) for number in range(6)]
    for data, stems in (
        (ms.ARCHIVE_TRAIN, few),
        (ms.ARCHIVE_EVAL, scenes),
        ("my", few),
        ("my_eval", few),
    ):
        for place, stem in enumerate(stems):
            high = target_picture(place, 32, 48)
            save_picture(folder / data / "high" / f"{stem}.png", high)
            save_picture(folder / data / "low" / f"{stem}.png", dark_picture(high, place))
    return folder


def test_the_commands_work_in_the_order_of_the_readme(clone: Path) -> None:
    tried = []
    for line in commands():
        if line.startswith(ELSEWHERE):
            continue
        short = " --set num_epochs=1" if "--mode train" in line else ""
        short += " --output picture.jpg" if "make_picture" in line else ""
        # the Python of these tests is the newcomer's
        shell = f'python() {{ "{sys.executable}" "$@"; }}; {line}{short}'
        done = subprocess.run(
            ["bash", "-c", shell],
            cwd=clone,
            env=environment() | {"PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        tried.append(line)
    modes = {re.search(r"--mode (\w+)", line).group(1) for line in tried if "--mode" in line}  # type: ignore[union-attr]
    assert modes == {"enhance", "train", "evaluate"} and len(tried) >= 9
    assert (clone / "enhanced.jpg").exists() and (clone / "runs/mine/best_model.pth").exists()


def test_every_file_that_the_readme_names_is_there() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"\]\(([^)#:]+)\)", text) + re.findall(r"--config (\S+)", text)
    named += [name for name in re.findall(r"`([\w/]+\.(?:py|md|json|txt))`", text) if "/" in name]
    missing = [name for name in named if not (ROOT / name).exists()]
    assert len(named) > 8 and not missing


@pytest.mark.parametrize(
    "document", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.name
)
def test_the_documents_name_what_is_there(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for name in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (document.parent / name).exists(), name
    for name in re.findall(
        r"(?:python|--config) ((?:benchmarks|tools|configs|baselines|tests|docs)/[\w./]+)", text
    ):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"python -m (baselines\.\w+)", text):
        assert (ROOT / (name.replace(".", "/") + ".py")).exists(), name
