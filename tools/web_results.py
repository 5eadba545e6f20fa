"""What the page hands out: views, whole pictures and their names, the zip, and the samples."""

from __future__ import annotations

import dataclasses
import functools
import io
import unicodedata
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from studio import Job

import model_script as ms
from support.decoding import Picture
from support.pictures import (
    blend,
    calmed,
    encode_or_explain,
    encode_picture,
    heat_map,
    level_table,
    linear_to_srgb,
    reduce_levels,
    srgb_to_linear,
)
from support.settings import build

SAMPLES = {"astronaut": "Astronaut", "rocket": "Rocket", "coffee": "Coffee"}
SUFFIXES = {
    **{"PNG": (".png",), "JPEG": (".jpg", ".jpeg"), "MPO": (".jpg", ".jpeg"), "BMP": (".bmp",)},
    **{"TIFF": (".tif", ".tiff"), "WEBP": (".webp",)},
}
KINDS = {kind: "jpeg" if kind == "MPO" else kind.lower() for kind in SUFFIXES}  # image/...
LARGEST_VIEW = 2048  # pixels a side
LONGEST_NAME = 80


class Slider(NamedTuple):
    """A key of `Use` that acts on a result: how the page shows it."""

    key: str
    title: str
    low: float
    high: float
    step: float
    unit: str  # "%" shows a share in hundredths


# a further line is a further slider; what it does to the pixels is `finished`'s work, or `calm`'s
SLIDERS = (
    Slider("exposure", "Exposure", -2, 2, 0.05, "stops"),
    Slider("strength", "Strength", 0, 1, 0.01, "%"),
    Slider("denoise", "Denoise", 0, 1, 0.05, "%"),
)


def ranges() -> dict[str, tuple[float, float]]:
    """The least and the most of each slider's key, as the command line has them."""
    keys = {key.name: key.metadata for key in dataclasses.fields(ms.Use)}
    return {one.key: (keys[one.key]["low"], keys[one.key]["high"]) for one in SLIDERS}


