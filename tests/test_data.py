"""Reading pictures, pairing, splitting, augmenting."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import smooth_scene, write_pairs
from PIL import Image

import model_script as ms
from support.decoding import SUFFIXES, read_image
from support.pairs import Pair, PairStore, find_pairs, natural_key
from support.pictures import to_tensor, to_uint8, write_image
from support.scenes import find_scenes, split_by_scene
from support.settings import UserError

MakePairs = Callable[..., tuple[Path, Path]]
PLAIN = dict(window_min=1.0, flips=False, exposure_gain=0.0, channel_gain=0.0)


def pairs_in(folders: tuple[Path, Path], log: Callable[[str], None] = print) -> list[Pair]:
    return find_pairs(str(folders[0]), str(folders[1]), "train", log)


def store_of(folders: tuple[Path, Path], room: int = 2**30, skip_bad: bool = False) -> PairStore:
    return PairStore(pairs_in(folders), room, skip_bad)


def png16(path: Path, values: np.ndarray, colour_type: int) -> None:
    """A 16-bit PNG of (H, W) or (H, W, C) values, which Pillow cannot write for colour."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    height, width = values.shape[:2]
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


# pictures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".tiff"])
def test_lossless_formats_are_read_exactly(tmp_path: Path, suffix: str) -> None:
    scene = smooth_scene(0, 20, 30)
    Image.fromarray(scene).save(tmp_path / f"a{suffix}")
    np.testing.assert_array_equal(read_image(tmp_path / f"a{suffix}"), scene)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".tif", ".webp"])
def test_written_pictures_are_read_back(tmp_path: Path, suffix: str) -> None:
    scene = smooth_scene(0, 20, 30)
    write_image(tmp_path / "new" / f"a{suffix}", to_tensor(scene))
    difference = np.abs(read_image(tmp_path / "new" / f"a{suffix}").astype(int) - scene).mean()
    assert difference == 0 if suffix in (".png", ".bmp", ".tif") else difference < 8
    assert [path.name for path in (tmp_path / "new").iterdir()] == [f"a{suffix}"]


def test_writing_rounds_to_the_nearest_level(tmp_path: Path) -> None:
    values = torch.tensor([0.0, 0.4, 0.6, 100.49, 100.51, 254.6]) / 255
    write_image(tmp_path / "a.png", values.expand(3, 1, 6))
    assert read_image(tmp_path / "a.png")[0, :, 0].tolist() == [0, 0, 1, 100, 101, 255]


def test_tensors_and_pixels_convert_both_ways() -> None:
    scene = smooth_scene(0, 5, 7)
    tensor = to_tensor(scene)
    assert tensor.shape == (3, 5, 7)
    assert float(tensor[2, 4, 6]) == pytest.approx(scene[4, 6, 2] / 255)
    np.testing.assert_array_equal(to_uint8(tensor), scene)


ORIENTED = {  # EXIF orientation -> what a viewer must do to the stored pixels
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    6: lambda a: np.rot90(a, -1),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", ORIENTED)
def test_exif_orientation_is_honoured(tmp_path: Path, orientation: int) -> None:
    stored = np.zeros((32, 48, 3), np.uint8)
    stored[:16, :24, 0] = stored[16:, :24, 1] = stored[:, 24:, 2] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "a.jpg", exif=exif, quality=95, subsampling=0)
    read, expected = read_image(tmp_path / "a.jpg"), ORIENTED[orientation](stored)
    assert read.shape == expected.shape
    assert np.abs(read.astype(int) - expected).mean() < 3


def test_grey_is_repeated(tmp_path: Path) -> None:
    grey = smooth_scene(0, 16, 16)[..., 0]
    Image.fromarray(grey).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), np.repeat(grey[..., None], 3, 2))


def test_palette_is_looked_up(tmp_path: Path) -> None:
    indices = np.arange(256, dtype=np.uint8).reshape(16, 16) % 4
    palette = np.array([[255, 0, 0], [0, 200, 10], [1, 2, 3], [9, 99, 199]], np.uint8)
    picture = Image.fromarray(indices).convert("L")
    picture.putpalette(palette.tobytes())
    picture.save(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").mode == "P"
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), palette[indices])


