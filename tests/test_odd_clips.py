"""Odd and broken clips: each comes out whole as a player shows it, or is refused in one line."""

from __future__ import annotations

import csv
import dataclasses
import subprocess
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from cli_tools import files_under, run_tool
from test_enhance import small_model

from support.checkpoints import save_checkpoint

av = pytest.importorskip("av", reason="the optional package av is not installed")

from odd_clips import CLIPS, TAGS, Odd  # noqa: E402


class Track(NamedTuple):
    codec: str
    language: str | None
    samples: np.ndarray
    begins: float


class Shown(NamedTuple):
    """What a player makes of a clip; times in seconds."""

    frames: list[np.ndarray]
    times: list[float]
    length: float
    shape: Fraction
    sounds: list[Track]
    tags: dict[str, str]


def turned(frame: Any) -> np.ndarray:
    """(H, W, 3) uint8 of a frame that is not mirrored, as its rotation says."""
    return np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))


def show(path: Path) -> Shown:
    """Decode all of a clip."""
    sounds = []
    with av.open(f"file:{path}") as reading:
        video = reading.streams.best("video")
        shape = video.sample_aspect_ratio or Fraction(1)
        found: list[Any] = []
        for packet in reading.demux(video):
            try:
                found += packet.decode()
            except av.error.InvalidDataError:  # of a source that is cut
                continue
        times = [float(frame.pts * frame.time_base) for frame in found]
        length = (reading.duration or 0) / av.time_base
        if "matroska" in reading.format.name:  # which counts from 0, whenever it begins
            length -= (reading.start_time or 0) / av.time_base
        tags, count = dict(reading.metadata), len(reading.streams.audio)
    for number in range(count):
        with av.open(f"file:{path}") as reading:
            track = reading.streams.audio[number]
            parts = list(reading.decode(track))
            heard = np.concatenate([part.to_ndarray() for part in parts], 1)
            begins = float(parts[0].pts * parts[0].time_base)
            codec = track.codec_context.codec.canonical_name
            sounds.append(Track(codec, track.language, heard, begins))
    return Shown([turned(frame) for frame in found], times, length, shape, sounds, tags)


class Trial(NamedTuple):
    folder: Path
    out: Path
    odd: dict[str, Odd]
    done: subprocess.CompletedProcess[str]
    rows: dict[str, dict[str, str]]


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Trial:
    """The whole corpus through the command line; strength=0 leaves the frames as they were."""
    folder, out = tmp_path_factory.mktemp("clips"), tmp_path_factory.mktemp("out")
    odd = {name: make(folder / name) for name, make in CLIPS.items()}
    model, weights = small_model(flow_channels=8, num_flow_blocks=1), folder / "weights.pth"
    content = {"config": dataclasses.asdict(model.config), "model": model.state_dict()}
    save_checkpoint(weights, {**content, "run_id": "r", "epoch": 1})
    files = ("--checkpoint", weights, "--input", folder, "--output", out)
    own = ("--per_frame", "--set", "strength=0", "--set", "device=cpu")
    done = run_tool("enhance_video.py", *files, *own, cwd=out)
    with open(out / "enhance.csv", newline="", encoding="utf-8") as stream:
        rows = {Path(row["file"]).name: row for row in csv.DictReader(stream)}
    return Trial(folder, out, odd, done, rows)


def test_the_corpus_is_done_to_its_end(trial: Trial) -> None:
    refused = {name for name, odd in trial.odd.items() if odd.words}
    assert len(trial.odd) - len(refused) > 30 and len(refused) > 10
    assert trial.done.returncode == 1 and "Traceback" not in trial.done.stderr
    assert set(trial.rows) == set(trial.odd)
    assert files_under(trial.out) == set(trial.odd) - refused | {"enhance.csv"}
    lines = [line for line in trial.done.stderr.splitlines() if line.startswith("failed: ")]
    assert len(lines) == len(refused)


@pytest.mark.parametrize("name", [*CLIPS])
def test_an_odd_clip_is_whole_or_refused(trial: Trial, name: str) -> None:
    odd, note = trial.odd[name], trial.rows[name]["note"]
    if odd.words:
        assert note.startswith("failed: ") and name in note and odd.words in note
        assert "\n" not in note and not (trial.out / name).exists()
        return
    before, after = show(trial.folder / name), show(trial.out / name)
    count, said = len(after.frames), note.split(" frame")[0]
    assert said == str(count)
    if odd.partly:
        assert len(odd.frames) / 3 < count <= len(odd.frames)
        assert (count < 0.9 * len(odd.frames)) == ("cannot be read" in note)
    else:
        assert count == len(odd.frames) and "cannot" not in note
        assert after.length == pytest.approx(before.length, abs=1 / 25)
    for shown, expected in zip(after.frames, odd.frames, strict=False):
        assert shown.shape == expected.shape
        assert np.abs(shown - expected.astype(float)).mean() < odd.tolerance
    times, source = np.array(after.times), np.array(before.times)[:count]
    np.testing.assert_allclose(times - times[0], source - source[0], atol=1.5e-3)
    assert after.shape == odd.shape
    tags = {key: after.tags.get(key.upper(), after.tags.get(key)) for key in TAGS}
    assert tags == TAGS or "title" not in name
    assert len(before.sounds) == len(after.sounds)
    for one, other in zip(before.sounds, after.sounds, strict=True):
        assert one[:2] == other[:2]
        if name.endswith(".avi"):  # made anew
            assert one.samples.shape == pytest.approx(other.samples.shape, abs=2400)
        else:
            np.testing.assert_array_equal(one.samples, other.samples)
        late = 0.041 if name.endswith(".avi") else 1.5e-3  # FFmpeg reads its frames late
        assert other.begins - times[0] == pytest.approx(one.begins - source[0], abs=late)
