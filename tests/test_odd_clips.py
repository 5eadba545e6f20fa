"""Odd and broken clips: each comes out whole as a player shows it, or is refused in one line."""

from __future__ import annotations

import csv
import dataclasses
import signal
import subprocess
import sys
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from cli_tools import assert_one_line_error, environment, files_under, run_tool, stop_when
from conftest import ROOT
from test_enhance import small_model

from support.checkpoints import save_checkpoint

av = pytest.importorskip("av", reason="the optional package av is not installed")

import enhance_video  # noqa: E402
from odd_clips import AAC, CLIPS, TAGS, Odd, Sound, scenes, write  # noqa: E402


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
    assert said == str(count) and ("HDR" in note) == (name == "high dynamic range.mkv")
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
            # AAC draws its noise by what was decoded before
            noise = 0.02 if name == "trimmed.mp4" else 0
            np.testing.assert_allclose(one.samples, other.samples, rtol=0, atol=noise)
        late = 0.041 if name.endswith(".avi") else 1.5e-3  # FFmpeg reads its frames late
        assert other.begins - times[0] == pytest.approx(one.begins - source[0], abs=late)


def test_frames_are_not_darkened_on_their_way(trial: Trial) -> None:
    """Both are read alike here, so what differs is the way through RGB and back."""
    before, after = (show(folder / "no sound.mp4").frames for folder in trial[:2])
    for one, other in zip(before, after, strict=True):
        assert np.abs((other.astype(float) - one).mean((0, 1))).max() < 0.5


# from one format to another ----------------------------------------------------------------------


def convert(checkpoint: Path, source: Path, target: Path) -> int:
    words = ["--checkpoint", checkpoint, "--input", source, "--output", target, "--per_frame"]
    return enhance_video.main([*map(str, words), "--set", "device=cpu"])


@pytest.fixture(scope="module")
def checkpoint(trial: Trial) -> Path:
    return trial.folder / "weights.pth"


def test_every_track_is_converted_whole_and_at_its_time(checkpoint: Path, tmp_path: Path) -> None:
    sounds = Sound("flac", start=0.2, language="eng"), Sound("libmp3lame", language="deu")
    write(tmp_path / "in.mkv", scenes(), *sounds)
    before = show(tmp_path / "in.mkv")
    for name, codec in (("out.webm", "opus"), ("out.m4v", "aac")):
        assert convert(checkpoint, tmp_path / "in.mkv", tmp_path / name) == 0
        after = show(tmp_path / name)
        assert [sound[:2] for sound in after.sounds] == [(codec, "eng"), (codec, "deu")]
        for one, other in zip(before.sounds, after.sounds, strict=True):
            # the encoder's lead-in may stay in
            assert other.samples.shape[1] == pytest.approx(one.samples.shape[1], abs=1400)
            lead = other.begins - after.times[0] - one.begins
            assert lead == pytest.approx(0, abs=0.025)


@pytest.mark.parametrize(
    ("sound", "name", "codec"),
    [
        ("pcm_u8", "out.mp4", "aac"),
        ("pcm_s16le", "out.m4v", "aac"),
        ("pcm_s16be", "out.avi", "mp3"),
        ("flac", "out.mov", "aac"),
        ("libopus", "out.mov", "aac"),
        ("libmp3lame", "out.webm", "opus"),
    ],
)
def test_sound_that_a_format_refuses_is_converted(
    checkpoint: Path, tmp_path: Path, sound: str, name: str, codec: str
) -> None:
    """Also where FFmpeg's list of the format's codecs names it."""
    write(tmp_path / "in.mkv", scenes(count=3), Sound(sound))
    assert convert(checkpoint, tmp_path / "in.mkv", tmp_path / name) == 0
    (after,) = show(tmp_path / name).sounds
    assert after.codec == codec and after.samples.shape[1] == pytest.approx(19200, abs=2500)


def test_what_was_trimmed_stays_unheard(trial: Trial, checkpoint: Path, tmp_path: Path) -> None:
    assert convert(checkpoint, trial.folder / "trimmed.mp4", tmp_path / "out.mkv") == 0
    after = show(tmp_path / "out.mkv")
    assert len(after.frames) == 5 and after.times[0] < 0.05 and after.length < 0.3
    (sound,) = after.sounds
    assert after.times[0] - sound.begins == pytest.approx(0.03, abs=0.02)