@pytest.mark.parametrize("alpha", [0, 128, 255])
def test_alpha_is_dropped(tmp_path: Path, alpha: int) -> None:
    scene = smooth_scene(0, 16, 16)
    Image.fromarray(np.dstack([scene, np.full((16, 16), alpha, np.uint8)])).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), scene)


def test_one_bit_becomes_black_and_white(tmp_path: Path) -> None:
    bits = np.random.default_rng(0).integers(0, 2, (16, 16)).astype(bool)
    Image.fromarray(bits).save(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").mode == "1"
    np.testing.assert_array_equal(
        read_image(tmp_path / "a.png"), np.repeat(bits[..., None], 3, 2) * np.uint8(255)
    )


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_grey_is_rounded_to_8(tmp_path: Path, suffix: str) -> None:
    levels = np.arange(256).reshape(16, 16)
    for shift in (-128, 0, 128):
        values = np.clip(257 * levels + shift, 0, 65535).astype(np.uint16)
        Image.fromarray(values).save(tmp_path / f"a{suffix}")
        np.testing.assert_array_equal(read_image(tmp_path / f"a{suffix}")[..., 1], levels)


@pytest.mark.parametrize(("channels", "colour_type"), [(2, 4), (3, 2), (4, 6)])
def test_16_bit_colour_and_alpha_keep_their_levels(
    tmp_path: Path, channels: int, colour_type: int
) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (16, 16, channels))
    png16(tmp_path / "a.png", 257 * levels, colour_type)
    expected = levels[..., :3] if channels > 2 else np.repeat(levels[..., :1], 3, 2)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), expected)


def test_floating_point_pictures_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((16, 16), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=r"a\.tif"):
        read_image(tmp_path / "a.tif")


def encoded(kind: str) -> bytes:
    """A noisy picture, so that half its file is certainly half its pixels."""
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(
        stream, kind
    )
    return stream.getvalue()


