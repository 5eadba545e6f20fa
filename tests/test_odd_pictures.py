"""Pictures from anywhere: each is enhanced as its pixels say, or refused in one line.

Both within 2 s and 300 MB.
"""

from __future__ import annotations

import csv
import dataclasses
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tifffile
import torch
from cli_tools import assert_one_line_error, files_under, run_script
from conftest import randomise
from odd_pictures import Odd, make_corpus
from PIL import Image
from torch import Tensor

import model_script as ms
from support.checkpoints import save_checkpoint
from support.folders import ENHANCE_COLUMNS, find_inputs, work_off
from support.runtime import Runtime
from support.settings import UserError

SECONDS, MEGABYTES = 2.0, 300.0


class Echo(ms.System):
    """Gives back what it gets, so that the written picture shows what was read."""

    def enhance(self, low: Tensor, temperature: float = 0.0) -> Tensor:
        return low


def echo() -> ms.Loaded:
    """A model that gives back what it gets, ready for use."""
    runtime = Runtime(torch.device("cpu"), torch.float32)
    return ms.Loaded(Echo(ms.Config()), ms.Use(device="cpu"), runtime, {})


class Outcome(NamedTuple):
    """What became of a file: the refusal or nothing, seconds of processor, megabytes at the peak
    above those before, and what libraries wrote to standard error past everybody."""

    refusal: str
    seconds: float
    megabytes: float
    chatter: str


