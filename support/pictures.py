"""Pictures: between arrays, tensors and files; exposure; sheets and views for people."""

from __future__ import annotations

import io
import math
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from support.decoding import Picture
from support.files import atomic_path, write_bytes
from support.settings import UserError


def write_image(path: str | Path, image: Image.Image | Tensor) -> None:
    """A PIL picture or a (3, H, W) tensor in [0, 1], rounded to the nearest of 256 levels; the
    suffix sets the format."""
    picture = image if isinstance(image, Image.Image) else Image.fromarray(to_uint8(image))
    with atomic_path(path) as temporary:
        picture.save(temporary, quality=95)  # which PNG, BMP and TIFF leave alone


def to_uint8(image: Tensor) -> np.ndarray:
    """(H, W, 3) uint8 of a (3, H, W) tensor in [0, 1], rounded to nearest."""
    return (image.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()


def to_uint16(image: Tensor) -> np.ndarray:
    """(H, W, 3) uint16 of a (3, H, W) tensor in [0, 1], rounded to nearest."""
    levels = (image.detach().float().clamp(0, 1) * 65535).round().permute(1, 2, 0)
    return levels.cpu().numpy().astype(np.uint16)


def to_tensor(pixels: np.ndarray) -> Tensor:
    """(3, H, W) float in [0, 1] of an (H, W, 3) uint8 or uint16 array."""
    return torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1) / float(
        np.iinfo(pixels.dtype).max
    )


def resize(image: Tensor, size: Sequence[int], quantise: bool = False) -> Tensor:
    """(B, 3, h, w) of (B, 3, H, W): antialiased bilinear; `quantise` rounds to 8-bit levels, as a
    resized file would be."""
    if tuple(image.shape[-2:]) != tuple(size):
        image = F.interpolate(
            image, size=tuple(size), mode="bilinear", antialias=True, align_corners=False
        )
    return (image * 255).round() / 255 if quantise else image


def resize_pixels(pixels: np.ndarray, size: Sequence[int] | None) -> np.ndarray:
    """`resize` of (H, W, 3) uint8 pixels to `size` (height, width), rounded; as they are for
    None."""
    if size is None or pixels.shape[:2] == tuple(size):
        return pixels
    return to_uint8(resize(to_tensor(pixels)[None], size)[0])


def whole_thumbnail(pixels: np.ndarray, size: int) -> Tensor:
    """`resize` of an (H, W, 3) picture to (1, 3, size, size), in bands: no float copy of a large
    picture is made."""
    bands = [to_tensor(pixels[top : top + 256])[None] for top in range(0, len(pixels), 256)]
    narrow = torch.cat([resize(band, (band.shape[-2], size)) for band in bands], dim=-2)
    return resize(narrow, (size, size))


def reduce_levels(pixels: np.ndarray, side: int) -> np.ndarray:
    """uint16 or uint8 (H, W, 3) made smaller by a whole factor, to at most `side`."""
    factor = math.ceil(max(pixels.shape[:2]) / side)
    if factor == 1:
        return pixels
    channels = [
        np.asarray(Image.fromarray(pixels[..., c].astype(np.float32)).reduce(factor))
        for c in range(3)
    ]
    return np.rint(np.stack(channels, -1)).astype(pixels.dtype)


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


def encode_or_explain(pixels: np.ndarray, path: Path, like: Picture, quality: int) -> bytes:
    """`encode_picture` by the suffix of `path`; EXIF that the format cannot take is left out.

    Raises UserError where it cannot hold the picture at all.
    """
    for source in (like, like._replace(exif=b"")):
        try:
            return encode_picture(pixels, path.suffix.lower(), source, quality)
        except (OSError, ValueError, TypeError, RuntimeError, struct.error) as error:
            problem = str(error) or type(error).__name__
    hint = "choose another suffix"
    raise UserError(f"{path}: the format cannot hold this picture ({problem}); {hint}")


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


