"""Clips: no flicker, sound and times kept, every container, and broken ones in one line each."""

from __future__ import annotations

import csv
import dataclasses
import subprocess
import sys
from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_tools import assert_one_line_error, dark_picture, files_under, save_picture, target_picture
from conftest import ROOT
from test_enhance import CPU, small_model

import model_script as ms
from support.checkpoints import save_checkpoint
from support.decoding import VIDEO_SUFFIXES

av = pytest.importorskip("av", reason="the optional package av is not installed")

import clip_output  # noqa: E402
import enhance_video  # noqa: E402
from clip_input import Clip  # noqa: E402

SCENE = dark_picture(target_picture(4, 64, 80))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that changes its input visibly."""
    path = tmp_path_factory.mktemp("weights") / "best_model.pth"
    model = small_model(flow_channels=8, num_flow_blocks=1)
    content = {"config": dataclasses.asdict(model.config), "model": model.state_dict()}
    save_checkpoint(path, {**content, "run_id": "r", "epoch": 1})
    return path


def noisy(scene: np.ndarray, count: int, strength: float = 3.0) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    noise = (rng.normal(0, strength, scene.shape) for _ in range(count))
    return [np.clip(scene + one, 0, 255).astype(np.uint8) for one in noise]


def write_clip(
    path: Path,
    frames: Sequence[np.ndarray],
    codec: str = "libx264",
    sound: str = "",
    sound_first: bool = False,
    moments: Sequence[int] = (),
    options: dict[str, str] | None = None,
) -> Path:
    """An almost lossless clip of 25 frames a second, or at the `moments` in milliseconds, with half
    a second of a tone if a sound's codec is named."""
    quality = {"libx264": {"crf": "4"}, "libvpx-vp9": {"crf": "8", "b": "0", "cpu-used": "8"}}
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=options or {}) as writing:
        video = writing.add_stream(codec, rate=25, options=quality.get(codec, {}))
        video.height, video.width, video.pix_fmt = *frames[0].shape[:2], "yuv420p"
        packets: list[Any] = []
        if moments:
            video.codec_context.time_base = Fraction(1, 1000)
        if sound:
            audio = writing.add_stream(sound, rate=48000, layout="mono")
            tone = (9000 * np.sin(np.arange(24000) / 20)).astype(np.int16)[None]
            frame = av.AudioFrame.from_ndarray(tone, format="s16", layout="mono")
            frame.sample_rate, frame.pts = 48000, 0
            packets = audio.encode(frame) + audio.encode()
        if sound_first:
            writing.mux(packets)
        for place, pixels in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if moments:
                picture.pts, picture.time_base = moments[place], Fraction(1, 1000)
            writing.mux(video.encode(picture))
        writing.mux(video.encode())
        if not sound_first:
            writing.mux(packets)
    return path


def read_clip(path: Path) -> tuple[list[np.ndarray], list[float], float]:
    """(frames, their times in seconds, seconds of sound)."""
    with av.open(str(path)) as reading:
        found = list(reading.decode(video=0))
        frames = [frame.to_ndarray(format="rgb24") for frame in found]
        times = [float(frame.pts * frame.time_base) for frame in found]
    with av.open(str(path)) as reading:
        sounds = list(reading.decode(audio=0)) if reading.streams.audio else []
    return frames, times, sum(sound.samples / sound.sample_rate for sound in sounds)


def codecs(path: Path) -> list[str]:
    with av.open(str(path)) as reading:
        return [stream.codec_context.codec.canonical_name for stream in reading.streams]


def enhance(checkpoint: Path, source: str | Path, target: str | Path, *settings: str) -> int:
    arguments = ["--checkpoint", checkpoint, "--input", source, "--output", target]
    own = [part for setting in ("device=cpu", *settings) for part in ("--set", setting)]
    return enhance_video.main([*map(str, arguments), *own])


def rows_of(folder: Path) -> dict[str, dict[str, str]]:
    with open(folder / "enhance.csv", newline="", encoding="utf-8") as stream:
        return {Path(row["file"]).name: row for row in csv.DictReader(stream)}


# one clip -----------------------------------------------------------------------------------------