def resident(key: str) -> float:
    """VmRSS or VmHWM of this process in megabytes; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(key)), 0.0)


def try_all(jobs: list[tuple[Path, Path]], log: Path) -> list[Outcome]:
    """Enhance every (source, target); anything but a UserError ends it. To be run in a process of
    its own."""
    torch.set_num_threads(1)
    loaded = echo()
    chatter = os.open(log, os.O_CREAT | os.O_RDWR)
    os.dup2(chatter, 2)
    outcomes = []
    for source, target in jobs:
        os.ftruncate(chatter, 0)
        os.lseek(chatter, 0, os.SEEK_SET)
        if Path("/proc/self/clear_refs").exists():
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before, started, refusal = resident("VmRSS"), time.process_time(), ""
        try:
            ms.enhance_file(source, target, loaded, None)
        except UserError as error:
            refusal = str(error)
        except BaseException as error:
            raise AssertionError(f"{source!r}: {type(error).__name__} {error}") from None
        seconds, megabytes = time.process_time() - started, resident("VmHWM") - before
        sys.stderr.flush()
        outcomes.append(
            Outcome(
                refusal, seconds, megabytes, os.pread(chatter, 9999, 0).decode(errors="replace")
            )
        )
    return outcomes


class Trial(NamedTuple):
    """The corpus by name, where it lies, where the results lie and what became of each."""

    corpus: dict[str, Odd]
    folder: Path
    targets: dict[str, Path]
    outcomes: dict[str, Outcome]

    def difference(self, name: str) -> str:
        """In words, how the written picture differs from what the file shows; nothing where it does
        not."""
        odd, target = self.corpus[name], self.targets[name]
        with Image.open(target) as picture:
            found = tifffile.imread(target) if target.suffix == ".tif" else np.asarray(picture)
        if found.shape != odd.pixels.shape or found.dtype != odd.pixels.dtype:
            return f"{name!r}: {found.shape} {found.dtype}"
        levels = np.abs(found.astype(float) - odd.pixels).mean() * 255 / np.iinfo(found.dtype).max
        return f"{name!r}: {levels:.2f} levels away" if levels > odd.tolerance else ""


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Trial:
    folder = tmp_path_factory.mktemp("odd")
    corpus = make_corpus(folder / "in")
    (folder / "out").mkdir()
    deep = [odd.pixels is not None and odd.pixels.dtype == np.uint16 for odd in corpus.values()]
    targets = {
        name: folder / "out" / f"{n}{'.tif' if deep[n] else '.png'}"
        for n, name in enumerate(corpus)
    }
    jobs = [(folder / "in" / name, target) for name, target in targets.items()]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        outcomes = pool.submit(try_all, jobs, folder / "log").result()
    return Trial(corpus, folder / "in", targets, dict(zip(corpus, outcomes, strict=True)))


def test_good_pictures_come_out_as_their_pixels_say(trial: Trial) -> None:
    good = [
        name for name, odd in trial.corpus.items() if odd.pixels is not None and not odd.may_refuse
    ]
    assert len(good) > 80
    assert [
        f"{name!r}: {trial.outcomes[name].refusal}" for name in good if trial.outcomes[name].refusal
    ] == []
    assert [words for name in good if (words := trial.difference(name))] == []


def test_everything_else_is_refused_in_a_line_that_names_it(trial: Trial) -> None:
    bad = [name for name, odd in trial.corpus.items() if odd.pixels is None]
    assert len(bad) > 40
    for name in bad:
        assert str(trial.folder / name) in trial.outcomes[name].refusal, name
        assert "\n" not in trial.outcomes[name].refusal


def test_half_a_picture_is_never_passed_off_as_a_whole_one(trial: Trial) -> None:
    """A file that ends too early, or whose size is a matter of taste, is refused or complete."""
    either = [name for name, odd in trial.corpus.items() if odd.may_refuse]
    complete = [name for name in either if not trial.outcomes[name].refusal]
    assert len(either) > 80 and 5 < len(complete) < len(either) / 2
    assert [words for name in complete if (words := trial.difference(name))] == []


def test_no_file_takes_long_or_much_memory(trial: Trial) -> None:
    assert [(name, o.seconds) for name, o in trial.outcomes.items() if o.seconds > SECONDS] == []
    assert [
        (name, o.megabytes) for name, o in trial.outcomes.items() if o.megabytes > MEGABYTES
    ] == []


def test_libraries_say_nothing_past_us(trial: Trial) -> None:
    assert {name: o.chatter for name, o in trial.outcomes.items() if o.chatter} == {}


def test_a_refused_file_leaves_nothing_behind(trial: Trial) -> None:
    expected = {
        trial.targets[name].name for name, outcome in trial.outcomes.items() if not outcome.refusal
    }
    assert {path.name for path in trial.targets["plain.png"].parent.iterdir()} == expected


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "best_model.pth"
    torch.manual_seed(5)
    config = ms.Config(flow_channels=8, num_flow_blocks=1, thumbnail_size=32)
    model = randomise(ms.ConditionalFlow(config), 0.04)
    save_checkpoint(
        path,
        {
            "config": dataclasses.asdict(config),
            "model": model.state_dict(),
            "run_id": "r",
            "epoch": 1,
        },
    )
    return path


@pytest.fixture(scope="module")
def album(
    trial: Trial, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, str, str]]:
    """The whole corpus through the command line, as one folder: the results, stdout and stderr."""
    out = tmp_path_factory.mktemp("album")
    files = ("--checkpoint", checkpoint, "--input", trial.folder, "--output", out)
    done = run_script("--mode", "enhance", *files, "--set", "device=cpu", cwd=out)
    assert done.returncode == 1, done.stderr
    yield out, done.stdout, done.stderr


def test_a_folder_of_odd_files_is_done_to_its_end(
    trial: Trial, album: tuple[Path, str, str]
) -> None:
    """The same files are refused as one by one, in a line each, and every other one has a picture
    of its size."""
    out, printed, said = album
    listed = {name for name in trial.corpus if (trial.folder / name).is_file()}
    refused = {name for name in listed if trial.outcomes[name].refusal}
    assert "Traceback" not in said and "Warning" not in said
    lines = [line for line in said.splitlines() if line.startswith("failed: ")]
    assert len(lines) == len(refused)
    assert f"{len(listed) - len(refused)} pictures enhanced, {len(refused)} failed" in printed
    assert files_under(out) == {name for name in listed - refused} | {"enhance.csv"}
    for name in listed - refused:
        with Image.open(out / name) as picture:
            assert picture.size == trial.corpus[name].pixels.shape[1::-1], name


def test_the_table_names_every_file_whatever_its_name(
    trial: Trial, album: tuple[Path, str, str], checkpoint: Path
) -> None:
    """And what is done is not done twice: the next table says so, whatever the names."""
    out = album[0]
    with open(
        out / "enhance.csv", newline="", encoding="utf-8", errors="surrogateescape"
    ) as stream:
        rows = {Path(row["file"]).name: row for row in csv.DictReader(stream)}
    assert set(rows) == {name for name in trial.corpus if (trial.folder / name).is_file()}
    for name, row in rows.items():
        assert row["note"].startswith("failed: ") == bool(trial.outcomes[name].refusal), name
    done = [(trial.folder / name, out / name) for name in rows if not trial.outcomes[name].refusal]
    before = (out / "enhance.csv").read_bytes()
    loaded = ms.load_model(str(checkpoint), {"device": "cpu"}, ms.ConditionalFlow)
    made_with = loaded.made_with(str(checkpoint))
    fail = lambda source, target: pytest.fail(f"{source} again")  # noqa: E731
    assert work_off(done, out, fail, again=False, made_with=made_with) == 0
    with open(
        out / "enhance.csv", newline="", encoding="utf-8", errors="surrogateescape"
    ) as stream:
        again = {Path(row["file"]).name: row for row in csv.DictReader(stream)}
    assert again.keys() == {source.name for source, _ in done}
    assert {row["note"] for row in again.values()} == {"made by an earlier run"}
    assert all(again[name]["output"] == rows[name]["output"] for name in again)
    assert b"\xff\xfe" in before and b'two\nlines.png"' in before


@pytest.mark.parametrize("name", ["loop a.png", "cut at 3203.16 deflate.tif", "hollow.png"])
def test_one_odd_file_is_refused_by_the_process_in_one_line(
    trial: Trial, checkpoint: Path, tmp_path: Path, name: str
) -> None:
    files = (
        "--checkpoint",
        checkpoint,
        "--input",
        trial.folder / name,
        "--output",
        tmp_path / "out.png",
    )
    done = run_script("--mode", "enhance", *files, "--set", "device=cpu", cwd=tmp_path)
    assert_one_line_error(done.returncode, done.stderr, name)
    assert files_under(tmp_path) == set()


def test_a_name_that_is_no_text_is_printed_and_kept(
    trial: Trial,
    checkpoint: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = "bytes \udcff\udcfe.png"
    with open(os.dup(1), "w", encoding="utf-8", errors="strict") as strict:
        monkeypatch.setattr(sys, "stdout", strict)
        files = [
            "--checkpoint",
            str(checkpoint),
            "--input",
            str(trial.folder / name),
            "--output",
            str(tmp_path / name),
        ]
        assert ms.main(["--mode", "enhance", *files, "--set", "device=cpu"]) == 0
    assert os.listdir(os.fsencode(tmp_path)) == [b"bytes \xff\xfe.png"]
    assert "bytes \\udcff\\udcfe.png: 48x40" in capfd.readouterr().out


@pytest.mark.timeout(30)
def test_links_that_run_in_circles_are_not_followed(tmp_path: Path) -> None:
    """Two links to their own folder would be 2^40 folders."""
    album = tmp_path / "in"
    (album / "deep").mkdir(parents=True)
    for place in ("a.png", "deep/b.png", "deep/c.jpg", ".hidden.png"):
        (album / place).write_bytes(b"x")
    for link in ("again", "and again", "deep/up"):
        (album / link).symlink_to(album)
    found = {
        given: {
            str(source.relative_to(album))
            for source, _ in find_inputs(str(given), str(tmp_path / "out"))[0]
        }
        for given in (album, album / "**" / "*.png", album / "**", album / "*" / "*.[jp]*g")
    }
    everything = {"a.png", "deep/b.png", "deep/c.jpg"}
    assert found == dict(
        zip(
            found,
            [everything, {"a.png", "deep/b.png"}, everything, found[album / "*" / "*.[jp]*g"]],
            strict=True,
        )
    )
    assert {"deep/b.png", "deep/c.jpg"} <= found[album / "*" / "*.[jp]*g"]
    with pytest.raises(UserError, match="no pattern"):
        find_inputs(f"{album}/**x/*.png", str(tmp_path / "out"))


@pytest.mark.parametrize(("suffix", "size"), [(".webp", (16, 16_400)), (".jpg", (65_600, 16))])
def test_a_format_that_cannot_hold_the_picture_is_named(
    tmp_path: Path, suffix: str, size: tuple[int, int]
) -> None:
    Image.new("RGB", size[::-1]).save(tmp_path / "in.png")
    target = tmp_path / f"out{suffix}"
    with pytest.raises(UserError, match=f"out{suffix}.*cannot hold.*another suffix"):
        ms.enhance_file(tmp_path / "in.png", target, echo(), None)
    assert files_under(tmp_path) == {"in.png"}


def test_exif_too_long_for_jpeg_does_not_cost_the_picture(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010F] = "M" * 65_400
    exif[0x0110] = "N" * 200
    Image.new("RGB", (20, 16), (200, 100, 50)).save(tmp_path / "in.tif", exif=exif)
    for suffix in ("jpg", "png"):
        ms.enhance_file(tmp_path / "in.tif", tmp_path / f"out.{suffix}", echo(), None)
        with Image.open(tmp_path / f"out.{suffix}") as picture:
            assert np.abs(np.asarray(picture).astype(int) - (200, 100, 50)).max() < 4
            assert (0x010F in picture.getexif()) == (suffix == "png")


@pytest.mark.parametrize("table", [b"\xff\xfe\0f\0i\0", b'file\r\na,b,c\r\n"'])
def test_a_foreign_table_does_not_stop_a_folder(tmp_path: Path, table: bytes) -> None:
    """enhance.csv may have come back from a spreadsheet; the rows of this run replace it."""
    (tmp_path / "enhance.csv").write_bytes(table)
    row = dict.fromkeys(ENHANCE_COLUMNS, "1") | {"file": "new.png"}
    jobs = [(Path("new.png"), tmp_path / "new.png")]
    assert work_off(jobs, tmp_path, lambda source, target: row, again=False) == 0
    with open(tmp_path / "enhance.csv", newline="", encoding="utf-8") as stream:
        assert list(csv.DictReader(stream)) == [row]
