"""The clip that is read: its frames upright and in RGB, the packets of its sound.

What is broken inside is left out, as players do; what is no clip is refused in one line.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import Colorspace

from support.decoding import opened
from support.settings import UserError

# clips alone: FFmpeg also reads pictures, texts, and lists that name other files
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg"
# swscale's flags bicubic, full_chroma_int, full_chroma_inp and accurate_rnd, which av 17 cannot
# name; without these a frame gets darker by more than one level
EXACT = 0x4 | 0x2000 | 0x4000 | 0x40000
HDR = (16, 18)  # FFmpeg's numbers of the curves PQ and HLG
UNTAGGED = 2  # FFmpeg's number of a matrix that a frame does not name
KEPT_OUT = (
    "major_brand",
    "minor_version",
    "compatible_brands",
    "encoder",
)  # of the file, not of us
WIDE, TALL = 1280, 576  # above these, players take an untagged frame for BT.709


def orientation(frame: Any) -> tuple[bool, bool, bool]:
    """Whether a frame is to be transposed, and after that mirrored left to right and upside down,
    to stand as a player shows it."""
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            (a, b), (c, d) = np.frombuffer(bytes(data), np.int32)[[[0, 1], [3, 4]]].astype(int)
            transposed = abs(b) > abs(a)
            signs = (c, b) if transposed else (a, d)
            return bool(transposed), bool(signs[0] < 0), bool(signs[1] < 0)
    return False, False, False


def upright(frame: Any) -> np.ndarray:
    """(H, W, 3) uint8 of a frame as it is to be seen, of even sides, as H.264 needs them."""
    large = frame.width >= WIDE or frame.height > TALL
    matrix = Colorspace.ITU709 if frame.colorspace == UNTAGGED and large else None
    seen = frame.reformat(format="rgb24", src_colorspace=matrix, interpolation=EXACT).to_ndarray()
    transposed, mirrored, flipped = orientation(frame)
    seen = seen.swapaxes(0, 1) if transposed else seen
    seen = seen[:: -1 if flipped else 1, :: -1 if mirrored else 1]
    return np.ascontiguousarray(seen[: len(seen) // 2 * 2, : seen.shape[1] // 2 * 2])


def refusal(source: Path, error: Any) -> UserError:
    """Why the file cannot be opened as a clip."""
    if os.path.isfile(source) and not os.path.getsize(source):
        return UserError(f"{source}: the file is empty; replace it or remove it")
    try:
        with opened(source):
            return UserError(f"{source}: is a picture; model_script.py --mode enhance enhances it")
    except UserError:
        reason = error.strerror if isinstance(error, OSError) else "damaged, or no clip"
        return UserError(f"{source}: cannot read the clip ({reason}); replace it or remove it")


class Clip:
    """A clip that is open for reading; closed at the end of a with block. Raises UserError.

    total    number of frames that it says it has, or about that by its length; None without either
    start    seconds at which it begins, of both picture and sound
    seconds  how long it says it is
    reached  how long it is as far as it could be read, in seconds
    lost     number of packets that could not be read so far
    """

    def __init__(self, source: Path) -> None:
        try:
            options = {"format_whitelist": FORMATS}
            self.container: Any = av.open(f"file:{source}", options=options)
        except (av.FFmpegError, OSError) as error:
            raise refusal(source, error) from None
        video: Any = self.container.streams.best("video")
        if video is None or video.disposition & video.disposition.attached_pic:
            self.container.close()
            raise UserError(f"{source}: holds no moving picture")
        self.source, self.video = source, video
        heard = self.container.streams.audio  # a track without a rate is empty
        self.sounds = [sound for sound in heard if not sound.codec_context or sound.rate]
        if any(sound.codec_context is None for sound in self.sounds):
            self.container.close()
            raise UserError(f"{source}: its sound is of an unknown kind; convert it first")
        self.rate = video.average_rate or Fraction(25)
        self.start = max(Fraction(0), Fraction(self.container.start_time or 0, av.time_base))
        self.seconds = Fraction(self.container.duration or 0, av.time_base)
        if "matroska" in self.container.format.name:  # which counts from 0, whenever it begins
            self.seconds = max(Fraction(0), self.seconds - self.start)
        # captions may last longer than what is read here
        lengths = [s.duration * s.time_base for s in (video, *self.sounds) if s.duration]
        self.seconds = max(lengths, default=self.seconds)
        self.reached, self.lost = Fraction(0), 0
        # AVI has no times; those that FFmpeg gives its frames are late by the decoder's delay
        self.untimed = self.container.format.name == "avi"
        own = video.duration * video.time_base if video.duration else self.seconds
        self.total = video.frames or round(own * self.rate) or None

    def __enter__(self) -> Clip:
        return self

    def __exit__(self, *problem: object) -> None:
        self.container.close()

    @property
    def tags(self) -> dict[str, str]:
        """Its title, time of creation and so on."""
        kept = self.container.metadata.items()
        return {key: value for key, value in kept if key.lower() not in KEPT_OUT}

    def shape(self, frame: Any) -> Fraction:
        """Width over height of a pixel of the upright frame."""
        shape = self.video.sample_aspect_ratio or Fraction(1)
        return 1 / shape if orientation(frame)[0] else shape

    def parts(self) -> Iterator[Any]:
        """Its frames and its packets of sound, in the file's order."""
        first: int | None = None
        for packet in self.container.demux(self.video, *self.sounds):
            ends = begins = self.start
            if packet.pts is not None and packet.time_base:
                begins, lasts = (
                    packet.pts * packet.time_base,
                    (packet.duration or 0) * packet.time_base,
                )
                ends = begins + lasts
                self.reached = max(self.reached, ends - self.start)
            if packet.stream is not self.video:
                # of a clip that was trimmed, what is before its start stays unheard; but for two
                # packets, which a decoder needs to begin
                if not packet.is_corrupt and 2 * ends - begins >= self.start:
                    yield packet
                continue
            for frame in self.decoded(packet):
                if self.untimed and frame.pts is not None:
                    first = frame.pts if first is None else first
                    frame.pts -= first
                yield frame

    def decoded(self, packet: Any) -> list[Any]:
        """The frames of a packet, none where it is broken."""
        try:
            return packet.decode()
        except av.error.InvalidDataError:
            self.lost += 1
            return []

    def remarks(self, count: int) -> str:
        """What is to be said of a clip that gave `count` frames."""
        hdr = self.video.codec_context.color_trc in HDR
        return self._missing(count) + ("; HDR is taken as ordinary colours" if hdr else "")

    def _missing(self, count: int) -> str:
        """What is to be said where `count` frames are not all."""
        if 0 < self.reached < 0.9 * self.seconds:
            expected = max(self.total or 0, round(count * self.seconds / self.reached))
            return f" of about {expected}: the rest cannot be read"
        return f"; {self.lost} parts of the file cannot be read" if self.lost else ""
