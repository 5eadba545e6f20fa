"""The clip that is written: its picture encoded, its sound copied or converted."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from clip_input import EXACT, Clip

from support.settings import UserError

# of libx264 and libvpx-vp9: nearly lossless, as the frames may be graded or encoded again
CODECS = {".webm": ("libvpx-vp9", {"crf": "20", "b": "0", "row-mt": "1", "cpu-used": "4"})}
# frames in order: AVI has no room for others, and MP4 loses the end where frames are uneven;
# veryfast takes two fifths of the usual preset's time, for a file of the same size
H264 = ("libx264", {"crf": "16", "bf": "0", "preset": "veryfast"})
BLOCKS = ("mp3", "ac3")
LAYOUTS = {1: "mono", 2: "stereo"}
LATE = Fraction(1, 10)  # seconds of sound that starts after the picture
TRACK_TAGS = ("language", "title")


def takes(form: str, sound: Any) -> bool:
    """Whether files of a format can hold a sound as it is. The list of its codecs names some that
    it refuses when its header is written."""
    try:
        with av.open(io.BytesIO(), "w", format=form) as trial:
            trial.add_stream_from_template(sound)
            trial.start_encoding()
    except (av.FFmpegError, ValueError):
        return False
    return True


class Output:
    """The clip that is written, closed at the end of a with block. Raises UserError.

    Its streams must all be there before the first packet is: sound that comes earlier waits for the
    first frame, which says how large the picture is. The clip begins at 0, whenever `clip` does.
    """

    def __init__(self, path: Path, target: Path, clip: Clip) -> None:
        self.clip, self.target = clip, target
        with self._writing():
            self.container: Any = av.open(f"file:{path}", "w")
        self.container.metadata.update(clip.tags)
        suffix = path.suffix.lower()
        self.codec, self.options = CODECS.get(suffix, H264)
        self.untimed = suffix == ".avi"  # it knows no times, only rates
        self.time_base: Fraction = 1 / clip.rate if self.untimed else clip.video.time_base
        self.step = max(1, round(1 / (clip.rate * self.time_base)))
        self.video: Any = None
        self.last = -1  # time of the frame before
        self.waiting: list[Any] = []
        self.begun: set[int] = set()  # tracks of sound
        self.copied, self.converted = dict[int, Any](), dict[int, Any]()

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *problem: object) -> None:
        if problem[0] is None:
            self._finish()
            return
        with suppress(av.FFmpegError):  # the problem is told, not what follows from it
            self.container.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """An error in here is the output's."""
        try:
            yield
        except (av.FFmpegError, OSError) as error:
            full = isinstance(error, OSError)  # or not there, or not to be written
            hint = "check the folder and the free space" if full else "name the output .mkv"
            problem = f"cannot write the clip ({error.strerror})"
            raise UserError(f"{self.target}: {problem}; {hint}") from None

    def _begin(self, height: int, width: int, shape: Fraction) -> None:
        """Add the streams."""
        rate = self.clip.rate
        self.video = self.container.add_stream(self.codec, rate=rate, options=self.options)
        self.video.height, self.video.width, self.video.pix_fmt = height, width, "yuv420p"
        context = self.video.codec_context
        context.time_base, context.colorspace = self.time_base, Colorspace.ITU709
        context.color_range, context.sample_aspect_ratio = ColorRange.MPEG, shape
        for sound in self.clip.sounds:
            if self._holds(sound):
                track = self.copied[sound.index] = self.container.add_stream_from_template(sound)
            else:
                track = self.converted[sound.index] = self._converter(sound)
            track.metadata.update({k: v for k, v in sound.metadata.items() if k in TRACK_TAGS})

    def _holds(self, sound: Any) -> bool:
        """Whether the output's format takes a sound as it is. From AVI to AVI, FFmpeg would write a
        wrong length for codecs whose block size AVI names."""
        codec = sound.codec_context.codec.canonical_name
        blocks = self.clip.untimed and self.untimed and codec in BLOCKS
        return not blocks and takes(self.container.format.name, sound)

    def _converter(self, sound: Any) -> Any:
        """A new stream of the format's own codec for a sound that it cannot hold as it is."""
        own = sound.codec_context.codec.canonical_name
        kept = own in BLOCKS and own in self.container.supported_codecs
        codec = own if kept else self.container.default_audio_codec
        codec = {"vorbis": "libopus", "mp3": "libmp3lame"}.get(codec, codec)
        known = av.Codec(codec, "w").audio_rates
        rate = sound.rate if not known or sound.rate in known else max(known)
        # raw sound need not say where its speakers stand; Opus knows none at the side
        layout = LAYOUTS.get(sound.channels, sound.layout.name).replace("(side)", "")
        bits = 96_000 * sound.channels
        return self.container.add_stream(codec, rate=rate, layout=layout, bit_rate=bits)

    def frame(self, pixels: np.ndarray, source: Any) -> None:
        """Add the picture that is made of the frame `source`, at its time."""
        if self.video is None:
            self._begin(pixels.shape[0], pixels.shape[1], self.clip.shape(source))
        moment = source.pts
        if moment is not None:
            moment = round((moment * source.time_base - self.clip.start) / self.time_base)
            # two frames at one moment, which damaged clips have, no format can hold
            self.last = max(self.last + 1, moment)
        else:
            self.last = self.last + self.step if self.last >= 0 else 0
        # untagged, players would guess the matrix by the size of the picture
        picture = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        picture = picture.reformat(
            format="yuv420p", dst_colorspace=Colorspace.ITU709, interpolation=EXACT
        )
        picture.colorspace = Colorspace.ITU709
        picture.pts, picture.time_base = self.last, self.time_base
        lasts = (source.duration or 0) * source.time_base if source.time_base else 0
        picture.duration = round(lasts / self.time_base) or self.step
        with self._writing():
            self.container.mux(self.video.encode(picture))
        waiting, self.waiting = self.waiting, []
        for packet in waiting:
            self.sound(packet)

    def sound(self, packet: Any) -> None:
        """Add a packet of sound."""
        if self.video is None:
            self.waiting.append(packet)
            return
        if self.untimed and packet.stream.index not in self.begun and packet.pts is not None:
            self.begun.add(packet.stream.index)
            if (late := packet.pts * packet.time_base - self.clip.start) > LATE:
                problem = f"AVI has no room for sound that begins {float(late):.2f} s late"
                raise UserError(f"{self.target}: {problem}; name the output .mkv or .mp4")
        shift = round(self.clip.start / packet.time_base) if packet.time_base else 0
        if packet.stream.index in self.converted:
            stream = self.converted[packet.stream.index]
            for frame in self.clip.decoded(packet):
                if frame.pts is not None:
                    frame.pts -= round(self.clip.start / frame.time_base)
                with self._writing():
                    self.container.mux(stream.encode(frame))
        elif packet.dts is not None:  # the last one is empty
            packet.stream = self.copied[packet.stream.index]
            packet.dts -= shift
            packet.pts = None if packet.pts is None else packet.pts - shift
            with self._writing():
                self.container.mux(packet)

    def _finish(self) -> None:
        """What the encoders still hold, and the file's end."""
        with self._writing():
            for stream in filter(None, (self.video, *self.converted.values())):
                self.container.mux(stream.encode())
            self.container.close()