def test_sound_around_is_converted(checkpoint: Path, tmp_path: Path) -> None:
    """Television's 5.1 channels go by another name in Opus."""
    with av.open(str(tmp_path / "in.mkv"), "w") as writing:
        video = writing.add_stream("libx264", rate=25)
        video.height, video.width, video.pix_fmt = 48, 64, "yuv420p"
        track = writing.add_stream("ac3", rate=48000, layout="5.1(side)")
        quiet = av.AudioFrame.from_ndarray(
            np.zeros((6, 9600), np.float32), format="fltp", layout="5.1(side)"
        )
        quiet.sample_rate, quiet.pts = 48000, 0
        packets = [*track.encode(quiet), *track.encode(None)]
        for pixels in scenes():
            packets += video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24"))
        for packet in packets + video.encode(None):
            writing.mux(packet)
    assert convert(checkpoint, tmp_path / "in.mkv", tmp_path / "out.webm") == 0
    (sound,) = show(tmp_path / "out.webm").sounds
    assert sound.codec == "opus" and sound.samples.size >= 9600


def test_avi_refuses_sound_that_begins_late(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "in.mkv", scenes(), Sound("aac", start=0.3))
    status = convert(checkpoint, tmp_path / "in.mkv", tmp_path / "out.avi")
    error = capsys.readouterr().err.splitlines()[-1]
    assert_one_line_error(status, error, "out.avi", "late", ".mkv")
    assert files_under(tmp_path) == {"in.mkv"}


# a stop, and a full disk -------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_a_full_disk_is_one_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    """It is the output that is named, and nothing half-written stays."""
    resource = pytest.importorskip("resource", reason="limits of files need POSIX")
    write(tmp_path / "in.mp4", scenes(count=3))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        status = convert(checkpoint, tmp_path / "in.mp4", tmp_path / f"out{suffix}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err.splitlines()[-1]
    assert_one_line_error(status, error, f"out{suffix}", "cannot write", "free space")
    assert files_under(tmp_path) == {"in.mp4"}


def test_ctrl_c_in_the_middle_leaves_nothing_half_written(checkpoint: Path, tmp_path: Path) -> None:
    write(tmp_path / "in.mp4", scenes(count=600), AAC, quality={"preset": "ultrafast"})
    tool = str(ROOT / "tools" / "enhance_video.py")
    words = ["--checkpoint", str(checkpoint), "--input", "in.mp4", "--output", "out/it.mp4"]
    command = [sys.executable, tool, *words, "--set", "device=cpu"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    # tests that run in the background of a shell hand on that Ctrl-C is to be ignored
    pipes["preexec_fn"] = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, cwd=tmp_path, env=environment(), **pipes) as process:
        half = tmp_path / "out" / f".it.{process.pid}.mp4"
        printed = stop_when(process, half, signal.SIGINT)
    assert process.returncode == 130 and printed.splitlines()[-1].endswith("interrupted")
    assert "Traceback" not in printed and files_under(tmp_path) == {"in.mp4", "out"}


# a folder again -----------------------------------------------------------------------------------


def test_a_folder_of_clips_keeps_a_journal(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the rules and words of pictures: by input, weights and settings."""
    for name in ("a.mp4", "b.mp4"):
        write(tmp_path / "in" / name, scenes(count=2))

    def again(*settings: str) -> str:
        words = ["--checkpoint", checkpoint, "--input", tmp_path / "in", "--output", tmp_path / "o"]
        assert enhance_video.main([*map(str, words), "--set", "device=cpu", *settings]) == 0
        return capsys.readouterr().out.splitlines()[0]

    assert again() == "2 clips: 2 new"
    assert again() == "2 clips: 2 already done"
    for given in (["--per_frame"], [], ["--set", "exposure=1"], ["--set", "strength=0.5"]):
        assert again(*given) == "2 clips: 2 again, for other weights or settings"
    write(tmp_path / "in" / "b.mp4", scenes(count=3))
    last = again("--set", "strength=0.5")
    assert last == "2 clips: 1 already done, 1 again, for a changed input"
    (tmp_path / "o" / "a.mp4").unlink()
    assert again("--set", "strength=0.5") == "2 clips: 1 new, 1 already done"
    (tmp_path / "o" / ".enhance.jsonl").unlink()
    assert "2 kept, as they were not made here" in again()