def sliders(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The table for the page; a slider starts at the value that the command line gave, and reaches
    as far."""
    use = build(ms.Use, dict(settings), "settings")
    found = []
    for one in SLIDERS:
        start = getattr(use, one.key)
        reach = {"low": min(one.low, start), "high": max(one.high, start)}
        found.append(one._asdict() | reach | {"start": start})
    return found


def finished(
    before: np.ndarray, levels: np.ndarray, values: Mapping[str, float], deep: bool
) -> np.ndarray:
    """(H, W, 3) uint8, uint16 where `deep`, of an answer's uint16 levels, as `--mode enhance`
    writes it."""
    return blend(before, level_table(values["exposure"], deep)[levels], values["strength"])


def answers(job: Job) -> dict[str, np.ndarray]:
    """The job's pictures, (H, W, 3) uint16 each, by the names that addresses have for them."""
    assert job.enhanced is not None
    samples = {f"sample{n}": levels for n, levels in enumerate(job.enhanced.samples, 1)}
    return {"enhanced": job.enhanced.best, **samples}


def whole(job: Job, what: str, values: Mapping[str, float]) -> bytes:
    """The file of one of `answers`, with the upload's format, depth, alpha and metadata."""
    assert job.picture is not None
    deep = job.picture.pixels.dtype == np.uint16
    levels = calmed(answers(job)[what], values["denoise"])
    pixels = finished(job.picture.pixels, levels, values, deep)
    return encode_or_explain(pixels, Path(file_name(job, what)), job.picture, job.quality)


def small(job: Job, what: str, side: int) -> np.ndarray:
    """`reduce_levels` of one of `answers`, or of the input for "low"; kept, as sliders ask for the
    same again and again."""
    assert job.picture is not None
    pixels = job.picture.pixels if what == "low" else answers(job)[what]
    if max(pixels.shape[:2]) <= side:
        return pixels
    if side < LARGEST_VIEW:
        return reduce_levels(small(job, what, LARGEST_VIEW), side)
    if what not in job.reduced:
        job.reduced[what] = reduce_levels(pixels, side)
    return job.reduced[what]


def calm(job: Job, what: str, side: int, denoise: float) -> np.ndarray:
    """`small`, with less noise; the last one of each size is kept, as the other sliders ask for it
    again. A view that is made smaller has less noise from the start, so it changes little."""
    levels = small(job, what, side)
    if denoise == 0:
        return levels
    key = f"{what} {len(levels)}"
    known = job.calm.get(key)
    if known is None or known[0] != denoise:
        known = job.calm[key] = (denoise, calmed(levels, denoise))
    return known[1]


def view(job: Job, what: str, values: Mapping[str, float], side: int) -> np.ndarray:
    """(H, W, 3) uint8 to look at, at most `side` pixels a side."""
    before = small(job, "low", side)
    if what != "low":
        return finished(before, calm(job, what, side, values["denoise"]), values, False)
    return before if before.dtype == np.uint8 else (before >> 8).astype(np.uint8)


def heat(job: Job) -> np.ndarray:
    """(H, W, 3) uint8: where the model is unsure."""
    assert job.enhanced is not None and job.enhanced.deviation is not None
    return heat_map(job.enhanced.deviation)


def encode_view(pixels: np.ndarray, lossless: bool = False, side: int = 0) -> bytes:
    """uint8 pixels for the page: a JPEG or, `lossless`, a PNG; at most `side` a side where that is
    given."""
    encoded, image = io.BytesIO(), Image.fromarray(pixels)
    if side:
        image.thumbnail((side, side))
    if lossless:
        image.save(encoded, "PNG", compress_level=2)
    else:
        image.save(encoded, "JPEG", quality=92, subsampling=0)
    return encoded.getvalue()


def clean_name(given: str) -> str:
    """A file's name as its owner gave it, fit for a header and for any disk: no folders, no signs
    that control, hide or turn the text round, none that a system forbids; empty for none."""
    last = given.replace("\\", "/").rsplit("/", 1)[-1]
    kept = [c for c in last if unicodedata.category(c)[0] != "C" and c not in '<>:"|?*\u2028\u2029']
    name = "".join(kept).strip(" .")
    stem, dot, suffix = name.rpartition(".")
    return f"{stem[:LONGEST_NAME]}.{suffix[:5]}" if dot else name[:LONGEST_NAME]


def file_name(job: Job, what: str) -> str:
    """NAME_enhanced.SUFFIX for the upload NAME.SUFFIX; the suffix is the content's, which is the
    output's, too."""
    stem, _, ending = job.name.rpartition(".")
    fitting = SUFFIXES.get(job.format, (".png",))
    suffix = f".{ending}" if f".{ending.lower()}" in fitting else fitting[0]
    return f"{stem or ending}_{what}{'.png' if what == 'uncertainty' else suffix}"


def packed(files: Iterable[tuple[str, Callable[[], bytes]]]) -> bytes:
    """A zip of (name, what makes its content); equal names are numbered."""
    stream, taken = io.BytesIO(), set[str]()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:  # pictures do not shrink
        for name, make in files:
            stem, _, suffix = name.rpartition(".")
            tries = (f"{stem}_{n}.{suffix}" for n in range(2, 1000))
            free = name if name not in taken else next(one for one in tries if one not in taken)
            taken.add(free)
            archive.writestr(free, make())
    return stream.getvalue()


@functools.cache
def sample_picture(name: str) -> bytes:
    """A photograph that ships with scikit-image, as an ordinary camera takes it in a thirtieth of
    the exposure: a PNG."""
    from support.simulated import demo_photograph

    rng, electrons = np.random.default_rng(0), 12_000  # at white, in the full exposure
    high = np.asarray(demo_photograph(name))[:512, :640]
    light = srgb_to_linear(high / 255.0) / 30
    noisy = (rng.poisson(light * electrons) + rng.normal(0, 2, light.shape)) / electrons
    low = np.rint(linear_to_srgb(np.clip(noisy, 0, 1)) * 255).astype(np.uint8)
    return encode_picture(low, ".png", Picture(high))
