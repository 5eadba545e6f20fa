"""Enhance clips: every frame, at its own time, and the sound with it.

    pip install av
    python tools/enhance_video.py --input walk.mp4 --output walk_enhanced.mp4
    python tools/enhance_video.py --input clips --output enhanced [--set overwrite=true]

Brightness and white balance are averaged over half a second: they follow the scene, not the noise.
What stands still is averaged over about twelve frames, which stops its noise from boiling; what
moves is left as it is.
The result is H.264, in .webm VP9; an odd side loses a row or column. Every track of sound is copied
where the output's format can hold it, and else converted.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from repository import system_of
from temporal import Steady
from tqdm import tqdm

import model_script as ms
from support.commands import run, shipped
from support.decoding import VIDEO_SUFFIXES, read_image
from support.files import atomic_path
from support.folders import find_jobs, means_many, work_off
from support.pictures import blend, level_table, stops_to_mean, whole_thumbnail
from support.processes import process_group, progress_style, rank
from support.settings import OneLineParser, UserError, complain, read_all

try:
    import av
    from clip_input import Clip, upright
    from clip_output import Output
except ImportError:
    sys.exit(complain(UserError("clips need the package av; run pip install av")))

UNUSED = ("samples", "uncertainty", "quality")  # keys that do nothing for clips
# what av raises for damaged clips beside its own errors
DAMAGE = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


def smooth_survey(old: ms.Survey | None, now: ms.Survey, rate: float) -> ms.Survey:
    """A running mean of surveys, so that a clip does not flicker; a cut to another scene starts it
    afresh."""
    if old is None or abs(float((now.brightness / old.brightness).log2().mean())) > 0.5:
        return now
    parts = (torch.lerp(before, after, rate) for before, after in zip(old, now, strict=True))
    return ms.Survey(*parts)


SURVEY_EVERY = 2  # frames: half of them say enough of what is averaged over half a second


class Wish(NamedTuple):
    """What is asked of a clip: the mean that its first frame takes, None to leave it; whether each
    frame keeps its own noise."""

    brightness: float | None = None
    per_frame: bool = False


class FrameEnhancer:
    """Enhances the frames of one clip, one after another, (H, W, 3) uint8 to the same.

    The noise of what stands still is averaged over time. The first frame's brightness is fitted to
    the wish, the others follow.
    """

    def __init__(self, loaded: ms.Loaded, wish: Wish, rate: float) -> None:
        self.loaded, self.brightness = loaded, wish.brightness
        self.share = 1 - math.exp(-2 * SURVEY_EVERY / rate)
        self.survey: ms.Survey | None = None
        self.count = 0
        self.model: Any = None
        self.camera = ""
        self.table: np.ndarray | None = None
        self.steady = None if wish.per_frame else Steady()

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        use, runtime = self.loaded.use, self.loaded.runtime
        if self.steady is not None:
            pixels = self.steady(pixels)
        if self.model is None:  # the camera does not change within a clip
            self.model, self.camera = self.loaded.choose(pixels)
        if self.count % SURVEY_EVERY == 0:
            thumbnail = whole_thumbnail(pixels, self.model.config.thumbnail_size)
            with torch.no_grad(), runtime.autocast():
                now = self.model.survey(thumbnail.to(runtime.device))
            self.survey = smooth_survey(self.survey, now, self.share)
        self.count += 1
        best = ms.enhance_pixels(self.model, pixels, use, runtime, self.survey).best
        if self.table is None:
            wanted = self.brightness
            stops = use.exposure + (0.0 if wanted is None else stops_to_mean(best, wanted))
            self.table = level_table(stops, deep=False)
        return blend(pixels, self.table[best], use.strength)


class Told(NamedTuple):
    """What became of a clip: (height, width), number of frames, sums of their mean brightness, the
    camera whose network served it."""

    size: tuple[int, int] = (0, 0)
    frames: int = 0
    before: float = 0.0
    after: float = 0.0
    camera: str = ""


def transfer(clip: Clip, output: Output, loaded: ms.Loaded, wish: Wish) -> Told:
    """Write `clip` to `output`, enhanced. Raises UserError."""
    enhance, told, source = FrameEnhancer(loaded, wish, float(clip.rate)), Told(), clip.source
    style = progress_style()
    style["delay"] = style["mininterval"]  # a short clip of a folder needs no bar of its own
    with tqdm(total=clip.total, desc=source.name, unit="frame", leave=False, **style) as bar:
        for part in clip.parts():
            if not isinstance(part, av.VideoFrame):
                output.sound(part)
                continue
            pixels = upright(part)
            if min(pixels.shape[:2]) < 16:
                size = f"{part.width}x{part.height}"
                raise UserError(f"{source}: {size} is too small; the least side is 16")
            if told.frames and pixels.shape[:2] != told.size:
                raise UserError(f"{source}: its frames change their size; cut it there")
            levels = enhance(pixels)
            output.frame(levels, part)
            sums = (told.before + pixels.mean() / 255, told.after + levels.mean() / 255)
            told = Told(pixels.shape[:2], told.frames + 1, *sums, enhance.camera)
            bar.update()
    if not told.frames:
        raise UserError(f"{source}: holds no frame that can be read; replace it or remove it")
    return told


def enhance_clip(source: Path, target: Path, loaded: ms.Loaded, wish: Wish) -> dict[str, Any]:
    """Enhance one clip; returns its row of enhance.csv. Raises UserError."""
    started = time.perf_counter()
    problem, hint = f"{source}: cannot read the clip", "replace it or remove it"
    try:
        with Clip(source) as clip, atomic_path(target) as temporary:
            with Output(temporary, target, clip) as output:
                told = transfer(clip, output, loaded, wish)
            remarks = clip.remarks(told.frames)
    except av.FFmpegError as error:
        raise UserError(f"{problem} ({error.strerror}); {hint}") from None
    except (MemoryError, RuntimeError) as error:  # PyTorch's allocators raise the latter
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        raise UserError(f"{source}: not enough memory; lower memory_megabytes") from None
    except UserError:
        raise
    except DAMAGE as error:
        raise UserError(f"{problem} ({type(error).__name__}: {error}); {hint}") from None
    frames = f"{told.frames} frame" + "s" * (told.frames != 1)
    return {
        "file": str(source),
        "output": str(target),
        "width": told.size[1],
        "height": told.size[0],
        "seconds": round(time.perf_counter() - started, 3),
        "brightness_before": round(told.before / told.frames, 5),
        "brightness_after": round(told.after / told.frames, 5),
        "deviation": "",
        "camera": told.camera,
        "note": frames + remarks,
    }


def enhance(arguments: argparse.Namespace, given: dict[str, Any]) -> int:
    """Enhance what --input means; returns the exit status."""
    jobs, left = find_jobs(arguments.input, arguments.output, VIDEO_SUFFIXES)
    system = system_of(arguments.checkpoint)
    if not issubclass(system, ms.ConditionalFlow):
        hint = "has no view of the whole to smooth over time; give it single pictures"
        raise UserError(f"{arguments.checkpoint}: {system.name()} {hint}")
    loaded = ms.load_model(arguments.checkpoint, given, system)
    reference = loaded.use.reference
    brightness = float(read_image(reference).mean()) / 255 if reference else None
    wish = Wish(brightness, arguments.per_frame)

    def work(source: Path, target: Path) -> dict[str, Any]:
        return enhance_clip(source, target, loaded, wish)

    if means_many(arguments.input):
        folder, made_with = Path(arguments.output), loaded.made_with(arguments.checkpoint)
        made_with += " per frame" if wish.per_frame else ""
        return work_off(jobs, folder, work, loaded.use.overwrite, made_with, left)
    if rank():  # one clip is one process's work
        return 0
    row = work(*jobs[0])
    size, done = f"{row['width']}x{row['height']}", f"{row['note']}, {row['seconds']:.2f} s"
    print(f"{row['output']}: {size}, {done} on {loaded.runtime}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Enhance clips; returns the exit status."""
    parser = OneLineParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add, key = parser.add_argument, "a key, as in model_script.py; repeatable"
    add("--input", metavar="FILE", required=True, help="a clip, a folder, or a pattern in quotes")
    add("--output", metavar="FILE", required=True, help="the clip (its suffix counts) or a folder")
    weights = "a file, or released (the default) or fast"
    add("--checkpoint", metavar="FILE", type=shipped, default=str(ms.RELEASED), help=weights)
    add("--per_frame", action="store_true", help="do not average the noise of what stands still")
    add("--set", metavar="KEY=VALUE", action="append", default=[], help=key)

    def work() -> int:
        arguments = parser.parse_args(argv)
        given = read_all((ms.Config, ms.Use), None, arguments.set, UNUSED)
        with process_group("enhance", given.get("device", "auto")):
            return enhance(arguments, given)

    return run(work)


if __name__ == "__main__":
    sys.exit(main())