def blend(before: np.ndarray, after: np.ndarray, strength: float) -> np.ndarray:
    """(1 - strength) of `before` and `strength` of `after`, mixed as light is; (H, W, 3) uint8 or
    uint16 each, the result as `after`."""
    if strength == 1:
        return after
    tables = [
        srgb_to_linear(np.linspace(0, 1, np.iinfo(image.dtype).max + 1)).astype(np.float32)
        for image in (before, after)
    ]
    result, top = np.empty_like(after), np.iinfo(after.dtype).max
    for row in range(0, len(after), 64):  # in bands: no float copy of a large picture
        band = slice(row, row + 64)
        dark, lit = (
            table[image[band]] for table, image in zip(tables, (before, after), strict=True)
        )
        result[band] = np.rint(linear_to_srgb(dark + strength * (lit - dark)) * top)
    return result


PATCH, REACH, CALMEST = 5, 6, 3 / 255  # of non-local means: sides in pixels, and the full strength


def calmed(levels: np.ndarray, strength: float) -> np.ndarray:
    """(H, W, 3) uint16 with less noise where nothing else is, by non-local means (Buades et al.,
    CVPR 2005): a pixel becomes the mean of those around it whose surroundings look the same.

    0 gives `levels` as they are, 1 takes for noise what differs by about 3 levels of 255.
    """
    if strength == 0:
        return levels
    from skimage.restoration import denoise_nl_means  # seldom wanted, and slow to import

    result, halo = np.empty_like(levels), REACH + PATCH
    for top in range(0, len(levels), 256):  # in bands: no float copy of a large picture
        first, last = max(0, top - halo), min(len(levels), top + 256 + halo)
        band = levels[first:last].astype(np.float32) / 65535
        options = dict(patch_size=PATCH, patch_distance=REACH, fast_mode=True, channel_axis=-1)
        calm = denoise_nl_means(band, h=CALMEST * strength, **options)
        rows = np.rint(np.clip(calm, 0, 1) * 65535)[top - first : top - first + 256]
        result[top : top + 256] = rows.astype(np.uint16)
    return result


def stops_to_mean(pixels: np.ndarray, mean: float) -> float:
    """The exposure in [-6, 6] stops at which uint16 `pixels` have the mean brightness `mean` in [0,
    1], by bisection."""
    share = np.bincount(pixels.ravel(), minlength=65536) / pixels.size
    low, high = -6.0, 6.0
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (middle, high) if share @ exposed(middle) < mean else (low, middle)
    return (low + high) / 2


def heat_map(deviation: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 view of a deviation (H, W), black for 0 to white for its 99.5th
    percentile."""
    share = np.float32(255 / max(float(np.percentile(deviation, 99.5)), 1e-9))
    grey = Image.fromarray(np.clip(deviation * share + 0.5, 0, 255).astype(np.uint8))
    return np.asarray(ImageOps.colorize(grey, "black", "white", mid=(230, 80, 40)))


def write_deviation(target: Path, deviation: np.ndarray) -> None:
    """Beside `target`: NAME_uncertainty.png, 16 bits, of (H, W) in [0, 1], and a view of it."""
    levels = np.rint(np.clip(deviation, 0, 1) * 65535).astype(np.uint16)
    path = target.with_name(f"{target.stem}_uncertainty.png")
    write_bytes(path, encode_png16(levels, Picture(levels)))
    view = Image.fromarray(heat_map(deviation))
    write_image(target.with_name(f"{target.stem}_uncertainty_view.png"), view)


def contact_sheet(rows: Sequence[Image.Image], width: int = 1200) -> Image.Image:
    """Captioned strips below each other, all `width` wide."""
    from torchvision.utils import make_grid  # two seconds to import; only written sheets need it

    strips = [ImageOps.scale(strip, width / strip.width) for strip in rows]
    tallest = max(strip.height for strip in strips)
    tensors = [to_tensor(np.asarray(strip)) for strip in strips]
    padded = [F.pad(t, (0, 0, 0, tallest - t.shape[1]), value=1.0) for t in tensors]
    return Image.fromarray(to_uint8(make_grid(padded, nrow=1, padding=6, pad_value=1.0)))
