"""A corpus of broken and odd picture files, made on the fly, and what must come of each."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import skimage.color
import tifffile
from cli_tools import target_picture
from PIL import Image

HUGE = 13_000  # a side whose square is just below what Pillow itself refuses
EXIF_TURNS = {
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: np.swapaxes(pixels, 0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(np.swapaxes(pixels, 0, 1), 2),
    8: np.rot90,
}


class Odd(NamedTuple):
    """A file and what must come of it.

    pixels      what it shows, upright, (H, W, 3) or with alpha (H, W, 4), uint8 or uint16; None
                where it must be refused
    tolerance   largest mean difference, in levels of 255
    may_refuse  a refusal is right as well
    words       what the refusal says
    """

    data: bytes
    pixels: np.ndarray | None = None
    tolerance: float = 0.0
    may_refuse: bool = False
    words: str = ""


def encoded(picture: np.ndarray | Image.Image, kind: str, **options: Any) -> bytes:
    """A file that Pillow writes."""
    stream = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(
        stream, kind, **options
    )
    return stream.getvalue()


def tiff(pixels: np.ndarray, **options: Any) -> bytes:
    """A file that tifffile writes."""
    stream = io.BytesIO()
    tifffile.imwrite(stream, pixels, **options)
    return stream.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    pixels: np.ndarray,
    interlaced: bool = False,
    size: tuple[int, int] | None = None,
    idat: bytes = b"",
    extra: bytes = b"",
) -> bytes:
    """A PNG of (H, W, C) uint8 or uint16 written by hand.

    It can be interlaced, declare another size (width, height), and so on.
    """
    height, width, channels = pixels.shape
    wide = pixels.astype(f">u{pixels.dtype.itemsize}")
    starts = [
        (0, 0, 8, 8),
        (0, 4, 8, 8),
        (4, 0, 8, 4),
        (0, 2, 4, 4),
        (2, 0, 4, 2),
        (0, 1, 2, 2),
        (1, 0, 2, 1),
    ]
    passes = [wide[y::dy, x::dx] for y, x, dy, dx in (starts if interlaced else [(0, 0, 1, 1)])]
    rows = b"".join(b"\0" + row.tobytes() for part in passes if part.size for row in part)
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    declared = size or (width, height)
    header = struct.pack(
        ">IIBBBBB", *declared, 8 * pixels.dtype.itemsize, colour_type, 0, 0, int(interlaced)
    )
    body = [
        chunk(b"IHDR", header),
        extra,
        chunk(b"IDAT", idat or zlib.compress(rows)),
        chunk(b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def zeros_deflated(size: int) -> bytes:
    """A zlib stream of about `size` zero bytes, a thousand times shorter.

    It is made without ever holding them.
    """
    packer = zlib.compressobj(9)
    first = packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)
    again = packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)
    count = size // 2**20 + 1
    checksum = 1 | (count * 2**20 % 65521) << 16
    return first + again * (count - 1) + b"\x03\x00" + struct.pack(">I", checksum)


def raw_tiff(
    tags: dict[int, Sequence[int]], data: bytes = b"", next_page: int = 0, bombs: int = 0
) -> bytes:
    """A TIFF of 32-bit tags written by hand.

    Its one strip (or tile, where tag 322 is there) is `data`. `bombs` further tags each claim the
    whole of `data` as theirs.
    """
    tags = dict(tags) | {
        (324 if 322 in tags else 273): [0],
        (325 if 322 in tags else 279): [len(data)],
    }
    place = 8 + 2 + 12 * (len(tags) + bombs) + 4
    table, after = b"", b""
    for tag, values in sorted(tags.items()):
        stored = struct.pack(f"<{len(values)}I", *values)
        if tag in (273, 324):
            stored = b"HERE"
        elif len(values) > 1:
            stored, after = struct.pack("<I", place + len(after)), after + stored
        table += struct.pack("<HHI", tag, 4, len(values)) + stored
    table += b"".join(
        struct.pack("<HHI", 40_000 + number, 1, len(data)) + b"HERE" for number in range(bombs)
    )
    table = table.replace(b"HERE", struct.pack("<I", place + len(after)))
    return (
        b"II*\0"
        + struct.pack("<IH", 8, len(tags) + bombs)
        + table
        + struct.pack("<I", next_page)
        + after
        + data
    )


def tiff_tags(
    width: int, height: int, bits: int = 8, compression: int = 1, **more: Sequence[int]
) -> dict[int, Sequence[int]]:
    """The tags of an RGB picture in one strip; `more` as t322=[...]."""
    tags = {
        256: [width],
        257: [height],
        258: [bits] * 3,
        259: [compression],
        262: [2],
        277: [3],
        278: [height],
    }
    return tags | {int(name[1:]): values for name, values in more.items()}


def many_pages(scene: np.ndarray, count: int) -> bytes:
    """A TIFF whose pages are a long chain of tables of one tag."""
    start = len(raw_tiff(tiff_tags(48, 40), scene.tobytes()))
    pages = [
        struct.pack("<HHHIII", 1, 256, 4, 1, 48, start + 18 * number) for number in range(1, count)
    ]
    return (
        raw_tiff(tiff_tags(48, 40), scene.tobytes(), next_page=start)
        + b"".join(pages)[:-4]
        + bytes(4)
    )


def exif_bomb(tags: int, size: int) -> bytes:
    """EXIF whose tags each claim the same `size` bytes."""
    entries = [struct.pack(">HHII", 40_000 + number, 1, size, 8) for number in range(tags)]
    return b"MM\0*" + struct.pack(">IH", 8, tags) + b"".join(entries) + bytes(4 + size)


def literal_lzw(data: bytes) -> bytes:
    """TIFF's LZW without ever using its dictionary: nine bits a byte."""
    codes: list[int] = []
    for start in range(0, len(data), 250):
        codes += [256, *data[start : start + 250]]
    bits = "".join(f"{code:09b}" for code in [*codes, 257])
    return int(bits + "0" * (-len(bits) % 8), 2).to_bytes((len(bits) + 7) // 8, "big")


def solid_webp(width: int, height: int) -> bytes:
    """A lossless WebP of one colour in 40 bytes.

    Five prefix codes of one symbol each leave no bit for the pixels.
    """
    # size, alpha, version; no transform, cache or meta
    bits = [(width - 1, 14), (height - 1, 14), (0, 1), (0, 3), (0, 3)]
    bits += [(1, 1), (0, 1), (1, 1), (90, 8)] * 4 + [(1, 1), (0, 1), (0, 1), (0, 1)]
    value, place = 0, 0
    for number, count in bits:
        value, place = value | number << place, place + count
    data = b"\x2f" + value.to_bytes((place + 7) // 8, "little")
    data += b"\0" * (len(data) % 2)
    body = b"WEBPVP8L" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


def declared_jpeg(data: bytes, width: int, height: int) -> bytes:
    """The JPEG with another size in its frame header."""
    place = next(data.index(marker) for marker in (b"\xff\xc0", b"\xff\xc2") if marker in data)
    return data[: place + 5] + struct.pack(">HH", height, width) + data[place + 9 :]


def scan_bomb(scans: int) -> bytes:
    """A progressive JPEG that goes over its 4 megapixels again and again.

    In each of many empty scans of a few bytes.
    """
    data = encoded(np.zeros((2048, 2048), np.uint8), "JPEG", progressive=True)
    empty = bytes.fromhex("ffda 0008 01 01 00 01 3f 00".replace(" ", ""))
    # one code: a run of 2^14 blocks
    table = bytes.fromhex("ffc4 0014 10".replace(" ", "")) + bytes([1] + [0] * 15) + b"\xe0"
    runs = 65536 // 2**14
    value = (
        int("".join("0" + "0" * 14 for _ in range(runs)).ljust(64, "1"), 2)
        .to_bytes(8, "big")
        .replace(b"\xff", b"\xff\0")
    )
    return data[:-2] + (table + empty + value) * scans + b"\xff\xd9"


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = orientation, "Maker"
    return exif


def good_pictures(scene: np.ndarray) -> dict[str, Odd]:
    """Pictures that must be enhanced: formats, colour modes, depths, orientations, names."""
    rng = np.random.default_rng(5)
    deep = (scene.astype(np.uint16) << 8) | rng.integers(0, 256, scene.shape).astype(np.uint16)
    alpha = rng.integers(0, 256, scene.shape[:2]).astype(np.uint8)
    rgba, deep_alpha = np.dstack([scene, alpha]), np.dstack([deep, deep[..., 1]])
    grey, bits = scene[..., 1], scene[..., 1] > 128
    threes = [
        np.repeat(layer[..., None], 3, axis=2)
        for layer in (grey, deep[..., 1], np.where(bits, 255, 0).astype(np.uint8))
    ]
    palette = Image.fromarray(scene).quantize(16)
    lab = np.rint(255 * skimage.color.lab2rgb(np.full((40, 48, 3), [160 / 2.55, 0.0, 0.0]))).astype(
        np.uint8
    )
    cmyk = Image.fromarray(scene).convert("CMYK")
    from_cmyk = np.asarray(cmyk.convert("RGB"))
    jpeg, fine = encoded(scene, "JPEG", quality=95), dict(quality=95, subsampling=0)
    as_jpeg, plain = Odd(jpeg, scene, 6), encoded(scene, "PNG")
    found = {
        "plain.png": Odd(plain, scene),
        "plain.bmp": Odd(encoded(scene, "BMP"), scene),
        "plain.jpg": as_jpeg,
        "plain.tif": Odd(encoded(scene, "TIFF"), scene),
        "lossless.webp": Odd(encoded(scene, "WEBP", lossless=True), scene),
        "lossy.webp": Odd(encoded(scene, "WEBP", quality=95), scene, 8),
        "SHOUTED.PNG": Odd(plain, scene),
        "jpeg named.png": as_jpeg,
        "png named.jpg": Odd(plain, scene),
        "bmp named.tif": Odd(encoded(scene, "BMP"), scene),
        "tif named.webp": Odd(encoded(scene, "TIFF"), scene),
        "progressive.jpg": Odd(encoded(scene, "JPEG", progressive=True, **fine), scene, 4),
        "grey.jpg": Odd(encoded(grey, "JPEG", quality=95), threes[0], 3),
        "cmyk.jpg": Odd(encoded(cmyk, "JPEG", **fine), from_cmyk, 4),
        "cmyk.tif": Odd(encoded(cmyk, "TIFF"), from_cmyk),
        "cmyk16.tif": Odd(
            tiff(np.asarray(cmyk).astype(np.uint16) * 257, photometric="separated"), from_cmyk, 1
        ),
        "1 bit.png": Odd(encoded(bits, "PNG"), threes[2]),
        "1 bit.bmp": Odd(encoded(bits, "BMP"), threes[2]),
        "fax.tif": Odd(encoded(bits, "TIFF", compression="group4"), threes[2]),
        "grey.png": Odd(encoded(grey, "PNG"), threes[0]),
        "grey with alpha.png": Odd(png(np.dstack([grey, alpha])), np.dstack([threes[0], alpha])),
        "alpha.png": Odd(encoded(rgba, "PNG"), rgba),
        "alpha.webp": Odd(encoded(rgba, "WEBP", lossless=True, exact=True), rgba),
        "palette.png": Odd(encoded(palette, "PNG"), np.asarray(palette.convert("RGB"))),
        "palette.tif": Odd(encoded(palette, "TIFF"), np.asarray(palette.convert("RGB"))),
        "lab.tif": Odd(
            tiff(np.full((40, 48, 3), [160, 0, 0], np.uint8), photometric="cielab"), lab, 3
        ),
        "lzw.tif": Odd(encoded(scene, "TIFF", compression="tiff_lzw"), scene),
        "packbits.tif": Odd(encoded(scene, "TIFF", compression="packbits"), scene),
        "jpeg inside.tif": Odd(encoded(scene, "TIFF", compression="jpeg", quality=95), scene, 8),
        "planar.tif": Odd(
            tiff(np.moveaxis(scene, -1, 0), photometric="rgb", planarconfig="separate"), scene
        ),
        "tiled.tif": Odd(tiff(scene, photometric="rgb", tile=(16, 16)), scene),
        "big.tif": Odd(tiff(scene, photometric="rgb", bigtiff=True), scene),
        "motorola.tif": Odd(tiff(scene, photometric="rgb", byteorder=">"), scene),
        "16 bit.png": Odd(png(deep), deep),
        "16 bit grey.png": Odd(png(deep[..., 1:2]), threes[1]),
        "16 bit grey with alpha.png": Odd(
            png(deep[..., :2]), np.dstack([deep[..., :1]] * 3 + [deep[..., 1]])
        ),
        "16 bit alpha.png": Odd(png(deep_alpha), deep_alpha),
        "16 bit interlaced.png": Odd(png(deep, interlaced=True), deep),
        "interlaced.png": Odd(png(scene, interlaced=True), scene),
        "16 bit.tif": Odd(tiff(deep, photometric="rgb"), deep),
        "16 bit motorola.tif": Odd(tiff(deep, photometric="rgb", byteorder=">"), deep),
        "16 bit deflate.tif": Odd(
            tiff(deep, photometric="rgb", compression="zlib", predictor=True), deep
        ),
        "16 bit motorola deflate.tif": Odd(
            tiff(deep, photometric="rgb", byteorder=">", compression="zlib"), deep
        ),
        "16 bit tiled.tif": Odd(tiff(deep, photometric="rgb", tile=(16, 32)), deep),
        "16 bit lzw.tif": Odd(
            raw_tiff(tiff_tags(48, 40, 16, 5), literal_lzw(deep.tobytes())), deep
        ),
        "16 bit grey.tif": Odd(tiff(deep[..., 1], photometric="minisblack"), threes[1]),
        "16 bit negative.tif": Odd(tiff(deep[..., 1], photometric="miniswhite"), 65535 - threes[1]),
        "16 bit alpha.tif": Odd(
            tiff(deep_alpha, photometric="rgb", extrasamples=["unassalpha"]), deep_alpha
        ),
        "16 bit planar.tif": Odd(
            tiff(np.moveaxis(deep, -1, 0), photometric="rgb", planarconfig="separate"),
            deep,
            may_refuse=True,
            words="planar",
        ),
        "one frame.webp": Odd(encoded(scene, "WEBP", lossless=True, save_all=True), scene),
        "preview.jpg": Odd(
            encoded(
                scene,
                "MPO",
                save_all=True,
                append_images=[Image.fromarray(scene[::2, ::2])],
                **fine,
            ),
            scene,
            4,
        ),
        "tail.png": Odd(plain + b"rubbish" * 999, scene),
        "tail.jpg": as_jpeg._replace(data=jpeg + b"rubbish" * 999),
        "comment.png": Odd(
            png(scene, extra=chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * 90_000))), scene
        ),
        "loop of pages.tif": Odd(raw_tiff(tiff_tags(48, 40), scene.tobytes(), next_page=8), scene),
        "least.png": Odd(encoded(scene[:16, :16], "PNG"), scene[:16, :16]),
        "tall.png": Odd(
            encoded(np.tile(scene[:, :16], (60, 1, 1)), "PNG"), np.tile(scene[:, :16], (60, 1, 1))
        ),
        "wide.jpg": Odd(
            encoded(np.tile(scene[:16], (1, 60, 1)), "JPEG", **fine),
            np.tile(scene[:16], (1, 60, 1)),
            4,
        ),
        "orientation 99.jpg": Odd(encoded(scene, "JPEG", exif=exif_of(99), **fine), scene, 4),
        "broken exif.jpg": Odd(
            encoded(
                scene,
                "JPEG",
                exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01\x03\x00\xff" * 99,
                **fine,
            ),
            scene,
            4,
        ),
        "broken exif.png": Odd(
            png(scene, extra=chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\x04" + b"\xff" * 60)), scene
        ),
        "tag bomb.tif": Odd(
            raw_tiff(tiff_tags(48, 40), scene.tobytes() + bytes(2**20), bombs=700), scene
        ),
        "exif bomb.png": Odd(png(scene, extra=chunk(b"eXIf", exif_bomb(1000, 400_000))), scene),
        "broken profile.png": Odd(
            png(scene, extra=chunk(b"iCCP", b"icc\0\0" + b"no zlib")), scene, may_refuse=True
        ),
        "two\nlines.png": Odd(plain, scene),
        "bytes \udcff\udcfe.png": Odd(plain, scene),
        "-dash [1] %s *?.png": Odd(plain, scene),
        "long" + 245 * "g" + ".png": Odd(plain, scene),
    }
    for orientation, turn in EXIF_TURNS.items():
        exif = exif_of(orientation)
        found[f"orientation {orientation}.jpg"] = Odd(
            encoded(scene, "JPEG", exif=exif, **fine), turn(scene), 4
        )
        found[f"orientation {orientation}.png"] = Odd(encoded(scene, "PNG", exif=exif), turn(scene))
        found[f"orientation {orientation}.tif"] = Odd(
            tiff(deep, photometric="rgb", extratags=[(274, 3, 1, orientation, True)]), turn(deep)
        )
    return found


def bad_pictures(scene: np.ndarray) -> dict[str, Odd]:
    """Files that must be refused.

    No picture, no format of ours, several frames, too small, declared far too large.
    """
    jpeg = encoded(scene, "JPEG")
    several: dict[str, Any] = dict(
        save_all=True, append_images=[Image.fromarray(scene[::-1].copy())]
    )
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 48 40\n%%EndComments\nshowpage\n"
    found = {f"empty.{suffix}": b"" for suffix in ("png", "jpg", "tif", "bmp", "webp")}
    found |= {
        "text.png": b"this is no picture\n",
        "page.jpg": b"<!doctype html><title>404</title>",
        "drawing.png": b'<svg xmlns="http://www.w3.org/2000/svg" width="48" height="40"/>',
        "postscript.png": postscript,
        "gif.png": encoded(scene, "GIF"),
        "icon.png": encoded(scene, "ICO"),
        "animated gif.png": encoded(scene, "GIF", **several),
        "archive.png": b"PK\x05\x06" + bytes(18),
        "array.tif": b"\x93NUMPY" + bytes(122),
        "zeros.bmp": bytes(5000),
        "ones.jpg": b"\xff" * 5000,
        "animated.png": encoded(scene, "PNG", **several),
        "animated.webp": encoded(scene, "WEBP", **several),
        "pages.tif": encoded(scene, "TIFF", **several),
        "many pages.tif": many_pages(scene, 20_000),
        "one pixel.png": encoded(scene[:1, :1], "PNG"),
        "narrow.jpg": encoded(scene[:, :15], "JPEG"),
        "float.tif": tiff(scene.astype(np.float32), photometric="rgb"),
        "float grey.tif": tiff(scene[..., 0].astype(np.float32)),
        "32 bit.tif": tiff(scene[..., 0].astype(np.uint32) << 24),
        "no width.png": png(scene, size=(0, 40)),
        "60000.png": png(scene, size=(60_000, 60_000)),
        "hollow.png": png(scene, size=(HUGE, HUGE)),
        "bomb.png": png(scene, size=(HUGE, HUGE), idat=zeros_deflated(3 * HUGE * HUGE)),
        "bomb 16 bit.png": png(
            scene.astype(np.uint16), size=(HUGE, HUGE), idat=zeros_deflated(6 * HUGE * HUGE)
        ),
        "bomb grey.png": png(scene[..., :1], size=(HUGE, HUGE), idat=zeros_deflated(HUGE * HUGE)),
        "profile bomb.png": png(scene, extra=chunk(b"iCCP", b"icc\0\0" + zeros_deflated(2**29))),
        "hollow.jpg": declared_jpeg(jpeg, HUGE, HUGE),
        "hollow progressive.jpg": declared_jpeg(
            encoded(scene, "JPEG", progressive=True), HUGE, HUGE
        ),
        "65500.jpg": declared_jpeg(jpeg, 65_500, 65_500),
        "scans.jpg": scan_bomb(3000),
        "hollow.bmp": (
            encoded(scene, "BMP")[:18] + struct.pack("<ii", HUGE, HUGE) + encoded(scene, "BMP")[26:]
        ),
        "hollow.tif": raw_tiff(tiff_tags(HUGE, HUGE), scene.tobytes()),
        "bomb.tif": raw_tiff(tiff_tags(HUGE, HUGE, compression=8), zeros_deflated(3 * HUGE * HUGE)),
        "bomb 16 bit.tif": raw_tiff(tiff_tags(HUGE, HUGE, 16, 8), zeros_deflated(6 * HUGE * HUGE)),
        "tile bomb.tif": raw_tiff(
            tiff_tags(48, 40, compression=8, t322=[HUGE // 16 * 16], t323=[HUGE // 16 * 16]),
            zeros_deflated(3 * HUGE * HUGE),
        ),
        "solid.webp": solid_webp(16_383, 10_000),
    }
    return {name: Odd(data) for name, data in found.items()} | {
        "endless strip 16 bit.tif": Odd(
            raw_tiff(tiff_tags(48, 40, 16, 8), zeros_deflated(2**29)),
            np.zeros((40, 48, 3), np.uint16),
            may_refuse=True,
        ),
        "endless data.png": Odd(
            png(scene, idat=zeros_deflated(2**29)), np.zeros_like(scene), may_refuse=True
        ),
        "solid small.webp": Odd(solid_webp(64, 32), np.full((32, 64, 3), 90, np.uint8)),
    }


def cut_pictures(scene: np.ndarray) -> dict[str, Odd]:
    """Files that end too early: to be refused unless every pixel is there."""
    deep = scene.astype(np.uint16) * 256 + 77
    whole = {
        "png": (encoded(scene, "PNG"), scene, 0.0),
        "interlaced.png": (png(scene, interlaced=True), scene, 0.0),
        "16.png": (png(deep), deep, 0.0),
        "jpg": (encoded(scene, "JPEG", quality=95, subsampling=0), scene, 4.0),
        "progressive.jpg": (
            encoded(scene, "JPEG", quality=95, subsampling=0, progressive=True),
            scene,
            4.0,
        ),
        "bmp": (encoded(scene, "BMP"), scene, 0.0),
        "webp": (encoded(scene, "WEBP", lossless=True), scene, 0.0),
        "tif": (encoded(scene, "TIFF"), scene, 0.0),
        "lzw.tif": (encoded(scene, "TIFF", compression="tiff_lzw"), scene, 0.0),
        "16.tif": (tiff(deep, photometric="rgb"), deep, 0.0),
        "16 deflate.tif": (tiff(deep, photometric="rgb", compression="zlib"), deep, 0.0),
    }
    found = {}
    for kind, (data, pixels, tolerance) in whole.items():
        for place in (
            1,
            9,
            30,
            len(data) // 4,
            len(data) // 2,
            len(data) * 9 // 10,
            len(data) - 20,
            len(data) - 1,
        ):
            found[f"cut at {place}.{kind}"] = Odd(data[:place], pixels, tolerance, may_refuse=True)
    return found


def make_corpus(folder: Path) -> dict[str, Odd]:
    """Write every file into `folder`.

    Returns them by name, with the links, the pipe and the folder that lie among them.
    """
    scene = target_picture(3)
    found = good_pictures(scene) | bad_pictures(scene) | cut_pictures(scene)
    folder.mkdir()
    for name, odd in found.items():
        (folder / name).write_bytes(odd.data)
    (folder / "linked.png").symlink_to("plain.png")
    (folder / "dangling.png").symlink_to("nowhere.png")
    for name, target in (
        ("loop a.png", "loop b.png"),
        ("loop b.png", "loop a.png"),
        ("again", "."),
    ):
        (folder / name).symlink_to(target)
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    refused = ("dangling.png", "loop a.png", "loop b.png", "folder.png", "pipe.png")
    return found | {"linked.png": found["plain.png"]} | {name: Odd(b"") for name in refused}
