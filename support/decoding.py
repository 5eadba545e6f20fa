"""Decoding: pictures in, from files that may be damaged or hostile."""

from __future__ import annotations

import ctypes
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import (
    AbstractContextManager,
    contextmanager,
    nullcontext,
    suppress,
)
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from support.settings import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".m4v", ".webm", ".avi")


Source = str | Path | io.BytesIO  # a file, or one in memory, which has no name


# what is read, by content and not by name; every further decoder is one more that a hostile file
# may try
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")


# pixels above which a file must hold a byte for every so many decoded ones
LARGE, DENSEST = 2**23, 600


MOST_SCANS = 200


# one line is said of a broken file, and that is ours
logging.getLogger("PIL").addHandler(logging.NullHandler())


# libtiff writes its complaints to standard error past Python
with suppress(OSError, AttributeError):
    ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)


def bytes_of(source: Source) -> AbstractContextManager[Any]:
    """The file, open; by its name alone Pillow would map some TIFFs into memory, and scramble those
    that lie on their side."""
    return nullcontext(source) if isinstance(source, io.BytesIO) else open(source, "rb")


@contextmanager
def opened(source: Source) -> Iterator[Image.Image]:
    """The picture, open for decoding inside the block.

    Raises UserError naming the file when it is missing, empty, truncated, no picture of FORMATS, or
    a decompression bomb.
    """
    path = "the picture" if isinstance(source, io.BytesIO) else source
    try:
        size = (
            len(source.getbuffer()) if isinstance(source, io.BytesIO) else os.path.getsize(source)
        )
        if size == 0:
            raise UserError(f"{path}: the file is empty; replace it or remove it")
        with warnings.catch_warnings():
            # of what is odd in the file: the picture or one line is the answer
            warnings.simplefilter("ignore")
            with bytes_of(source) as stream, Image.open(stream, formats=FORMATS) as picture:
                refuse_bomb(picture, source, size, path)
                bits = np.atleast_1d(tiff_tags(picture).get(258, 8))
                if picture.mode == "F" or 32 in bits:
                    raise UserError(
                        f"{path}: 32-bit and floating-point pictures have no agreed white; convert"
                        " it to 16 bits"
                    )
                if 16 in bits and tiff_tags(picture).get(284) == 2:
                    raise UserError(
                        f"{path}: its 16-bit channels lie apart (planar); save it with them"
                        " interleaved"
                    )
                yield picture
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(f"{path}: {error}") from None
    except UnidentifiedImageError:
        kinds = "PNG, JPEG, BMP, TIFF or WebP"
        raise UserError(
            f"{path}: not a readable picture ({kinds}); convert it, replace it or remove it"
        ) from None
    except OSError as error:  # covers FileNotFoundError and truncated data
        reason = error.strerror or ("truncated" if "truncated" in str(error) else "damaged")
        raise UserError(
            f"{path}: cannot read the picture ({reason}); replace it or remove it"
        ) from None
    # decoders raise every kind for hostile files; each is the same to the user
    except Exception as error:
        raise UserError(
            f"{path}: broken picture ({type(error).__name__}); replace it or remove it"
        ) from None


def tiff_tags(picture: Image.Image) -> Any:
    """A TIFF file's table of numbered tags; empty for any other format."""
    return picture.tag_v2 if isinstance(picture, TiffImagePlugin.TiffImageFile) else {}


def refuse_bomb(picture: Image.Image, source: Source, size: int, path: str | Path) -> None:
    """Raises UserError where `size` bytes claim more pixels, or more passes over them, than a
    photograph's ever do."""
    area = picture.width * picture.height
    tags = tiff_tags(picture)
    area = max(area, tags.get(322, 0) * tags.get(323, 0))  # a tile may be larger than its picture
    deep = any(";16" in rawmode for _, rawmode in raw_tiles(picture))
    if area > LARGE and area * len(picture.getbands()) * (1 + deep) > DENSEST * size:
        raise UserError(
            f"{path}: declares {area / 1e6:.0f} megapixels in {size} bytes; no photograph does, so"
            " replace it"
        )
    if picture.info.get("progressive"):
        data = source.getvalue() if isinstance(source, io.BytesIO) else Path(source).read_bytes()
        if data.count(b"\xff\xda") > MOST_SCANS:
            raise UserError(
                f"{path}: goes over its pixels more than {MOST_SCANS} times; save it anew or"
                " remove it"
            )


def raw_tiles(picture: Image.Image) -> list[tuple[Any, str]]:
    """Each part of a picture that is still to be decoded, with the layout of its bytes, such as
    RGB;16B."""
    tiles = getattr(picture, "tile", ())
    return [
        (tile, str(tile[3] if isinstance(tile[3], str) else (tile[3] or ("",))[0]))
        for tile in tiles
    ]


def grey_levels(picture: Image.Image) -> np.ndarray:
    """(H, W) uint16 of a grey picture of 16 bits; Pillow's own conversion would clip it to
    white."""
    levels = np.clip(np.asarray(picture).astype(np.int32), 0, 65535).astype(np.uint16)
    return 65535 - levels if tiff_tags(picture).get(262) == 0 else levels


def read_image(path: str | Path) -> np.ndarray:
    """The picture as (H, W, 3) uint8 RGB, EXIF orientation applied.

    Grey is repeated, palettes are looked up, alpha is dropped. 16-bit grey is rounded to the
    nearest of 256 levels; 16-bit colour loses its lower byte, as Pillow reads it. Raises UserError
    naming the file, see `opened`.
    """
    with opened(path) as picture:
        picture.load()
        orientation = exif_of(picture)[0]
        if picture.mode.startswith("I"):
            picture = Image.fromarray(np.rint(grey_levels(picture) / 257).astype(np.uint8))
        return np.ascontiguousarray(upright(np.array(picture.convert("RGB")), orientation))


