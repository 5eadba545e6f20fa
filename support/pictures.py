"""Pictures: between arrays, tensors and files; exposure; the view of an uncertainty."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.nn  # imported later, inside a process group, its functions would keep it
from PIL import Image
from torch import Tensor

from support.decoding import Picture
from support.files import atomic_path


def write_image(path: str | Path, image: Image.Image | Tensor) -> None:
    """A PIL picture or a (3, H, W) tensor in [0, 1], rounded to the nearest of 256 levels; the
    suffix sets the format."""
    picture = image if isinstance(image, Image.Image) else Image.fromarray(to_uint8(image))
    with atomic_path(path) as temporary:
        lossy: dict[str, Any] = (
            {"quality": 95} if temporary.suffix.lower() in (".jpg", ".jpeg", ".webp") else {}
        )
        picture.save(temporary, **lossy)


def to_uint8(image: Tensor) -> np.ndarray:
    """(H, W, 3) uint8 of a (3, H, W) tensor in [0, 1], rounded to nearest."""
    return (image.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()


def to_uint16(image: Tensor) -> np.ndarray:
    """(H, W, 3) uint16 of a (3, H, W) tensor in [0, 1], rounded to nearest."""
    return (
        (image.detach().float().clamp(0, 1) * 65535)
        .round()
        .permute(1, 2, 0)
        .cpu()
        .numpy()
        .astype(np.uint16)
    )


def to_tensor(pixels: np.ndarray) -> Tensor:
    """(3, H, W) float in [0, 1] of an (H, W, 3) uint8 or uint16 array."""
    return torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1) / float(
        np.iinfo(pixels.dtype).max
    )


def encode_picture(pixels: np.ndarray, suffix: str, like: Picture, quality: int = 95) -> bytes:
    """A file of (H, W, 3) uint8 or uint16 pixels, with the alpha, EXIF and profile of `like` as far
    as the format holds them.

    uint16 needs the suffix .png, .tif or .tiff, and in TIFF it goes without the EXIF. `quality` is
    that of JPEG and WebP.
    """
    if like.alpha is not None and suffix not in (".jpg", ".jpeg", ".bmp"):
        scale = np.iinfo(pixels.dtype).max / np.iinfo(like.alpha.dtype).max
        pixels = np.dstack([pixels, np.rint(like.alpha * scale).astype(pixels.dtype)])
    if pixels.dtype == np.uint16 and suffix == ".png":
        return encode_png16(pixels, like)
    encoded = io.BytesIO()
    if pixels.dtype == np.uint16:
        import tifffile

        deep: dict[str, Any] = dict(
            photometric="rgb", compression="zlib", predictor=True, iccprofile=like.icc or None
        )
        tifffile.imwrite(
            encoded, pixels, extrasamples=["unassalpha"] if pixels.shape[-1] == 4 else None, **deep
        )
    else:
        extras: dict[str, Any] = {"exif": like.exif} if like.exif else {}
        extras |= {"icc_profile": like.icc} if like.icc else {}
        extras |= {"quality": quality} if suffix in (".jpg", ".jpeg", ".webp") else {}
        # a quarter of the default's time for 5 % more bytes
        extras |= {"compress_level": 3} if suffix == ".png" else {}
        Image.fromarray(pixels).save(encoded, Image.registered_extensions()[suffix], **extras)
    return encoded.getvalue()


def encode_png16(pixels: np.ndarray, like: Picture) -> bytes:
    """A 16-bit PNG of (H, W) grey, (H, W, 3) RGB or (H, W, 4) RGBA uint16; no library of the seven
    writes colour so deep."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    height, width = pixels.shape[:2]
    colour_type = {2: 0, 3: {3: 2, 4: 6}.get(pixels.shape[-1])}[pixels.ndim]
    rows = pixels.astype(">u2").reshape(height, -1).view(np.uint8)
    step = 2 * pixels[0, 0].size
    # the filter "sub"
    rows = np.hstack(
        [np.ones((height, 1), np.uint8), rows[:, :step], rows[:, step:] - rows[:, :-step]]
    )
    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0))]
    parts += [chunk(b"iCCP", b"icc\0\0" + zlib.compress(like.icc))] if like.icc else []
    parts += [chunk(b"eXIf", like.exif.removeprefix(b"Exif\0\0"))] if like.exif else []
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [*parts, chunk(b"IDAT", zlib.compress(rows.tobytes(), 4)), chunk(b"IEND", b"")]
    )


def srgb_to_linear(value: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1, [0, 1] to linear light in [0, 1]."""
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def linear_to_srgb(value: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1, linear light in [0, 1] to [0, 1]."""
    return np.where(
        value <= 0.0031308, value * 12.92, 1.055 * np.clip(value, 0.0031308, 1) ** (1 / 2.4) - 0.055
    )


def exposed(stops: float) -> np.ndarray:
    """(65536,) in [0, 1]: what each 16-bit level becomes when `stops` more light, in powers of two,
    had fallen on it."""
    return linear_to_srgb(np.minimum(srgb_to_linear(np.arange(65536) / 65535) * 2.0**stops, 1.0))


def level_table(stops: float, deep: bool) -> np.ndarray:
    """(65536,) the final level, uint16 where `deep`, else uint8, of each 16-bit level, at `stops`
    more light."""
    values = exposed(stops) if stops else np.arange(65536) / 65535
    return np.rint(values * (65535 if deep else 255)).astype(np.uint16 if deep else np.uint8)


def stops_to_mean(pixels: np.ndarray, mean: float) -> float:
    """The exposure in [-6, 6] stops at which uint16 `pixels` have the mean brightness `mean` in [0,
    1], by bisection."""
    share = np.bincount(pixels.ravel(), minlength=65536) / pixels.size
    low, high = -6.0, 6.0
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (middle, high) if share @ exposed(middle) < mean else (low, middle)
    return (low + high) / 2


HEAT = np.array(
    [[0, 0, 0], [90, 10, 110], [230, 80, 40], [255, 220, 90], [255, 255, 255]], np.float64
)


def heat_map(deviation: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 view of a deviation (H, W), black for 0 to white for its 99.5th
    percentile."""
    share = 4095 / max(float(np.percentile(deviation, 99.5)), 1e-9)
    colours = [
        np.interp(np.linspace(0, len(HEAT) - 1, 4096), np.arange(len(HEAT)), HEAT[:, c])
        for c in range(3)
    ]
    # a large picture's floats are gigabytes
    place = np.clip(deviation * np.float32(share) + 0.5, 0, 4095).astype(np.uint16)
    return np.rint(np.stack(colours, axis=-1)).astype(np.uint8)[place]