def test_a_static_clip_does_not_flicker(checkpoint: Path, tmp_path: Path) -> None:
    """The noise differs in every frame; the mean of the enhanced frames must not."""
    source = write_clip(tmp_path / "in.mp4", noisy(SCENE, 20), sound="aac")
    assert enhance(checkpoint, source, tmp_path / "out.mp4") == 0
    frames, times, sound = read_clip(tmp_path / "out.mp4")
    assert len(frames) == 20 and frames[0].shape == (64, 80, 3) and 0.4 < sound < 0.6
    np.testing.assert_allclose(times, np.arange(20) / 25, atol=1e-3)
    assert np.std([frame.mean() for frame in frames]) < 0.5
    loaded = ms.load_model(str(checkpoint), {"device": "cpu"}, ms.ConditionalFlow)
    first = read_clip(source)[0][0]
    expected = ms.enhance_pixels(loaded.model, first, loaded.use, CPU).best / 257
    assert np.abs(frames[0] - expected).mean() < 5  # it is the enhancement, H.264 apart
    assert np.abs((frames[0] - expected).mean((0, 1))).max() < 2
    with av.open(str(tmp_path / "out.mp4")) as reading:  # players need not guess what RGB it means
        assert next(reading.decode(video=0)).colorspace == clip_output.Colorspace.ITU709


def test_noise_does_not_boil_unless_it_is_asked_for() -> None:
    given = {"device": "cpu", "camera": "ordinary"}
    loaded = ms.load_model(str(ms.RELEASED), given, ms.ConditionalFlow)
    spreads = []
    for per_frame in (False, True):
        enhancer = enhance_video.FrameEnhancer(loaded, enhance_video.Wish(None, per_frame), 25.0)
        found = np.stack([enhancer(frame) for frame in noisy(SCENE, 20)][8:])
        spreads.append(found.astype(float).std(0).mean())
    assert spreads[0] < 0.5 * spreads[1] and spreads[1] > 1


def test_frames_may_keep_their_own_noise(checkpoint: Path, tmp_path: Path) -> None:
    source = write_clip(tmp_path / "in.mp4", noisy(SCENE, 6))
    found = []
    for options in ([], ["--per_frame"]):
        argv = ["--checkpoint", checkpoint, "--input", source, "--output", tmp_path / "out.mp4"]
        words = [str(word) for word in argv]
        assert enhance_video.main([*words, "--set", "device=cpu", *options]) == 0
        found.append((tmp_path / "out.mp4").read_bytes())
    assert found[0] != found[1]


def test_the_brightness_follows_the_scene_not_the_noise() -> None:
    model = small_model()
    with torch.no_grad():
        one, near, far = (
            model.survey(torch.full((1, 3, 32, 32), level)) for level in (0.2, 0.21, 0.6)
        )
    mixed = enhance_video.smooth_survey(one, near, 0.25)
    for a, b, c in zip(one, near, mixed, strict=True):
        torch.testing.assert_close(c, 0.75 * a + 0.25 * b)
    assert enhance_video.smooth_survey(one, far, 0.25) is far
    assert enhance_video.smooth_survey(None, one, 0.25) is one


@pytest.mark.parametrize(
    ("given", "codec", "sound", "sound_first"),
    [
        ("a.mp4", "libx264", "aac", True),
        ("a.mp4", "libx264", "aac", False),
        ("a.mov", "libx264", "pcm_s16le", True),
        ("a.mkv", "libx264", "libopus", True),
        ("a.avi", "mpeg4", "libmp3lame", True),
        ("a.webm", "libvpx-vp9", "libopus", True),
    ],
)
def test_sound_may_come_before_the_first_frame(
    checkpoint: Path, tmp_path: Path, given: str, codec: str, sound: str, sound_first: bool
) -> None:
    source = write_clip(tmp_path / given, noisy(SCENE, 5), codec, sound, sound_first)
    assert enhance(checkpoint, source, tmp_path / f"out_{given}") == 0
    assert codecs(tmp_path / f"out_{given}")[1] == codecs(source)[1]  # copied, not made anew
    before, after = read_clip(source), read_clip(tmp_path / f"out_{given}")
    assert len(after[0]) == 5 and after[2] == pytest.approx(before[2], abs=0.05) and after[2] > 0.4
    np.testing.assert_allclose(np.diff(after[1]), 1 / 25, atol=2e-3)


@pytest.mark.parametrize(
    ("suffix", "sound"), [*((suffix, "pcm_s16le") for suffix in VIDEO_SUFFIXES), (".webm", "aac")]
)
def test_every_container_takes_every_clip(
    checkpoint: Path, tmp_path: Path, suffix: str, sound: str
) -> None:
    """Sound that the output's format cannot hold is converted; WebM gets VP9."""
    source = write_clip(tmp_path / "in.mov", noisy(SCENE, 4), sound=sound)
    assert enhance(checkpoint, source, tmp_path / f"out{suffix}") == 0
    frames, _, seconds = read_clip(tmp_path / f"out{suffix}")
    assert len(frames) == 4 and 0.4 < seconds < 0.65
    picture, heard = codecs(tmp_path / f"out{suffix}")
    assert picture == ("vp9" if suffix == ".webm" else "h264")
    assert heard == "opus" if suffix == ".webm" else heard in (codecs(source)[1], "aac", "ac3")
    assert np.abs(frames[0] - read_clip(source)[0][0].astype(float)).mean() > 3