BROKEN: dict[str, bytes] = {
    "empty.png": b"",
    "empty.jpg": b"",
    "cut.png": encoded("PNG")[: len(encoded("PNG")) // 2],
    "cut.jpg": encoded("JPEG")[: len(encoded("JPEG")) // 2],
    "cut.webp": encoded("WEBP")[: len(encoded("WEBP")) // 2],
    "cut.bmp": encoded("BMP")[: len(encoded("BMP")) // 2],
    "head.png": encoded("PNG")[:20],
    "text.png": b"this is no picture\n",
    "html.jpg": b"<!doctype html><title>404</title>",
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_pictures_are_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(BROKEN[name])
    with pytest.raises(UserError) as caught:
        read_image(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert caught.value.status == 2


def test_missing_pictures_and_folders_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(UserError) as caught:
            read_image(path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "WEBP"])
def test_damaged_bytes_give_a_picture_or_a_user_error(tmp_path: Path, kind: str) -> None:
    rng, whole, refused = np.random.default_rng(0), encoded(kind), 0
    for _ in range(60):
        data = bytearray(whole)
        for place in rng.integers(0, min(len(data), 200), 4):
            data[place] = rng.integers(0, 256)
        (tmp_path / "a.png").write_bytes(data)
        try:
            assert read_image(tmp_path / "a.png").shape[2] == 3
        except UserError:
            refused += 1
    assert refused > 0


# pairs --------------------------------------------------------------------------------------------


def test_pairs_over_all_suffixes_in_any_case(tmp_path: Path) -> None:
    suffixes = [".png", ".JPG", ".Jpeg", ".bmp", ".TIF", ".tiff", ".WebP"]
    assert {suffix.lower() for suffix in suffixes} == set(SUFFIXES)
    for folder, shift in (("low", 0), ("high", 3)):
        (tmp_path / folder).mkdir()
        for place in range(len(suffixes)):
            suffix = suffixes[(place + shift) % len(suffixes)]
            Image.fromarray(smooth_scene(place, 32, 32)).save(
                tmp_path / folder / f"s{place}{suffix}"
            )
    (tmp_path / "low" / "notes.txt").write_text("no picture")
    (tmp_path / "low" / ".hidden.png").write_bytes(b"")
    (tmp_path / "low" / "folder.png").mkdir()
    messages: list[str] = []
    pairs = pairs_in((tmp_path / "low", tmp_path / "high"), messages.append)
    assert [pair.name for pair in pairs] == [f"s{place}" for place in range(7)]
    assert all(
        pair.low.stem == pair.high.stem == pair.name and pair.low.suffix != pair.high.suffix
        for pair in pairs
    )
    assert messages == []
    store = PairStore(pairs, 2**30)
    for place in range(7):
        assert all(
            np.abs(p.astype(int) - smooth_scene(place, 32, 32)).mean() < 12 for p in store[place]
        )


def test_orphans_are_counted_and_named_on_both_sides(make_pairs: MakePairs) -> None:
    low, high = make_pairs(6)
    for orphan in (high / "2.png", high / "5.png", low / "3.png"):
        orphan.unlink()
    messages: list[str] = []
    assert [pair.name for pair in pairs_in((low, high), messages.append)] == ["1", "4", "6"]
    of_low, of_high = messages
    assert (
        str(low) in of_low
        and " 2 " in of_low
        and "2.png, 5.png" in of_low
        and "3.png" not in of_low
    )
    assert (
        str(high) in of_high and " 1 " in of_high and "3.png" in of_high and "2.png" not in of_high
    )


def test_two_files_of_one_stem_are_refused(make_pairs: MakePairs) -> None:
    low, high = make_pairs(3)
    (high / "2.JPG").write_bytes((high / "2.png").read_bytes())
    with pytest.raises(UserError) as caught:
        pairs_in((low, high))
    assert "2.png" in str(caught.value) and "2.JPG" in str(caught.value)


def test_folders_that_pair_nothing_are_refused(tmp_path: Path, make_pairs: MakePairs) -> None:
    low, high = make_pairs(2)
    with pytest.raises(UserError, match="train_high_dir"):
        pairs_in((low, tmp_path / "missing"))
    with pytest.raises(UserError, match="train_low_dir"):
        pairs_in((tmp_path / "missing", high))
    for path in high.iterdir():
        path.rename(high / f"other_{path.name}")
    with pytest.raises(UserError) as caught:
        pairs_in((low, high))
    assert str(low) in str(caught.value) and str(high) in str(caught.value)


def test_natural_order(tmp_path: Path) -> None:
    stems = ["1", "2", "9", "10", "11", "100"]
    for folder in ("low", "high"):
        (tmp_path / folder).mkdir()
        for stem in reversed(stems):
            (tmp_path / folder / f"{stem}.png").write_bytes(b"x")
    assert [pair.name for pair in pairs_in((tmp_path / "low", tmp_path / "high"))] == stems
    takes = ["img2_1", "img2_9", "img2_10", "img10_1"]
    assert sorted(sorted(takes), key=natural_key) == takes


def test_names_with_unusual_digits_are_no_obstacle(tmp_path: Path) -> None:
    """A superscript two counts as a digit for str.isdigit but not for int."""
    for folder in ("low", "high"):
        (tmp_path / folder).mkdir()
        for stem in ("area²", "area1"):
            (tmp_path / folder / f"{stem}.png").write_bytes(b"x")
    assert {pair.name for pair in pairs_in((tmp_path / "low", tmp_path / "high"))} == {
        "area²",
        "area1",
    }


def break_pair(low: Path, high: Path, how: str) -> Path:
    """Spoil pair 2 of the folders; returns the file to be named."""
    if how == "sizes":
        Image.fromarray(smooth_scene(1, 32, 40)).save(high / "2.png")
        return low / "2.png"
    if how == "small":
        for folder in (low, high):
            Image.fromarray(smooth_scene(1, 15, 40)).save(folder / "2.png")
        return low / "2.png"
    side, name = how.split(":")
    folder = {"low": low, "high": high}[side]
    (folder / "2.png").unlink()
    broken = folder / f"2{Path(name).suffix}"
    broken.write_bytes(BROKEN[name])
    return broken


SPOILED = ["sizes", "small", *(f"{side}:{name}" for side in ("low", "high") for name in BROKEN)]


@pytest.mark.parametrize("how", SPOILED)
def test_a_bad_pair_stops_the_run_or_is_left_out(
    make_pairs: MakePairs, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = make_pairs(3)
    named = break_pair(*folders, how)
    with pytest.raises(UserError) as caught:
        store_of(folders)
    assert str(named) in str(caught.value)
    assert "on_bad_file=skip" in str(caught.value)
    pairs = pairs_in(folders)
    capsys.readouterr()
    store = PairStore(pairs, 2**30, skip_bad=True)
    assert [pair.name for pair in store.pairs] == ["1", "3"]
    (message,) = capsys.readouterr().out.splitlines()
    assert message.startswith("left out: ") and str(named) in message
    assert len(store) == len(store.thumbnails) == 2
    np.testing.assert_array_equal(store[1][1], read_image(folders[1] / "3.png"))


def test_sizes_that_differ_are_both_told(make_pairs: MakePairs) -> None:
    folders = make_pairs(2)
    break_pair(*folders, "sizes")
    with pytest.raises(UserError, match=r"32x32 against 40x32.*high"):
        store_of(folders)


def test_nothing_left_after_skipping_is_an_error(make_pairs: MakePairs) -> None:
    low, high = make_pairs(2)
    for path in low.iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="not one"):
        store_of((low, high), skip_bad=True)


def test_the_cache_limit_changes_no_pixel(make_pairs: MakePairs) -> None:
    folders = make_pairs(4, size=(400, 500))  # 1.2 MB a pair
    cached, some, none = (store_of(folders, limit * 2**20) for limit in (100, 2, 0))
    assert [len(store._cache) for store in (cached, some, none)] == [4, 1, 0]
    for index in range(4):
        for place, folder in enumerate(folders):
            expected = read_image(folder / f"{index + 1}.png")
            for store in (cached, some, none):
                np.testing.assert_array_equal(store[index][place], expected)


def test_two_stores_share_one_cache_limit(make_pairs: MakePairs, tmp_path: Path) -> None:
    low, high = make_pairs(2, size=(400, 500))  # 1.2 MB a pair
    held_out = write_pairs(tmp_path / "held_out", 2, size=(400, 500))
    folders = dict(train_low_dir=str(low), train_high_dir=str(high))
    folders |= dict(val_low_dir=str(held_out[0]), val_high_dir=str(held_out[1]))
    for limit, expected in ((100, [2, 2]), (4, [2, 1]), (2, [1, 0])):
        store, _, validation, _ = ms.training_data(
            ms.Config(**folders), ms.Use(cache_megabytes=limit)
        )
        assert [len(store._cache), len(validation._cache)] == expected, limit


def test_thumbnails_are_block_means_of_the_targets(make_pairs: MakePairs) -> None:
    folders = make_pairs(2, size=(32, 48))
    store = store_of(folders)
    assert store.thumbnails.shape == (2, 16, 16, 3) and store.thumbnails.dtype == np.uint8
    blocks = store[1][1].reshape(16, 2, 16, 3, 3).mean((1, 3))
    assert np.abs(store.thumbnails[1] - blocks).max() <= 1


# split --------------------------------------------------------------------------------------------

TAKES = [0, 1, 2, 0, 3, 4, 5, 1, 6, 7, 0, 8]  # scene of each pair


@pytest.fixture
def takes(make_pairs: MakePairs) -> np.ndarray:
    return store_of(make_pairs(len(TAKES), scenes=TAKES)).thumbnails


def test_scenes_are_found_despite_exposure(takes: np.ndarray) -> None:
    expected = {tuple(i for i, scene in enumerate(TAKES) if scene == wanted) for wanted in TAKES}
    assert {tuple(scene) for scene in find_scenes(takes, 0.85)} == expected
    assert len(find_scenes(takes, 1.0)) == len(TAKES)
    assert len(find_scenes(takes, 0.0)) < len(expected)


def test_scenes_are_chained() -> None:
    """A resembles B and B resembles C, so that A and C stay together although they do not resemble
    each other."""
    a, c = smooth_scene(0, 16, 16).astype(float), smooth_scene(1, 16, 16).astype(float)
    chain = np.stack([a, 0.75 * a + 0.25 * c, 0.5 * (a + c), 0.25 * a + 0.75 * c, c]).astype(
        np.uint8
    )
    assert find_scenes(chain[[0, 4]], 0.85) == [[0], [1]]
    assert find_scenes(chain[[0, 4, 2, 1, 3]], 0.85) == [[0, 1, 2, 3, 4]]


def test_split_keeps_scenes_whole_for_every_seed(takes: np.ndarray) -> None:
    splits = set()
    for seed in range(12):
        training, validation = split_by_scene(takes, 0.25, 0.85, seed)
        assert sorted(training + validation) == list(range(len(TAKES)))
        assert training and validation
        assert not {TAKES[i] for i in training} & {TAKES[i] for i in validation}
        assert split_by_scene(takes, 0.25, 0.85, seed) == (training, validation)
        splits.add(tuple(validation))
    assert len(splits) > 6


@pytest.mark.parametrize(
    ("fraction", "held_out"), [(0.01, 1), (0.1, 2), (0.25, 5), (0.5, 10), (0.9, 18)]
)
def test_split_holds_out_the_fraction_of_single_scenes(fraction: float, held_out: int) -> None:
    thumbnails = np.stack([smooth_scene(seed, 16, 16) for seed in range(20)])
    assert len(split_by_scene(thumbnails, fraction, 0.85, 0)[1]) == held_out


def test_one_scene_cannot_be_split() -> None:
    with pytest.raises(UserError, match="val_low_dir"):
        split_by_scene(np.stack([smooth_scene(0, 16, 16)] * 3), 0.1, 0.85, 0)


def test_training_data_takes_a_validation_set_of_its_own(tmp_path: Path) -> None:
    train, held_out = (
        write_pairs(tmp_path / "t", 4),
        write_pairs(tmp_path / "v", 2, scenes=[70, 71]),
    )
    folders = dict(train_low_dir=str(train[0]), train_high_dir=str(train[1]))
    config = ms.Config(**folders, val_low_dir=str(held_out[0]), val_high_dir=str(held_out[1]))
    store, training, other, validation = ms.training_data(config, ms.Use())
    assert (training, validation) == ([0, 1, 2, 3], [0, 1])
    np.testing.assert_array_equal(other[1][0], read_image(held_out[0] / "2.png"))
    split = ms.Config(**folders, val_fraction=0.25)
    store, training, other, validation = ms.training_data(split, ms.Use())
    assert other is store and len(training) == 3 and len(validation) == 1


# samples ------------------------------------------------------------------------------------------


def samples_of(folders: tuple[Path, Path], **settings: object) -> ms.TrainingSamples:
    config = ms.Config(**{"thumbnail_size": 32, "image_size": [32, 32], **settings})
    store = store_of(folders)
    return ms.TrainingSamples(store, range(len(store)), config)


def same(a: ms.Sample, b: ms.Sample) -> bool:
    return all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(a, b, strict=True))


GEOMETRIES = [
    dict(),
    dict(image_size=[24, 40]),
    dict(crop_size=32),
    dict(crop_size=40, crop_scales=[0.5]),
]


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_samples_are_a_pure_function_of_seed_epoch_and_index(
    make_pairs: MakePairs, geometry: dict[str, object]
) -> None:
    folders = make_pairs(3, size=(64, 80))
    samples, again = (samples_of(folders, **geometry) for _ in range(2))
    keys = [(epoch, index) for epoch in range(3) for index in range(3)]
    first = {key: samples[key] for key in keys}
    torch.manual_seed(99)
    np.random.seed(99)
    assert all(same(first[key], again[key]) for key in reversed(keys))
    assert not any(same(first[a], first[b]) for a in keys for b in keys if a < b)
    other = samples_of(folders, **geometry, seed=1)
    assert not any(same(first[key], other[key]) for key in keys)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_samples_have_the_promised_shapes_and_ranges(
    make_pairs: MakePairs, geometry: dict[str, object]
) -> None:
    samples = samples_of(make_pairs(2, size=(64, 80)), **geometry, exposure_gain=3.0)
    side = samples.config.crop_size
    for epoch in range(8):
        low, high, thumbnail, box = samples[epoch, 1]
        assert low.shape == high.shape == (3, *([side] * 2 if side else samples.config.image_size))
        assert thumbnail.shape == (3, 32, 32)
        assert all(part.min() >= 0 and part.max() <= 1 for part in (low, high, thumbnail, box))
        left, top, right, bottom = box.tolist()
        assert left < right and top < bottom
        # 8-bit levels, as a file has
        torch.testing.assert_close(high * 255, (high * 255).round(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_low_and_high_stay_aligned(make_pairs: MakePairs, geometry: dict[str, object]) -> None:
    folders = make_pairs(2, size=(64, 80), equal=True)
    samples = samples_of(folders, **geometry, exposure_gain=0.0, channel_gain=0.0)
    for epoch in range(12):
        for index in range(2):
            sample = samples[epoch, index]
            assert torch.equal(sample.low, sample.high)


@pytest.mark.parametrize("window_min", [1.0, 0.45])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_box_says_where_the_crop_lies_in_the_thumbnail(
    make_pairs: MakePairs, geometry: dict[str, object], window_min: float
) -> None:
    """The thumbnail read at the box must be the crop, through windows, scales, mirrors and
    transposes."""
    samples = samples_of(
        make_pairs(2, size=(120, 96), equal=True), **geometry, window_min=window_min
    )
    boxes, others = [], []
    for epoch in range(24):
        low, _, thumbnail, box = samples[epoch, epoch % 2]
        read = ms.sample_grid(thumbnail[None], box[None], low.shape[-2:])[0]
        assert (read - low).abs().mean() < 0.03
        others += [float((turned - low).abs().mean()) for turned in (read.flip(-1), read.flip(-2))]
        boxes.append(tuple(box.tolist()))
    assert min(others) > 0.03  # a mirror that the box does not know of would be noticed
    assert len(set(boxes)) == 1 if "crop_size" not in geometry else len(set(boxes)) > 5


def test_plain_settings_give_the_file_itself(make_pairs: MakePairs) -> None:
    folders = make_pairs(2, size=(32, 48))
    samples = samples_of(folders, **PLAIN, image_size=[32, 48])
    for place, folder in enumerate(folders):
        expected = read_image(folder / "2.png").transpose(2, 0, 1) / 255
        np.testing.assert_allclose(samples[5, 1][place].numpy(), expected, atol=1e-6)
    assert samples[5, 1].box.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("size", [(24, 40), (100, 60)])
def test_plain_settings_give_the_resized_picture(
    make_pairs: MakePairs, size: tuple[int, int]
) -> None:
    """Pillow's antialiased bilinear resize is the referee; it rounds twice."""
    folders = make_pairs(2, size=(64, 80))
    samples = samples_of(folders, **PLAIN, image_size=list(size))
    for place, folder in enumerate(folders):
        picture = Image.open(folder / "1.png").resize((size[1], size[0]), Image.Resampling.BILINEAR)
        expected = np.asarray(picture).transpose(2, 0, 1).astype(float)
        assert np.abs(samples[0, 0][place].numpy() * 255 - expected).max() <= 1.01
    thumbnail = np.asarray(
        Image.open(folders[0] / "1.png").resize((32, 32), Image.Resampling.BILINEAR)
    )
    assert (
        np.abs(samples[0, 0].thumbnail.numpy() * 255 - thumbnail.transpose(2, 0, 1)).max() <= 1.01
    )


def test_native_crops_are_windows_of_the_file(make_pairs: MakePairs) -> None:
    folders = make_pairs(1, size=(64, 80))
    samples = samples_of(folders, **PLAIN, crop_size=32, crop_scales=[1.0])
    whole = read_image(folders[1] / "1.png")
    for epoch in range(6):
        sample = samples[epoch, 0]
        left, top, right, bottom = (
            round(float(b) * side) for b, side in zip(sample.box, (80, 64, 80, 64), strict=True)
        )
        np.testing.assert_array_equal(to_uint8(sample.high), whole[top:bottom, left:right])


def test_a_crop_larger_than_the_picture_is_enlarged(make_pairs: MakePairs) -> None:
    samples = samples_of(make_pairs(1, size=(40, 56)), **PLAIN, crop_size=64, crop_scales=[1.0])
    left, top, right, bottom = samples[0, 0].box.tolist()
    assert samples[0, 0].low.shape == (3, 64, 64)
    assert (right - left, bottom - top) == pytest.approx((40 / 56, 1.0))


def test_crop_scale_zero_is_the_whole_picture(make_pairs: MakePairs) -> None:
    folders = make_pairs(1, size=(64, 80))
    samples = samples_of(folders, **PLAIN, crop_size=32, crop_scales=[0.0])
    plain = samples_of(folders, **PLAIN, image_size=[32, 32])
    assert same(samples[0, 0], plain[0, 0])


def test_crop_scales_are_all_drawn(make_pairs: MakePairs) -> None:
    samples = samples_of(
        make_pairs(1, size=(128, 128)), **PLAIN, crop_size=32, crop_scales=[1.0, 0.5, 0.0]
    )
    extents = [
        round(float(samples[epoch, 0].box[2] - samples[epoch, 0].box[0]), 3) for epoch in range(60)
    ]
    assert {extent: extents.count(extent) > 8 for extent in extents} == {
        0.25: True,
        0.5: True,
        1.0: True,
    }


def test_without_augmentation_every_epoch_is_the_same(make_pairs: MakePairs) -> None:
    samples = samples_of(make_pairs(1), **PLAIN)
    assert all(same(samples[0, 0], samples[epoch, 0]) for epoch in range(6))


@pytest.mark.parametrize(
    "key", [dict(window_min=0.5), dict(flips=True), dict(exposure_gain=1.0), dict(channel_gain=0.3)]
)
def test_each_augmentation_has_an_effect(make_pairs: MakePairs, key: dict[str, object]) -> None:
    folders = make_pairs(1, size=(64, 64))
    plain, samples = samples_of(folders, **PLAIN), samples_of(folders, **{**PLAIN, **key})
    changed = [not torch.equal(plain[epoch, 0].low, samples[epoch, 0].low) for epoch in range(12)]
    assert sum(changed) >= 6
    high = [not torch.equal(plain[epoch, 0].high, samples[epoch, 0].high) for epoch in range(12)]
    assert any(high) == (key.keys() <= {"window_min", "flips"})


def test_flips_are_all_eight_symmetries_of_square_inputs(make_pairs: MakePairs) -> None:
    folders = make_pairs(1)
    whole = samples_of(folders, **PLAIN)[0, 0].high
    samples = samples_of(folders, **{**PLAIN, "flips": True})
    symmetries = [torch.rot90(p, k, (-2, -1)) for p in (whole, whole.flip(-1)) for k in range(4)]
    seen = [
        [torch.equal(samples[epoch, 0].high, s) for s in symmetries].index(True)
        for epoch in range(60)
    ]
    assert set(seen) == set(range(8))


def test_gains_stay_in_their_range_and_on_low_alone(make_pairs: MakePairs) -> None:
    folders = make_pairs(1)
    plain = samples_of(folders, **PLAIN)[0, 0]
    brighter, redder = (
        samples_of(folders, **{**PLAIN, **gain})
        for gain in (dict(exposure_gain=0.5), dict(channel_gain=0.2))
    )
    stops, relative = [], []
    for epoch in range(60):
        exposed, tinted = brighter[epoch, 0], redder[epoch, 0]
        assert torch.equal(exposed.high, plain.high) and torch.equal(tinted.high, plain.high)
        stops.append(float((exposed.low.sum() / plain.low.sum()).log2()))
        gain = exposed.low.sum() / plain.low.sum()
        torch.testing.assert_close(exposed.low, plain.low * gain, atol=1e-5, rtol=0)
        torch.testing.assert_close(exposed.thumbnail, plain.thumbnail * gain, atol=1e-5, rtol=0)
        relative += (tinted.low.sum((1, 2)) / plain.low.sum((1, 2)) - 1).tolist()
    for drawn, bound in ((stops, 0.5), (relative, 0.2)):
        assert -bound - 1e-4 <= min(drawn) < -0.7 * bound
        assert 0.7 * bound < max(drawn) <= bound + 1e-4


def test_window_min_is_the_smallest_share(make_pairs: MakePairs) -> None:
    samples = samples_of(make_pairs(1, size=(200, 100)), **{**PLAIN, "window_min": 0.4})
    windows = [samples._window((200, 100, 3), np.random.default_rng(seed)) for seed in range(300)]
    assert all(
        0 <= top <= 200 - height and 0 <= left <= 100 - width
        for top, left, height, width in windows
    )
    heights, widths = ([window[k] for window in windows] for k in (2, 3))
    assert 80 <= min(heights) < 95 and 185 < max(heights) <= 200
    assert 40 <= min(widths) < 48 and 92 < max(widths) <= 100
    assert (
        min(samples._window((20, 20, 3), np.random.default_rng(seed))[2] for seed in range(50))
        == 16
    )


@pytest.mark.parametrize(("count", "batch_size"), [(10, 1), (10, 3), (4, 8), (1, 1)])
def test_batch_plan_covers_every_index_once(count: int, batch_size: int) -> None:
    plan = ms.batch_plan(count, ms.Config(batch_size=batch_size), 7)
    assert sorted(draw for batch in plan for draw in batch) == [
        (7, index, False, 0) for index in range(count)
    ]
    assert [len(batch) for batch in plan[:-1]] == [batch_size] * (len(plan) - 1)
    assert len(plan) == -(-count // batch_size)


def test_batch_plan_differs_per_epoch_and_seed_and_repeats() -> None:
    configs = [ms.Config(batch_size=4, seed=seed, whole_share=0.5) for seed in range(3)]
    plans = [ms.batch_plan(30, config, epoch) for config in configs for epoch in range(3)]
    assert len({tuple(draw.pair for batch in plan for draw in batch) for plan in plans}) == 9
    assert ms.batch_plan(30, configs[1], 2) == plans[5]


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_whole_share_of_the_batches_is_whole(share: float) -> None:
    plan = ms.batch_plan(2000, ms.Config(batch_size=2, whole_share=share), 0)
    # or their pictures' sizes would differ
    assert all(batch[0].whole == batch[1].whole for batch in plan)
    assert abs(sum(batch[0].whole for batch in plan) / 1000 - share) < 0.05


def test_a_whole_draw_is_the_picture_at_image_size(make_pairs: MakePairs) -> None:
    folders = make_pairs(2, size=(64, 80))
    plain, crops = (
        samples_of(folders, image_size=[24, 40]),
        samples_of(folders, image_size=[24, 40], crop_size=32),
    )
    assert same(crops[ms.Draw(3, 1, whole=True)], plain[3, 1])
    assert crops[3, 1].low.shape == (3, 32, 32)


@pytest.mark.parametrize("quantise", [False, True])
def test_resize_to_its_own_size_keeps_the_picture(quantise: bool) -> None:
    image = to_tensor(smooth_scene(0, 20, 30))[None]
    torch.testing.assert_close(ms.resize(image, (20, 30), quantise), image, atol=1e-6, rtol=0)


def test_resize_quantises_on_request_only() -> None:
    image = to_tensor(smooth_scene(0, 20, 30))[None]
    plain, quantised = (ms.resize(image, [16, 16], quantise) for quantise in (False, True))
    assert (plain * 255 - (plain * 255).round()).abs().max() > 0.1
    torch.testing.assert_close(quantised * 255, (plain * 255).round(), atol=1e-4, rtol=0)