class Picture(NamedTuple):
    """A picture to enhance, with what its file holds beside the colours and the enhanced one keeps.

    pixels: (H, W, 3) uint8 or uint16 RGB, upright; alpha: (H, W) of the same type, or None; exif,
    icc: raw bytes, empty where there are none; note: what was converted, for the user to know.
    """

    pixels: np.ndarray
    alpha: np.ndarray | None = None
    exif: bytes = b""
    icc: bytes = b""
    note: str = ""


ORIENTATION = 0x0112  # the EXIF tag
# what a TIFF file lists as EXIF but says of its own pixels: size, depth, compression, strips,
# tiles, channels, profile
LAYOUT_TAGS = {*range(254, 267), 273, ORIENTATION, *range(277, 280), 284, 317, *range(320, 326)}
LAYOUT_TAGS |= {338, 339, 347, 700, 34675}


# Pillow keeps the upper byte of 16-bit colour; told that the bytes lie the other way round, it
# keeps the lower
OTHER_BYTE = {f"{m};16{a}": f"{m};16{b}" for m in ("RGB", "RGBA", "RGBX") for a, b in ("BL", "LB")}
OTHER_BYTE |= {
    f"{m};16N": f"{m};16{'B' if sys.byteorder == 'little' else 'L'}"
    for m in ("RGB", "RGBA", "RGBX")
}
OTHER_BYTE |= {"LA;16B": "RGBA"}  # all four bytes


def upright(pixels: np.ndarray, orientation: Any) -> np.ndarray:
    """(H, W, C) pixels as an EXIF orientation means them, by Pillow; 16 bits as twice 8."""
    if orientation not in range(2, 9):
        return pixels
    if pixels.dtype == np.uint16:
        lower, upper = (
            upright(part.astype(np.uint8), orientation) for part in (pixels, pixels >> 8)
        )
        return lower | upper.astype(np.uint16) << 8
    image = Image.fromarray(pixels.astype(np.uint8))
    image.getexif()[ORIENTATION] = orientation
    return np.asarray(ImageOps.exif_transpose(image))


def exif_of(picture: Image.Image) -> tuple[Any, bytes]:
    """(orientation, EXIF less what was true of the old file alone) of a decoded picture.

    A damaged table counts as none, and leaves the pixels as good as they are.
    """
    orientation, kept = 1, b""
    with suppress(Exception):
        exif = picture.getexif()
        orientation = exif.get(ORIENTATION, 1)
        for tag in LAYOUT_TAGS & set(exif):
            del exif[tag]
        exif.bigtiff = False  # no other format has EXIF with 64-bit places
        kept = exif.tobytes() if len(exif) else b""
    return orientation, kept


def read_deep(source: Source, picture: Image.Image) -> np.ndarray | None:
    """(H, W, C) uint16 of a 16-bit picture, C = 1 to 4; None for any other. To be called before
    `picture` is decoded."""
    if picture.mode.startswith("I"):
        return grey_levels(picture)[..., None]
    tiles = raw_tiles(picture)
    if not tiles or any(rawmode not in OTHER_BYTE for _, rawmode in tiles):
        return None
    pixels = np.asarray(picture).astype(np.uint16)
    with bytes_of(source) as stream, Image.open(stream, formats=FORMATS) as again:
        others = [OTHER_BYTE[rawmode] for _, rawmode in tiles]
        again.tile = [
            tile._replace(args=other if isinstance(tile.args, str) else (other, *tile.args[1:]))
            for (tile, _), other in zip(tiles, others, strict=True)
        ]
        lower = np.asarray(again)
    if others[0] == "RGBA":
        return lower[..., ::2].astype(np.uint16) << 8 | lower[..., 1::2]
    pixels <<= 8
    pixels |= lower
    return pixels


def read_picture(source: Source) -> Picture:
    """The picture at full depth, upright, with alpha, EXIF (its orientation reset) and colour
    profile.

    Grey is repeated over the channels, palettes are looked up, CMYK is converted. Raises UserError
    naming the file for what `opened` refuses, for animations and for sides below 16 pixels.
    """
    path = "the picture" if isinstance(source, io.BytesIO) else source
    with opened(source) as picture:
        # a phone's JPEG with a preview is none
        if getattr(picture, "is_animated", False) and picture.format != "MPO":
            raise UserError(f"{path}: holds several frames; save them as single pictures")
        if min(picture.size) < 16:
            raise UserError(
                f"{path}: {picture.width}x{picture.height} is too small; the least side is 16"
            )
        pixels = read_deep(source, picture)
        grey = picture.mode in ("1", "L", "LA", "La") or picture.mode.startswith("I")
        foreign = picture.mode in ("CMYK", "YCCK", "LAB", "HSV")
        note = f"converted from {picture.mode}" if foreign else ""
        note = "grey: its colours are a guess" if grey else note
        if pixels is None:
            picture.load()  # a PNG may say that it is transparent after its pixels
            mode = "RGBA" if picture.has_transparency_data else "RGB"
            pixels = np.array(picture if picture.mode == mode else picture.convert(mode))
        elif pixels.shape[-1] < 3:
            pixels = np.concatenate([pixels[..., :1]] * 3 + [pixels[..., 1:]], axis=-1)
        orientation, exif = exif_of(picture)
        pixels = upright(pixels, orientation)
        return Picture(
            np.ascontiguousarray(pixels[..., :3]),
            np.ascontiguousarray(pixels[..., 3]) if pixels.shape[-1] == 4 else None,
            exif,
            # a profile of other channels would lie
            b"" if grey or foreign else picture.info.get("icc_profile") or b"",
            note,
        )