def test_frames_keep_their_own_times(checkpoint: Path, tmp_path: Path) -> None:
    moments = [0, 40, 47, 137, 177, 184]
    source = write_clip(tmp_path / "in.mkv", noisy(SCENE, 6), moments=moments)
    for name in ("out.mkv", "out.mp4", "out.webm"):
        assert enhance(checkpoint, source, tmp_path / name) == 0
        times = read_clip(tmp_path / name)[1]
        np.testing.assert_allclose(times, np.array(moments) / 1000, atol=1.5e-3)


def test_frames_at_one_moment_are_put_apart(tmp_path: Path) -> None:
    source = write_clip(tmp_path / "in.mp4", noisy(SCENE, 1))
    with (
        Clip(source) as clip,
        clip_output.Output(tmp_path / "o.mp4", tmp_path / "o.mp4", clip) as output,
    ):
        (frame,) = (part for part in clip.parts() if isinstance(part, av.VideoFrame))
        frame.time_base = Fraction(1, 25)
        for moment in (3, 3, None, 1, 9):
            frame.pts = moment
            output.frame(SCENE, frame)
    times = read_clip(tmp_path / "o.mp4")[1]
    tick = 1 / 12800  # of the clip
    expected = [3 / 25, 3 / 25 + tick, 4 / 25 + tick, 4 / 25 + 2 * tick, 9 / 25]
    np.testing.assert_allclose(times, expected, atol=1e-6)


