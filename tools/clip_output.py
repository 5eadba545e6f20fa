"""The clip that is written: its picture encoded, its sound copied or converted."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace

# of libx264 and libvpx-vp9: nearly lossless, as the frames may be graded or encoded again
CODECS = {".webm": ("libvpx-vp9", {"crf": "20", "b": "0", "row-mt": "1", "cpu-used": "4"})}
CODECS[".avi"] = ("libx264", {"crf": "16", "bf": "0"})  # it has no room for frames out of order
H264 = ("libx264", {"crf": "16"})


class Output:
    """The clip that is written. Its streams must all be there before the first packet is: sound
    that comes earlier waits for the first frame, which says how large the picture is."""

    def __init__(self, path: Path, rate: Fraction, time_base: Fraction, sounds: Sequence[Any]):
        self.container: Any = av.open(str(path), "w")
        self.codec, self.options = CODECS.get(path.suffix.lower(), H264)
        self.rate, self.time_base, self.sounds = rate, time_base, sounds
        self.video: Any = None
        self.last = -1  # time of the frame before
        self.waiting: list[Any] = []
        self.copied, self.converted = dict[int, Any](), dict[int, Any]()

    def _begin(self, height: int, width: int) -> None:
        """Add the streams."""
        self.video = self.container.add_stream(self.codec, rate=self.rate, options=self.options)
        self.video.height, self.video.width, self.video.pix_fmt = height, width, "yuv420p"
        context = self.video.codec_context
        context.time_base, context.colorspace = self.time_base, Colorspace.ITU709
        context.color_range = ColorRange.MPEG
        for sound in self.sounds:
            if sound.codec_context.codec.canonical_name in self.container.supported_codecs:
                self.copied[sound.index] = self.container.add_stream_from_template(sound)
            else:
                self.converted[sound.index] = self._converter(sound)

    def _converter(self, sound: Any) -> Any:
        """A new stream of the format's own codec for a sound that it cannot hold as it is."""
        codec = {"vorbis": "libopus"}.get(name := self.container.default_audio_codec, name)
        known = av.Codec(codec, "w").audio_rates
        rate = sound.rate if not known or sound.rate in known else max(known)
        return self.container.add_stream(codec, rate=rate, layout=sound.layout.name)

    def frame(self, pixels: np.ndarray, moment: int | None) -> None:
        """Add a picture at `moment`, in units of `time_base`, None for the next one's turn."""
        step = max(1, round(1 / self.rate / self.time_base))
        if self.video is None:
            self._begin(*pixels.shape[:2])
            self.last = (moment or 0) - step
        # untagged, players would guess the matrix by the size of the picture
        picture = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        picture = picture.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)
        picture.colorspace = Colorspace.ITU709
        # two frames at one moment, which damaged clips have, no format can hold
        self.last = max(self.last + 1, moment) if moment is not None else self.last + step
        picture.pts, picture.time_base = self.last, self.time_base
        self.container.mux(self.video.encode(picture))
        waiting, self.waiting = self.waiting, []
        for packet in waiting:
            self.sound(packet)

    def sound(self, packet: Any) -> None:
        """Add a packet of sound."""
        if self.video is None:
            self.waiting.append(packet)
        elif packet.stream.index in self.converted:
            stream = self.converted[packet.stream.index]
            for frame in packet.decode():
                self.container.mux(stream.encode(frame))
        elif packet.dts is not None:  # the last one is empty
            packet.stream = self.copied[packet.stream.index]
            self.container.mux(packet)

    def finish(self) -> None:
        """What the encoders still hold, and the file's end."""
        for stream in (self.video, *self.converted.values()):
            self.container.mux(stream.encode())
        self.container.close()
