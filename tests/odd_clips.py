"""A corpus of odd and broken clips, made on the fly, and what must come of each."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from cli_tools import dark_picture, target_picture
from PIL import Image

RATE = 48_000
COUNT = 10
QUALITY = {
    "libx264": {"crf": "3", "bf": "0"},
    "libvpx-vp9": {"crf": "6", "b": "0", "cpu-used": "8"},
    "mpeg4": {"b": "9000000", "bf": "2"},
}


class Sound(NamedTuple):
    """A track: its codec, when it starts, how long it is, both in seconds; its language."""

    codec: str
    start: float = 0.0
    seconds: float = 0.4
    language: str = "und"


class Odd(NamedTuple):
    """A clip and what must come of it.

    frames     what a player shows, (H, W, 3) uint8 each
    partly     fewer frames are right, and the table says so
    words      of the refusal, where it must be refused
    tolerance  largest mean difference of a frame, in levels of 255
    shape      width over height of a pixel
    """

    frames: Sequence[np.ndarray] = ()
    partly: bool = False
    words: str = ""
    tolerance: float = 3.0
    shape: Fraction = Fraction(1)


def scenes(height: int = 48, width: int = 64, count: int = COUNT) -> list[np.ndarray]:
    """Frames that differ: a red mark in the upper left corner, and a bar that wanders right."""
    ground = dark_picture(target_picture(4, height, width))
    found = []
    for place in range(count):
        frame = ground.copy()
        frame[: height // 4, : width // 4] = (150, 20, 20)
        left = place * width // (count + 2)
        frame[height * 3 // 4 :, left : left + width // 8] = (60, 90, 140)
        found.append(frame)
    return found


def picture(kind: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(scenes()[0]).save(stream, kind)
    return stream.getvalue()


def tone(sound: Sound, number: int) -> list[av.AudioFrame]:
    """Frames of a sine of its own pitch."""
    samples = round(sound.seconds * RATE)
    wave = 9000 * np.sin(np.arange(samples) / (20 + 9 * number))
    found = []
    for start in range(0, samples, 960):
        part = wave[start : start + 960].astype(np.int16)[None]
        frame = av.AudioFrame.from_ndarray(part, format="s16", layout="mono")
        frame.sample_rate, frame.pts = RATE, round(sound.start * RATE) + start
        frame.time_base = Fraction(1, RATE)
        found.append(frame)
    return found


def write(
    path: Path,
    frames: Sequence[np.ndarray],
    *sounds: Sound,
    codec: str = "libx264",
    pixel: str = "yuv420p",
    rate: Fraction | int = 25,
    moments: Sequence[float] = (),
    start: float = 0.0,
    turn: int | None = None,
    mirror: bool = False,
    shape: Fraction | None = None,
    kind: str | None = None,
    options: dict[str, str] | None = None,
    tags: dict[str, str] | None = None,
    cover: bool = False,
    curve: int | None = None,
    quality: dict[str, str] | None = None,
) -> None:
    """An almost lossless clip."""
    times = list(moments) or [start + float(place / Fraction(rate)) for place in range(len(frames))]
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format=kind, options=options or {}) as writing:
        writing.metadata.update(tags or {})
        video: Any = writing.add_stream(
            codec, rate=rate, options=QUALITY.get(codec, {}) | (quality or {})
        )
        video.height, video.width, video.pix_fmt = *frames[0].shape[:2], pixel
        fine = moments or start
        base = Fraction(1, 1000) if fine else 1 / Fraction(rate)
        video.codec_context.time_base = base
        if curve is not None:
            video.codec_context.color_trc = curve
        if shape is not None:
            video.codec_context.sample_aspect_ratio = shape
        if turn is not None:
            video.set_display_rotation(turn, hflip=mirror)
        if cover:
            writing.add_attachment("cover.png", "image/png", picture("PNG"))
        tracks = []
        for sound in sounds:
            track: Any = writing.add_stream(sound.codec, rate=RATE, layout="mono")
            track.metadata["language"] = sound.language
            tracks.append(track)
        packets = []
        for number, (track, sound) in enumerate(zip(tracks, sounds, strict=True)):
            for part in [*tone(sound, number), None]:
                packets += track.encode(part)
        for place, pixels in enumerate(frames):
            shown = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            shown.pts, shown.time_base = round(times[place] / base), base
            packets += video.encode(shown)
        for packet in sorted(packets + video.encode(), key=lambda p: p.dts * p.time_base):
            writing.mux(packet)


Maker = Callable[[Path], Odd]
CLIPS: dict[str, Maker] = {}


def clip(name: str) -> Callable[[Maker], Maker]:
    def keep(make: Maker) -> Maker:
        CLIPS[name] = make
        return make

    return keep


def plain(name: str, *sounds: Sound, **given: Any) -> None:
    """A clip of `scenes` that is odd by the arguments of `write`."""
    of_odd = {key: given.pop(key) for key in ("tolerance",) if key in given}
    size, count = given.pop("size", (48, 64)), given.pop("count", COUNT)

    def make(path: Path) -> Odd:
        frames = scenes(*size, count)
        stored = frames
        if given.get("turn") is not None:  # turned back, so that a player sets it upright
            stored = [frame[:, ::-1] if given.get("mirror") else frame for frame in frames]
            stored = [np.ascontiguousarray(np.rot90(f, -given["turn"] // 90)) for f in stored]
        write(path, stored, *sounds, **given)
        height, width = size[0] // 2 * 2, size[1] // 2 * 2
        shape = given.get("shape") or Fraction(1)
        return Odd(
            [frame[:height, :width] for frame in frames],
            shape=1 / shape if (given.get("turn") or 0) % 180 else shape,
            **of_odd,
        )

    CLIPS[name] = make


AAC, OPUS = Sound("aac"), Sound("libopus")
UNEVEN = [0, 0.04, 0.047, 0.137, 0.177, 0.184, 0.4, 0.433, 0.5, 0.6]
plain("sound first.mp4", AAC)
plain("no sound.mp4")
plain("two tracks.mp4", Sound("aac", language="eng"), Sound("libmp3lame", language="deu"))
plain("two tracks.mkv", Sound("flac", language="eng"), Sound("libopus", language="deu"))
plain("late sound.mp4", Sound("aac", start=0.2))
plain("late picture.mkv", OPUS, start=0.2)
plain("long sound.mov", Sound("pcm_s16le", seconds=1.2))
plain("odd sides.mkv", codec="ffv1", pixel="yuv444p", size=(33, 47), tolerance=4)
for degrees in (90, 180, -90):
    plain(f"turned {degrees}.mp4", AAC, turn=degrees)
plain("mirrored.mp4", turn=0, mirror=True)
plain("mirrored and turned.mov", turn=90, mirror=True)
plain("uneven.mkv", OPUS, moments=UNEVEN)
plain("uneven.mp4", AAC, moments=UNEVEN)
plain("uneven.webm", OPUS, moments=UNEVEN, codec="libvpx-vp9")
plain("one frame.mp4", count=1)
plain("one frame.webm", count=1, codec="libvpx-vp9")
plain("vp9.webm", OPUS, codec="libvpx-vp9")
plain("raw sound.mov", Sound("pcm_s16le"))
plain("ten bits.mkv", Sound("flac"), pixel="yuv420p10le")
plain("high dynamic range.mkv", pixel="yuv420p10le", curve=18)
plain("fifty a second.mp4", AAC, rate=50)
plain("film of television.mp4", AAC, rate=Fraction(30000, 1001))
plain("from ten seconds.mkv", Sound("libopus", start=10.0), start=10.0)
plain("from ten seconds.mp4", Sound("aac", start=10.0), start=10.0)
plain("stream of television.mp4", AAC, kind="mpegts")
plain("fragments.mp4", AAC, options={"movflags": "frag_keyframe+empty_moov"})
plain("wide pixels.mp4", AAC, shape=Fraction(4, 3))
plain("wide pixels turned.mp4", AAC, shape=Fraction(4, 3), turn=90)
plain("old.avi", Sound("libmp3lame"), codec="mpeg4")
plain("photographs.mov", codec="mjpeg", pixel="yuvj420p", tolerance=5)
plain("grey.mkv", codec="ffv1", pixel="gray", tolerance=40)
plain("lossless.mkv", codec="ffv1", pixel="bgr0", tolerance=4)
plain("with a cover.mkv", OPUS, cover=True)
TAGS = {"title": "A walk", "creation_time": "2024-05-06T07:08:09.000000Z"}
for suffix, codec in ((".mp4", "libx264"), (".mkv", "libx264"), (".webm", "libvpx-vp9")):
    plain(f"with a title{suffix}", codec=codec, tags=TAGS)
plain("a colon: in the name.mp4", AAC)
plain("%03d.mp4", AAC)


def text(name: str, data: bytes, words: str = "") -> None:
    def make(path: Path) -> Odd:
        path.write_bytes(data)
        return Odd(words=words or path.name)

    CLIPS[name] = make


for form in ("PNG", "JPEG", "WEBP", "BMP"):
    text(f"picture {form}.mp4", picture(form), "is a picture")
text("picture GIF.mp4", picture("GIF"))
text("empty.mp4", b"", "empty")
text("words.mp4", b"a few words, and no clip\n" * 40)
text("captions.mkv", b"1\n00:00:00,000 --> 00:00:01,000\nHello\n\n" * 3)
text("playlist.mp4", b"ffconcat version 1.0\nfile 'no sound.mp4'\n")
text(
    "list of parts.mp4",
    b"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nno sound.mp4\n#EXT-X-ENDLIST\n",
)


@clip("no picture.mp4")
def _(path: Path) -> Odd:
    with av.open(str(path), "w") as writing:
        track: Any = writing.add_stream("aac", rate=RATE, layout="mono")
        for part in [*tone(AAC, 0), None]:
            writing.mux(track.encode(part))
    return Odd(words="no moving picture")


def cut(name: str, share: float, *sounds: Sound, words: str = "", **given: Any) -> None:
    """The first bytes of a clip, whose frames stand alone."""
    tolerance = given.pop("tolerance", 3.0)

    def make(path: Path) -> Odd:
        frames = scenes(count=30)
        write(path, frames, *sounds, quality={"g": "1"}, **given)
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])
        return Odd(frames, True, words, tolerance)

    CLIPS[name] = make


LONG = Sound("libopus", seconds=1.2)
cut("cut.mp4", 0.5, AAC, words="cut.mp4")
cut("cut.mkv", 0.6, LONG)
cut("cut with its index.mp4", 0.6, options={"movflags": "faststart"})
cut("cut.webm", 0.6, LONG, codec="libvpx-vp9")
cut("cut.avi", 0.6, codec="mpeg4", tolerance=4)


@clip("trimmed.mp4")
def _(path: Path) -> Odd:
    """Of ten frames, an edit list shows the last five, as telephones trim."""
    write(path, scenes(), AAC)
    data, place = bytearray(path.read_bytes()), -1
    for later in (2560, 9600):  # 0.2 s in units of each track
        place = data.index(b"elst", place + 1)
        _, start = struct.unpack_from(">Ii", data, place + 12)
        struct.pack_into(">Ii", data, place + 12, 200, start + later)
    path.write_bytes(data)
    return Odd(scenes()[5:])


@clip("damaged inside.mkv")
def _(path: Path) -> Odd:
    frames = scenes(count=30)
    write(path, frames, quality={"g": "1"})
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 200] = bytes(200)
    path.write_bytes(data)
    return Odd(frames, True, tolerance=90)


@clip("cover and sound alone.mkv")
def _(path: Path) -> Odd:
    with av.open(str(path), "w") as writing:
        writing.add_attachment("cover.png", "image/png", picture("PNG"))
        track: Any = writing.add_stream("libopus", rate=RATE, layout="mono")
        for part in [*tone(OPUS, 0), None]:
            writing.mux(track.encode(part))
    return Odd(words="no moving picture")


@clip("grows.mkv")
def _(path: Path) -> Odd:
    """Two sizes in one stream: two clips of television, one behind the other."""
    other = path.with_suffix(".ts")
    write(path, scenes(), kind="mpegts")
    write(other, scenes(64, 80), start=1.0, kind="mpegts")
    path.write_bytes(path.read_bytes() + other.read_bytes())
    other.unlink()
    return Odd(words="size")