def test_odd_sides_lose_a_row(checkpoint: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.mkv"
    with av.open(str(source), "w") as writing:
        video = writing.add_stream("ffv1", rate=25)
        video.height, video.width, video.pix_fmt = 33, 47, "yuv444p"
        for pixels in noisy(SCENE[:33, :47], 3):
            writing.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        writing.mux(video.encode())
    assert enhance(checkpoint, source, tmp_path / "out.mp4") == 0
    assert read_clip(tmp_path / "out.mp4")[0][0].shape == (32, 46, 3)


def test_exposure_and_reference_are_heard(checkpoint: Path, tmp_path: Path) -> None:
    source = write_clip(tmp_path / "in.mp4", noisy(SCENE, 3))
    liked = save_picture(tmp_path / "liked.png", np.full((20, 30, 3), 90, np.uint8))
    means = {}
    for name in ("exposure=-1", "exposure=0", f"reference={liked}", "strength=0"):
        assert enhance(checkpoint, source, tmp_path / "out.mp4", name) == 0
        means[name] = np.mean(read_clip(tmp_path / "out.mp4")[0])
    assert means["exposure=-1"] < 0.85 * means["exposure=0"]
    assert means[f"reference={liked}"] == pytest.approx(90, abs=2)
    assert means["strength=0"] == pytest.approx(np.mean(read_clip(source)[0]), abs=2)


# folders ------------------------------------------------------------------------------------------


def test_a_broken_clip_does_not_end_a_folder(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    album, out = tmp_path / "in", tmp_path / "out"
    write_clip(album / "a.mp4", noisy(SCENE, 4), sound="aac", sound_first=True)
    write_clip(album / "deep" / "b.mkv", noisy(SCENE, 4))
    whole = (album / "a.mp4").read_bytes()
    (album / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (album / "broken.webm").write_bytes(b"no clip at all" * 50)
    (album / "empty.avi").write_bytes(b"")
    save_picture(album / "picture.png", SCENE)
    assert enhance(checkpoint, album, out) == 1
    printed = capsys.readouterr()
    assert "2 clips enhanced, 3 failed" in printed.out
    assert files_under(out) == {"a.mp4", "deep", "deep/b.mkv", "enhance.csv"}
    rows = rows_of(out)
    assert rows["a.mp4"]["note"] == "4 frames" and float(rows["a.mp4"]["brightness_after"]) > 0
    for name in ("cut.mp4", "broken.webm", "empty.avi"):
        assert rows[name]["note"].startswith("failed: ") and name in rows[name]["note"]
    before = (out / "a.mp4").stat().st_mtime_ns
    assert enhance(checkpoint, f"{album}/*a.mp4", out) == 0
    assert "1 already done" in capsys.readouterr().out
    assert (out / "a.mp4").stat().st_mtime_ns == before
    assert enhance(checkpoint, f"{album}/*a.mp4", out, "overwrite=true") == 0
    assert (out / "a.mp4").stat().st_mtime_ns != before


def test_a_clip_of_which_frames_are_missing_says_so(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_clip(tmp_path / "in.mkv", noisy(SCENE, 20))
    data = source.read_bytes()
    source.write_bytes(data[: len(data) // 3])
    assert enhance(checkpoint, source, tmp_path / "out.mp4") == 0
    shown = len(read_clip(tmp_path / "out.mp4")[0])
    assert 0 < shown < 15 and f"{shown} frames of about 20" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["told.mp4", "by its length.mkv", "fragments.mp4"])
def test_the_bar_counts_frames_even_where_the_clip_does_not(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    style = {"mininterval": 0, "miniters": 1, "delay": 0}
    monkeypatch.setattr(enhance_video, "progress_style", lambda: dict(style))
    options = {"movflags": "frag_keyframe+empty_moov"} if "fragments" in name else {}
    write_clip(tmp_path / name, noisy(SCENE, 10), sound="aac", options=options)
    assert enhance(checkpoint, tmp_path / name, tmp_path / "out.mp4") == 0
    last = [line for line in capsys.readouterr().err.split("\r") if "10/1" in line][-1]
    assert "frame/s" in last and "<" in last  # the rate, and the time that is left
    total = int(last.split("10/")[1].split()[0])
    assert total == 10 or (not name.startswith("told") and 10 <= total <= 13)


# mistakes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    ["broken", "empty", "picture", "missing", "still", "sound alone", "small", "itself"],
)
def test_mistakes_are_one_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    source, target = tmp_path / "in.mp4", tmp_path / "out.mp4"
    words = {"still": ".mp4", "itself": "itself", "small": "least side", "empty": "empty"}
    words["picture"] = "model_script.py --mode enhance"
    if kind == "broken":
        source.write_bytes(b"no clip at all" * 50)
    elif kind == "empty":
        source.write_bytes(b"")
    elif kind == "picture":
        save_picture(tmp_path / "picture.png", SCENE).rename(source)
    elif kind == "sound alone":
        with av.open(str(source), "w") as writing:
            audio = writing.add_stream("aac", rate=48000, layout="mono")
            silence = np.zeros((1, 4800), np.int16)
            frame = av.AudioFrame.from_ndarray(silence, format="s16", layout="mono")
            frame.sample_rate = 48000
            writing.mux(audio.encode(frame))
            writing.mux(audio.encode())
    elif kind != "missing":
        write_clip(source, noisy(SCENE[:14] if kind == "small" else SCENE, 2))
    target = {"still": tmp_path / "out.png", "itself": source}.get(kind, target)
    before = files_under(tmp_path)
    status = enhance(checkpoint, source, target)
    error = capsys.readouterr().err.splitlines()[-1]
    assert_one_line_error(status, error, words.get(kind, str(source)))
    assert files_under(tmp_path) == before


@pytest.mark.parametrize("setting", ["samples=2", "quality=3", "tempreature=1", "exposure=9"])
def test_settings_that_do_nothing_here_are_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str
) -> None:
    status = enhance(checkpoint, tmp_path / "in.mp4", tmp_path / "out.mp4", setting)
    assert_one_line_error(status, capsys.readouterr().err, "--set")


def test_another_systems_weights_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for system, words in (("RetinexNet", "single pictures"), ("Unheard", "Unheard")):
        content = {"system": system, "config": {}, "model": {}, "run_id": "r"}
        save_checkpoint(tmp_path / "x.pth", content)
        status = enhance(tmp_path / "x.pth", tmp_path / "in.mp4", tmp_path / "out.mp4")
        assert_one_line_error(status, capsys.readouterr().err, "x.pth", words)


def test_memory_that_runs_out_is_one_line(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def scarce(*arguments: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    source = write_clip(tmp_path / "in.mp4", noisy(SCENE, 2))
    monkeypatch.setattr(ms, "enhance_pixels", scarce)
    status = enhance(checkpoint, source, tmp_path / "out.mp4")
    assert_one_line_error(status, capsys.readouterr().err.splitlines()[-1], "not enough memory")
    assert files_under(tmp_path) == {"in.mp4"}


def test_the_command_starts_from_anywhere_and_explains_itself(tmp_path: Path) -> None:
    script = str(ROOT / "tools" / "enhance_video.py")
    run = partial(subprocess.run, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    done = run([sys.executable, script, "--help"])
    assert done.returncode == 0 and "python tools/enhance_video.py --input" in done.stdout
    code = f"import runpy, sys; sys.modules['av'] = None; runpy.run_path({script!r})"
    folder = {"PYTHONPATH": str(ROOT / "tools")}
    done = run([sys.executable, "-c", code], env=folder)
    assert_one_line_error(done.returncode, done.stderr, "pip install av")
