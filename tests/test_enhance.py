"""Enhancement of real files.

Tiles without seams, every kind of picture, folders, alternatives, uncertainty, exposure.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.io
import tifffile
import torch
from cli_tools import (
    assert_one_line_error,
    dark_picture,
    files_under,
    run_script,
    run_tool,
    save_picture,
    target_picture,
)
from conftest import ROOT, randomise
from PIL import Image, ImageCms
from torch import Tensor

import model_script as ms
from support.checkpoints import load_checkpoint, save_checkpoint
from support.decoding import ORIENTATION, Picture, read_image, read_picture
from support.folders import ENHANCE_COLUMNS
from support.pictures import (
    blend,
    calmed,
    encode_png16,
    exposed,
    resize,
    srgb_to_linear,
    stops_to_mean,
    to_tensor,
    whole_thumbnail,
)
from support.runtime import Runtime
from support.tiles import NO_RIM, RIM, latent_noise, plan_tiles, with_rim

CPU = Runtime(torch.device("cpu"), torch.float32)


def small_model(scale: float = 0.04, **settings: object) -> ms.ConditionalFlow:
    torch.manual_seed(5)
    size = {"flow_channels": 16, "num_flow_blocks": 2, "thumbnail_size": 32, "crop_size": 32}
    config = ms.Config(**{**size, **settings})
    return randomise(ms.ConditionalFlow(config), scale).eval()


def noise_picture(height: int, width: int, depth: type = np.uint8) -> np.ndarray:
    """Every pixel matters to its neighbours, so that a halo that is too small is seen."""
    return np.random.default_rng(7).integers(
        0, np.iinfo(depth).max, (height, width, 3), dtype=depth
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that changes its input visibly."""
    path = tmp_path_factory.mktemp("weights") / "best_model.pth"
    model = small_model(flow_channels=8, num_flow_blocks=1)
    save_checkpoint(
        path,
        {
            "config": dataclasses.asdict(model.config),
            "model": model.state_dict(),
            "run_id": "r",
            "epoch": 1,
        },
    )
    return path


def enhance(checkpoint: Path, source: str | Path, target: str | Path, *settings: str) -> int:
    arguments = [
        "--mode",
        "enhance",
        "--checkpoint",
        checkpoint,
        "--input",
        source,
        "--output",
        target,
    ]
    return ms.main(
        [*map(str, arguments), *(part for setting in settings for part in ("--set", setting))]
    )


def rows_of(folder: Path) -> dict[str, dict[str, str]]:
    """enhance.csv by file name."""
    with open(folder / "enhance.csv", newline="", encoding="utf-8") as stream:
        return {Path(row["file"]).name: row for row in csv.DictReader(stream)}


# tiles --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
@pytest.mark.parametrize("size", [(260, 299), (16, 500), (401, 65), (128, 128)])
def test_tiles_leave_no_seam(size: tuple[int, int], depth: type) -> None:
    """The promise is 1e-3 in fp32 at every pixel; what is measured is the rounding to 16 bits."""
    model, pixels = small_model(), noise_picture(*size, depth)
    with torch.no_grad():
        whole = model.enhance(to_tensor(pixels)[None])[0].permute(1, 2, 0).numpy()
    tiled = ms.enhance_pixels(model, pixels, ms.Use(tile_size=64), CPU)
    assert tiled.best.shape == pixels.shape and tiled.best.dtype == np.uint16
    assert tiled.samples == [] and tiled.deviation is None
    assert np.abs(tiled.best / 65535 - whole).max() < 5e-5
    assert whole.std() > 0.02


def test_a_smaller_halo_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pixels = small_model(scale=0.08), noise_picture(256, 256)
    whole = ms.enhance_pixels(model, pixels, ms.Use(tile_size=1024), CPU).best
    monkeypatch.setattr(ms.ConditionalFlow, "receptive_field", 16)
    tiled = ms.enhance_pixels(model, pixels, ms.Use(tile_size=64), CPU).best
    assert np.abs(tiled.astype(int) - whole).max() > 65535 * 1e-3


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_the_receptive_field_bounds_what_a_pixel_depends_on(blocks: int) -> None:
    """By the gradient: nothing beyond it, and something nearly as far (the bound is not idle)."""
    model = small_model(scale=0.1, num_flow_blocks=blocks).double()
    low = torch.rand(1, 3, 328, 328, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        survey = model.survey(resize(low, (32, 32)))
    condition = model.condition(low, survey, torch.tensor([ms.WHOLE_BOX]))
    # before clamping, which has no gradient
    decoded = model.flow.inverse(condition.prior_mean, condition.features)
    decoded[0, :, 160:168, 160:168].sum().backward()
    rows, columns = low.grad[0].abs().sum(0).nonzero().unbind(1)
    for place in (rows, columns):
        reached = max(160 - int(place.min()), int(place.max()) - 167)
        assert model.receptive_field - 16 <= reached <= model.receptive_field


def test_samples_and_uncertainty_do_not_depend_on_the_tiles() -> None:
    model, pixels = small_model(seed=3), noise_picture(150, 170)
    settings = dict(samples=2, uncertainty=True, temperature=0.8)
    whole, tiled = (
        ms.enhance_pixels(model, pixels, ms.Use(tile_size=s, **settings), CPU) for s in (1024, 64)
    )
    for a, b in zip([whole.best, *whole.samples], [tiled.best, *tiled.samples], strict=True):
        assert np.abs(a.astype(int) - b).max() <= 4
    np.testing.assert_allclose(whole.deviation, tiled.deviation, atol=1e-4)


@pytest.mark.parametrize(
    ("height", "width", "side", "halo"),
    [
        (4000, 6000, 800, 112),
        (16, 16, 64, 8),
        (65, 64, 64, 24),
        (401, 1203, 64, 112),
        (289, 289, 64, 112),
        (997, 17, 128, 16),
    ],
)
def test_tiles_cover_every_pixel_once_and_are_of_one_size(
    height: int, width: int, side: int, halo: int
) -> None:
    seen = np.zeros((height, width), np.uint8)
    sizes = set()
    for core, outer in plan_tiles(height, width, side, halo):
        seen[core[0] : core[1], core[2] : core[3]] += 1
        # strides and squeezes fall on the same pixels as in the whole picture
        assert outer[0] % 8 == outer[2] % 8 == 0
        for axis, full in ((0, height), (2, width)):
            assert outer[axis] <= max(0, core[axis] - halo) and outer[axis + 1] >= min(
                full, core[axis + 1] + halo
            )
            assert outer[axis + 1] - outer[axis] <= side + 2 * halo
        # in blocks of 8, as the model pads
        sizes.add((-(-(outer[1] - outer[0]) // 8), -(-(outer[3] - outer[2]) // 8)))
    assert (seen == 1).all() and len(sizes) == 1


# the edges ---------------------------------------------------------------------------------------


def test_the_box_grows_with_the_rim() -> None:
    """So that a pixel keeps its place in the whole picture."""
    low, box = torch.rand(1, 3, 20, 40), torch.tensor([[0.5, 0.0, 1.0, 0.25]])
    grown, place = with_rim(low, box, (0, 8, 8, 0))
    assert grown.shape == (1, 3, 32, 48)  # 20 and 8 above, up to a multiple of 8
    assert torch.equal(grown[..., 8:28, :40], low)
    assert torch.equal(grown[..., 8:28, 40:48], low[..., 31:39].flip(-1))
    pixel = 0.5 / 40, 0.25 / 20
    expected = [0.5, -8 * pixel[1], 1 + 8 * pixel[0], 0.25 + 4 * pixel[1]]
    torch.testing.assert_close(place[0], torch.tensor(expected))
    plain, same = with_rim(low[..., :16, :], box, NO_RIM)
    assert torch.equal(plain, low[..., :16, :]) and torch.equal(same, box)


def test_a_model_that_learned_from_whole_pictures_gets_no_rim() -> None:
    pixels, whole = noise_picture(40, 48), small_model(crop_size=0)
    cropped = small_model()
    assert (whole.rim, cropped.rim) == (0, RIM)
    low = to_tensor(pixels)[None]
    with torch.no_grad():
        plain = cropped.decode(cropped.condition(low))
        assert torch.equal(whole.enhance(low), plain)
        assert not torch.equal(cropped.enhance(low), plain)


def test_no_line_along_the_edges_of_a_bright_sky() -> None:
    """A smooth bright picture, by the released weights: the outermost lines go on as the next ones
    do."""
    x, y = np.meshgrid(np.linspace(0, 1, 136), np.linspace(0, 1, 112))
    sky = np.stack([120 + 30 * x, 140 + 20 * y, 170 + 10 * x], -1)
    noise = np.random.default_rng(0).normal(0, 1, sky.shape)
    pixels = np.rint(sky + noise).astype(np.uint8)
    loaded = ms.load_model(str(ms.RELEASED), {"device": "cpu"}, ms.ConditionalFlow)
    steps = {}
    for name, rim in (("with", RIM), ("without", 0)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ms, "RIM", rim)
            best = ms.enhance_pixels(loaded.model, pixels, loaded.use, loaded.runtime).best / 257
        sides = (best, best[::-1], best.swapaxes(0, 1), best[:, ::-1].swapaxes(0, 1))
        steps[name] = max(float(np.abs(s[0].mean(0) - s[2:5].mean((0, 1))).max()) for s in sides)
    assert steps["with"] < 1.5 and steps["without"] > 1.5 * steps["with"], steps


# progress -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "passes"),
    [
        ({}, 1),
        ({"samples": 1}, 2),
        ({"samples": 3}, 4),
        ({"uncertainty": True}, 17),
        ({"temperature": 0.5}, 1),
    ],
)
def test_progress_counts_the_tiles_of_all_passes(settings: dict[str, Any], passes: int) -> None:
    pixels, told = noise_picture(16, 500), list[tuple[int, int]]()
    model, use = small_model(num_flow_blocks=1), ms.Use(tile_size=64, **settings)
    tiles = len(plan_tiles(16, 500, 64, model.receptive_field))
    found = ms.enhance_pixels(model, pixels, use, CPU, progress=lambda *step: told.append(step))
    total = tiles * passes
    assert tiles > 2 and told == [(done, total) for done in range(1, total + 1)]
    np.testing.assert_array_equal(found.best, ms.enhance_pixels(model, pixels, use, CPU).best)


def test_what_progress_raises_ends_the_work() -> None:
    """And leaves nothing behind: gradients and autocast are as before, and the work can be done
    again."""
    pixels, told = noise_picture(16, 500), list[int]()
    model, use = small_model(num_flow_blocks=1), ms.Use(tile_size=64, samples=1)
    half = Runtime(torch.device("cpu"), torch.bfloat16)

    def cancel(done: int, total: int) -> None:
        told.append(done)
        if done == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        ms.enhance_pixels(model, pixels, use, half, progress=cancel)
    assert told == [1, 2, 3]
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    before = ms.enhance_pixels(model, pixels, use, half).best
    np.testing.assert_array_equal(before, ms.enhance_pixels(model, pixels, use, half).best)


def test_a_bar_by_tiles_for_one_large_picture(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """None for a small one, whatever is drawn of it; that of a folder counts files."""
    for name, width in (("large", 500), ("small", 48)):
        Image.fromarray(noise_picture(16, width)).save(tmp_path / f"{name}.png")
    assert enhance(checkpoint, tmp_path / "large.png", tmp_path / "a.png", "tile_size=64") == 0
    told = capsys.readouterr()
    assert "tile" in told.err and "a.png: 500x16" in told.out
    settings = ("tile_size=64", "samples=3")
    assert enhance(checkpoint, tmp_path / "small.png", tmp_path / "b.png", *settings) == 0
    assert capsys.readouterr().err == ""
    assert enhance(checkpoint, tmp_path, tmp_path / "out", "tile_size=64") == 0
    told = capsys.readouterr()
    assert "file" in told.err and "tile" not in told.err


def test_the_tile_follows_the_memory() -> None:
    model = small_model()
    sides = [ms.tile_side(model, ms.Use(memory_megabytes=size)) for size in (64, 600, 4000)]
    assert sides == sorted(set(sides)) and all(side % 8 == 0 for side in sides)
    assert ms.tile_side(model, ms.Use(tile_size=320)) == 320


@pytest.mark.parametrize("size", [(700, 300), (256, 40), (257, 513)])
def test_thumbnail_in_bands_is_the_thumbnail(size: tuple[int, int]) -> None:
    pixels = noise_picture(*size)
    torch.testing.assert_close(
        whole_thumbnail(pixels, 32),
        resize(to_tensor(pixels)[None], (32, 32)),
        atol=1e-6,
        rtol=0,
    )


def test_noise_is_one_endless_field_of_normal_values() -> None:
    field = latent_noise((1, 2), 0, 0, 150, 140)
    torch.testing.assert_close(
        latent_noise((1, 2), 60, 33, 70, 90), field[:, :, 60:130, 33:123], atol=0, rtol=0
    )
    assert field.shape == (1, 48, 150, 140)
    assert abs(float(field.mean())) < 0.01 and abs(float(field.std()) - 1) < 0.01
    assert not torch.equal(field, latent_noise((1, 3), 0, 0, 150, 140))


class Plain(ms.System):
    """Another system's model: it knows no tiles, and draws alternatives in its own way."""

    def enhance(self, low: Tensor, temperature: float = 0.0) -> Tensor:
        return (3 * low + 0.1 * temperature * torch.randn_like(low)).clamp(0, 1)


def gradients(
    model: ms.ConditionalFlow, losses: Callable[[ms.Sample], dict[str, Tensor]], low: Tensor
) -> Tensor:
    """The gradient of all losses of a batch, as one vector."""
    torch.manual_seed(0)
    model.zero_grad()
    sum(
        losses(ms.Sample(low, low.sqrt(), low, torch.tensor([ms.WHOLE_BOX] * len(low)))).values()
    ).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_the_memory_layout_changes_nothing() -> None:
    """channels_last is the default for its speed alone."""
    plain, other = small_model(), CPU.place(small_model())
    assert next(
        p for p in other.parameters() if p.dim() == 4 and p.shape[1] > 1 and p.shape[2] > 1
    ).is_contiguous(memory_format=torch.channels_last)
    low = to_tensor(noise_picture(48, 64))[None].repeat(2, 1, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(plain.enhance(low), other.enhance(low), atol=1e-5, rtol=0)
    one, two = (gradients(model, model.losses, low) for model in (plain, other))
    torch.testing.assert_close(one, two, atol=1e-4 * float(one.abs().max()), rtol=0)


@pytest.mark.slow
@pytest.mark.skipif(
    not shutil.which("g++") and not shutil.which("clang++"),
    reason="torch.compile needs a C++ compiler",
)
def test_a_compiled_model_gives_the_same() -> None:
    model, low = small_model(), to_tensor(noise_picture(48, 64))[None].repeat(2, 1, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(model.enhance)(low), model.enhance(low), atol=1e-4, rtol=0
        )
    one, two = (
        gradients(model, losses, low) for losses in (model.losses, torch.compile(model.losses))
    )
    torch.testing.assert_close(one, two, atol=1e-3 * float(one.abs().max()), rtol=0)


def test_another_system_sees_the_picture_whole() -> None:
    pixels = dark_picture(target_picture(1, 100, 90))
    use = ms.Use(tile_size=64, samples=2, uncertainty=True)
    found = ms.enhance_pixels(Plain(ms.Config()), pixels, use, CPU)
    np.testing.assert_allclose(found.best / 65535, np.clip(3 * (pixels / 255), 0, 1), atol=1e-4)
    assert len(found.samples) == 2 and (found.samples[0] != found.samples[1]).any()
    assert 0.02 < found.deviation.mean() < 0.15


# alternatives and uncertainty ---------------------------------------------------------------------


def test_deviation_is_that_of_the_samples() -> None:
    model, pixels = small_model(), noise_picture(40, 48)
    found = ms.enhance_pixels(model, pixels, ms.Use(samples=5, uncertainty=True), CPU)
    samples = np.stack(found.samples) / 65535
    expected = np.sqrt(samples.var(axis=0, ddof=1).mean(axis=-1))
    np.testing.assert_allclose(found.deviation, expected, atol=1e-4)
    assert expected.mean() > 1e-3


def test_samples_spread_with_the_temperature_around_the_best() -> None:
    model, pixels = small_model(), noise_picture(40, 48)
    spread = []
    for temperature in (0.2, 1.0):
        found = ms.enhance_pixels(model, pixels, ms.Use(samples=2, temperature=temperature), CPU)
        spread.append(np.abs(found.samples[0].astype(float) - found.best).mean())
        assert (found.samples[0] != found.samples[1]).any()
    assert spread[0] < 0.4 * spread[1]
    plain = ms.enhance_pixels(model, pixels, ms.Use(), CPU)
    assert np.array_equal(plain.best, found.best)  # the best answer is not one of the drawn


def test_samples_and_uncertainty_as_files(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    low = save_picture(tmp_path / "low.png", dark_picture(target_picture(2)))
    assert (
        enhance(
            checkpoint, low, tmp_path / "o" / "a.png", "samples=2", "uncertainty=true", "seed=4"
        )
        == 0
    )
    names = {
        "a.png",
        "a_sample1.png",
        "a_sample2.png",
        "a_uncertainty.png",
        "a_uncertainty_view.png",
    }
    assert files_under(tmp_path / "o") == names
    deviation = skimage.io.imread(tmp_path / "o" / "a_uncertainty.png")
    assert deviation.dtype == np.uint16 and deviation.shape == (40, 48)
    samples = [skimage.io.imread(tmp_path / "o" / f"a_sample{n}.png").astype(float) for n in (1, 2)]
    expected = np.sqrt(((samples[0] - samples[1]) ** 2 / 2).mean(-1)) / 255
    np.testing.assert_allclose(deviation / 65535, expected, atol=0.005)
    assert f"{deviation.mean() / 65535:.4f}" in capsys.readouterr().out
    view = skimage.io.imread(tmp_path / "o" / "a_uncertainty_view.png")
    assert (
        view.shape == (40, 48, 3)
        and view[deviation.argmax() // 48, deviation.argmax() % 48].min() > 200
    )
    before = (tmp_path / "o" / "a_sample1.png").read_bytes()
    assert enhance(checkpoint, low, tmp_path / "o" / "a.png", "samples=2", "seed=4") == 0
    assert (tmp_path / "o" / "a_sample1.png").read_bytes() == before
    assert enhance(checkpoint, low, tmp_path / "o" / "a.png", "samples=2", "seed=5") == 0
    assert (tmp_path / "o" / "a_sample1.png").read_bytes() != before


# exposure -----------------------------------------------------------------------------------------


def test_exposure_is_a_gain_in_linear_light() -> None:
    value = np.linspace(0, 1, 65536)
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    for stops in (-1.5, 0.0, 0.5):
        brighter = np.minimum(linear * 2**stops, 1)
        expected = np.where(
            brighter <= 0.0031308, 12.92 * brighter, 1.055 * brighter ** (1 / 2.4) - 0.055
        )
        np.testing.assert_allclose(exposed(stops), expected, atol=1e-9)


@pytest.mark.parametrize("mean", [0.1, 0.4, 0.8])
def test_stops_to_mean_reach_the_mean(mean: float) -> None:
    pixels = noise_picture(60, 50, np.uint16) // 2
    assert exposed(stops_to_mean(pixels, mean))[pixels].mean() == pytest.approx(mean, abs=1e-4)


def test_exposure_and_reference_reach_the_file(checkpoint: Path, tmp_path: Path) -> None:
    low = save_picture(tmp_path / "low.png", dark_picture(target_picture(2)))
    liked = save_picture(tmp_path / "liked.jpg", np.full((20, 30, 3), 90, np.uint8))
    found = {}
    for name, setting in (
        ("plain", "exposure=0"),
        ("bright", "exposure=+0.5"),
        ("dark", "exposure=-1"),
        ("like", f"reference={liked}"),
    ):
        assert enhance(checkpoint, low, tmp_path / f"{name}.png", setting) == 0
        found[name] = skimage.io.imread(tmp_path / f"{name}.png").astype(float)
    assert found["dark"].mean() < found["plain"].mean() < found["bright"].mean()
    gain = srgb_to_linear(found["dark"] / 255).mean() / srgb_to_linear(found["plain"] / 255).mean()
    assert gain == pytest.approx(0.5, abs=0.02)
    assert found["like"].mean() == pytest.approx(90, abs=0.6)
    assert enhance(checkpoint, low, tmp_path / "x.png", "reference=nowhere.png") == 2


# what a file holds --------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif", "jpg"])
def test_orientation_is_applied_once_and_reset(
    checkpoint: Path, tmp_path: Path, orientation: int, suffix: str
) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    exif[0x010F] = "Maker"
    source = save_picture(tmp_path / f"low.{suffix}", target_picture(3, 24, 40), exif=exif)
    picture = read_picture(source)
    assert np.array_equal(picture.pixels, read_image(source))  # Pillow is the referee there
    assert enhance(checkpoint, source, tmp_path / f"out.{suffix}") == 0
    with Image.open(tmp_path / f"out.{suffix}") as out:
        assert out.size == picture.pixels.shape[1::-1]
        assert out.getexif().get(ORIENTATION, 1) == 1 and out.getexif()[0x010F] == "Maker"


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
def test_colour_profile_and_exif_are_kept(checkpoint: Path, tmp_path: Path, suffix: str) -> None:
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x0132] = "2026:01:02 03:04:05"
    source = save_picture(tmp_path / f"low.{suffix}", target_picture(3), icc_profile=icc, exif=exif)
    assert enhance(checkpoint, source, tmp_path / f"out.{suffix}") == 0
    with Image.open(tmp_path / f"out.{suffix}") as out:
        assert out.info["icc_profile"] == icc
        assert out.getexif()[0x0132] == "2026:01:02 03:04:05"


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_16_bits_in_give_16_bits_out(
    checkpoint: Path, tmp_path: Path, suffix: str, channels: int
) -> None:
    pixels = np.random.default_rng(0).integers(0, 65536, (30, 36, channels)).astype(np.uint16)
    source = tmp_path / f"low.{suffix}"
    if suffix == "tif":
        photometric = "rgb" if channels > 1 else "minisblack"
        tifffile.imwrite(
            source,
            pixels.squeeze(),
            photometric=photometric,
            extrasamples=["unassalpha"] if channels == 4 else None,
        )
    else:
        source.write_bytes(encode_png16(pixels.squeeze(), Picture(pixels)))
    picture = read_picture(source)
    assert picture.pixels.dtype == np.uint16
    assert np.array_equal(
        picture.pixels, np.repeat(pixels, 3, axis=2) if channels == 1 else pixels[..., :3]
    )
    assert (picture.note != "") == (channels == 1)
    assert enhance(checkpoint, source, tmp_path / f"out.{suffix}") == 0
    out = read_picture(tmp_path / f"out.{suffix}")
    # the lower byte is alive
    assert out.pixels.dtype == np.uint16 and len(np.unique(out.pixels % 257)) > 50
    assert (out.alpha is not None) == (channels == 4)
    if channels == 4:
        assert np.array_equal(out.alpha, pixels[..., 3])
    assert enhance(checkpoint, source, tmp_path / "out.jpg") == 0
    assert read_picture(tmp_path / "out.jpg").pixels.dtype == np.uint8


@pytest.mark.parametrize("shape", [(9, 7), (9, 7, 3), (9, 7, 4)])
def test_16_bit_png_is_read_by_others(shape: tuple[int, ...]) -> None:
    """torchvision reads the values, Pillow the profile and EXIF."""
    from torchvision.io import decode_image

    pixels = np.random.default_rng(1).integers(0, 65536, shape).astype(np.uint16)
    exif = Image.Exif()
    exif[0x010F] = "Maker"
    data = encode_png16(pixels, Picture(pixels, icc=b"profile" * 9, exif=exif.tobytes()))
    read = (
        decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8)).permute(1, 2, 0).numpy()
    )
    assert np.array_equal(read.reshape(shape), pixels)
    with Image.open(io.BytesIO(data)) as picture:
        picture.load()
        assert (
            picture.info["icc_profile"] == b"profile" * 9 and picture.getexif()[0x010F] == "Maker"
        )


@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
def test_alpha_passes_through(checkpoint: Path, tmp_path: Path, suffix: str) -> None:
    alpha = np.arange(40 * 48, dtype=np.uint8).reshape(40, 48)
    source = tmp_path / f"low.{suffix}"
    Image.fromarray(np.dstack([target_picture(1), alpha])).save(
        source, **({"lossless": True} if suffix == "webp" else {})
    )
    assert enhance(checkpoint, source, tmp_path / f"out.{suffix}") == 0
    with Image.open(tmp_path / f"out.{suffix}") as out:
        assert out.mode == "RGBA" and np.array_equal(np.asarray(out)[..., 3], alpha)


@pytest.mark.parametrize(
    ("mode", "words"), [("L", "grey"), ("1", "grey"), ("LA", "grey"), ("CMYK", "CMYK"), ("P", "")]
)
def test_other_colour_modes_are_converted_and_noted(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str, words: str
) -> None:
    source = tmp_path / ("low.tif" if mode == "CMYK" else "low.png")
    Image.fromarray(target_picture(1)).convert(mode).save(source)
    assert enhance(checkpoint, source, tmp_path / "out.png") == 0
    printed = capsys.readouterr().out
    assert f"{source}: " in printed and words in printed if words else printed.count("\n") == 2
    with Image.open(tmp_path / "out.png") as out:
        assert out.mode == ("RGBA" if mode == "LA" else "RGB") and out.size == (48, 40)


def test_quality_is_heard(checkpoint: Path, tmp_path: Path) -> None:
    low = save_picture(tmp_path / "low.png", noise_picture(64, 64))
    for quality in (20, 95):
        assert enhance(checkpoint, low, tmp_path / f"{quality}.jpg", f"quality={quality}") == 0
    assert (tmp_path / "20.jpg").stat().st_size < 0.6 * (tmp_path / "95.jpg").stat().st_size


@pytest.mark.parametrize("kind", ["animation", "tall", "bomb", "float", "lzw"])
def test_pictures_that_are_refused_in_one_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    path = tmp_path / "in.tif"
    frame = Image.fromarray(target_picture(1))
    if kind == "animation":
        frame.save(path, save_all=True, append_images=[frame, frame])
    elif kind == "tall":
        save_picture(path, np.zeros((400, 1, 3), np.uint8))
    elif kind == "bomb":
        path = tmp_path / "in.png"
        data = bytearray(encode_png16(np.zeros((16, 16), np.uint16), Picture(np.zeros(0))))
        data[16:24] = (60000).to_bytes(4, "big") * 2
        data[29:33] = __import__("zlib").crc32(bytes(data[12:29])).to_bytes(4, "big")
        path.write_bytes(data)
    elif kind == "float":
        Image.fromarray(np.zeros((20, 20), np.float32)).save(path)
    elif kind == "lzw":
        path.write_bytes(b"II*\0\x08\0\0\0\0\0")
    before = files_under(tmp_path)
    assert_one_line_error(
        enhance(checkpoint, path, tmp_path / "out.png"), capsys.readouterr().err, str(path)
    )
    assert files_under(tmp_path) == before


# folders ------------------------------------------------------------------------------------------


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """Three good pictures at two depths, a broken one, and a file that is no picture."""
    folder = tmp_path / "in"
    for place, name in enumerate(("a.png", "deep/b.jpg", "deep/er/c.PNG")):
        save_picture(folder / name, dark_picture(target_picture(place, 32 + place, 40)))
    (folder / "deep" / "broken.png").write_bytes((folder / "a.png").read_bytes()[:500])
    (folder / "notes.txt").write_text("no picture")
    return folder


def test_a_folder_is_mirrored_and_a_bad_file_does_not_stop_it(
    checkpoint: Path, album: Path, tmp_path: Path
) -> None:
    files = ("--checkpoint", checkpoint, "--input", album, "--output", tmp_path / "out")
    done = run_script("--mode", "enhance", *files, cwd=tmp_path)
    assert done.returncode == 1
    assert "broken.png" in done.stderr and "Traceback" not in done.stderr
    assert "file/s" in done.stderr  # the bar
    assert "3 pictures enhanced, 1 failed" in done.stdout
    assert files_under(tmp_path / "out") == {
        "a.png",
        "deep",
        "deep/b.jpg",
        "deep/er",
        "deep/er/c.PNG",
        "enhance.csv",
    }
    rows = rows_of(tmp_path / "out")
    assert set(rows) == {"a.png", "b.jpg", "c.PNG", "broken.png"}
    broken = rows.pop("broken.png")
    assert broken["note"].startswith("failed: ") and broken["output"] == broken["seconds"] == ""
    for row in rows.values():
        assert tuple(row) == ENHANCE_COLUMNS
        assert Path(row["output"]).exists() and float(row["seconds"]) > 0
        with Image.open(row["file"]) as low, Image.open(row["output"]) as high:
            assert low.size == high.size == (int(row["width"]), int(row["height"]))
            assert float(row["brightness_before"]) == pytest.approx(
                np.asarray(low).mean() / 255, abs=1e-4
            )
            assert float(row["brightness_after"]) == pytest.approx(
                np.asarray(high).mean() / 255, abs=0.01
            )


def test_what_is_done_is_skipped_unless_told_otherwise(
    checkpoint: Path, album: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (album / "deep" / "broken.png").unlink()
    out = tmp_path / "out"
    assert enhance(checkpoint, album, out) == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.*")}
    first = rows_of(out)
    (out / "a.png").unlink()
    capsys.readouterr()
    assert enhance(checkpoint, album, out) == 0
    assert "3 pictures: 1 new, 2 already done" in capsys.readouterr().out
    assert {path.name for path in before if path.stat().st_mtime_ns != before[path]} == {
        "a.png",
        "enhance.csv",
        ".enhance.jsonl",
    }
    again = rows_of(out)  # the rows of this run
    assert list(again) == list(first) and float(again["a.png"]["seconds"]) > 0
    for name in ("b.jpg", "c.PNG"):
        assert again[name]["note"] == "made by an earlier run" and again[name]["seconds"] == ""
        assert again[name]["output"] == first[name]["output"]
    assert enhance(checkpoint, album, out, "overwrite=true", "uncertainty=true") == 0
    assert all(path.stat().st_mtime_ns != before[path] for path in before)
    assert all(float(row["deviation"]) > 0 for row in rows_of(out).values())


def linear(levels: np.ndarray) -> np.ndarray:
    """Linear light of 8-bit levels, IEC 61966-2-1, in double precision."""
    value = levels / 255.0
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def test_strength_mixes_light(checkpoint: Path, tmp_path: Path) -> None:
    low = dark_picture(target_picture(2, 70, 90))
    source = save_picture(tmp_path / "low.png", low)
    made = {}
    for strength in ("0", "0.25", "1"):
        target = tmp_path / f"{strength}.png"
        assert enhance(checkpoint, source, target, f"strength={strength}", "samples=1") == 0
        sample = read_image(target.with_stem(f"{strength}_sample1"))
        made[strength] = read_image(target), sample
    assert np.array_equal(made["0"][0], low) and np.array_equal(made["0"][1], low)
    assert enhance(checkpoint, source, tmp_path / "plain.png") == 0
    assert np.array_equal(made["1"][0], read_image(tmp_path / "plain.png"))
    for full, part in zip(made["1"], made["0.25"], strict=True):
        mixed = 0.75 * linear(low) + 0.25 * linear(full)
        assert np.abs(linear(part + 0.5) - linear(part - 0.5)).max() < 0.02
        assert (mixed >= linear(part - 0.52) - 1e-6).all()
        assert (mixed <= linear(part + 0.52) + 1e-6).all()


def test_denoise_calms_what_is_flat_and_keeps_edges() -> None:
    """At 0 it is no work at all; a picture of several bands is as one in one piece."""
    rng = np.random.default_rng(0)
    step = np.where(np.arange(96) < 48, 60.0, 160.0)[None, :, None]
    noisy = step + rng.normal(0, 1, (600, 96, 3))
    levels = np.rint(noisy * 257).astype(np.uint16)
    assert calmed(levels, 0.0) is levels
    half, full = calmed(levels, 0.5) / 257, calmed(levels, 1.0) / 257
    flat = (slice(None), slice(8, 40))
    assert full[flat].std() < 0.5 * noisy[flat].std()
    assert full[flat].std() < half[flat].std() < 0.9 * noisy[flat].std()
    edge = full[:, 48].mean() - full[:, 47].mean()
    assert edge == pytest.approx(100, abs=1)
    part = calmed(levels[200:350], 1.0)[30:120].astype(int)  # a band ends at row 256 of the whole
    assert np.abs(part - calmed(levels, 1.0)[230:320]).max() <= 2


def test_denoise_reaches_best_and_samples_whatever_the_tiles(
    checkpoint: Path, tmp_path: Path
) -> None:
    pixels, model = noise_picture(48, 300), small_model(num_flow_blocks=1)
    plain = ms.enhance_pixels(model, pixels, ms.Use(samples=1), CPU)
    calm = [
        ms.enhance_pixels(model, pixels, ms.Use(samples=1, denoise=0.7, tile_size=s), CPU)
        for s in (64, 1024)
    ]
    assert np.array_equal(calm[1].best, calmed(plain.best, 0.7))
    assert np.array_equal(calm[1].samples[0], calmed(plain.samples[0], 0.7))
    assert not np.array_equal(calm[1].best, plain.best)
    assert np.abs(calm[0].best.astype(int) - calm[1].best).max() <= 66  # a quarter of a level
    save_picture(tmp_path / "in" / "a.png", pixels[:, :64])
    for settings in ((), ("denoise=1",)):  # the journal knows the key
        assert enhance(checkpoint, tmp_path / "in", tmp_path / "out", *settings) == 0
        assert rows_of(tmp_path / "out")["a.png"]["note"] == ""


def test_strength_mixes_pictures_of_two_depths() -> None:
    before = np.full((130, 3, 3), 30000, np.uint16)
    after = np.full((130, 3, 3), 200, np.uint8)
    assert np.array_equal(blend(before, after, 1.0), after)
    assert int(blend(before, after, 0.0).max()) == round(30000 / 257)
    middle = blend(before, after, 0.5)
    assert middle.dtype == np.uint8 and middle.shape == after.shape
    expected = (linear(np.array(30000 / 257)) + linear(np.array(200))) / 2
    assert float(linear(middle)[0, 0, 0]) == pytest.approx(float(expected), abs=0.005)


@pytest.mark.parametrize("changed", ["weights", "settings", "input", "nothing", "foreign"])
def test_what_is_done_hangs_on_input_weights_and_settings(
    checkpoint: Path,
    album: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changed: str,
) -> None:
    """Who compares two models must not compare one with itself."""
    (album / "deep" / "broken.png").unlink()
    out = tmp_path / "out"
    assert enhance(checkpoint, album, out) == 0
    before = {path: path.read_bytes() for path in out.rglob("*.png")}
    sets, expected = [], "3 pictures: 3 already done"
    if changed == "weights":
        content = load_checkpoint(str(checkpoint))
        content["model"]["log_sigma"] += 1.0
        checkpoint = tmp_path / "other.pth"
        save_checkpoint(checkpoint, content)
        expected = "3 pictures: 3 again, for other weights or settings"
    elif changed == "settings":
        sets, expected = ["exposure=1"], "3 pictures: 3 again, for other weights or settings"
    elif changed == "input":
        save_picture(album / "a.png", dark_picture(target_picture(9)))
        expected = "3 pictures: 2 already done, 1 again, for a changed input"
    elif changed == "foreign":
        (out / ".enhance.jsonl").write_text('["b.jpg", 1')  # half a line of a killed run
        expected = "3 pictures: 3 kept, as they were not made here"
    capsys.readouterr()
    assert enhance(checkpoint, album, out, *sets) == 0
    assert expected in capsys.readouterr().out
    kept = [path.read_bytes() == content for path, content in before.items()]
    assert all(kept) == (changed in ("weights", "nothing", "foreign"))  # sigma moves no mean
    capsys.readouterr()
    assert enhance(checkpoint, album, out, *sets) == 0
    again = "3 already done" if changed != "foreign" else "3 kept"
    assert again in capsys.readouterr().out


def test_pictures_of_a_killed_run_are_listed_by_the_next(
    checkpoint: Path, album: Path, tmp_path: Path
) -> None:
    (album / "deep" / "broken.png").unlink()
    out = tmp_path / "out"
    assert enhance(checkpoint, album, out) == 0
    first = rows_of(out)
    (out / "enhance.csv").unlink()
    (out / "a.png").unlink()
    assert enhance(checkpoint, album, out) == 0
    again = rows_of(out)
    assert again.keys() == first.keys() and again["a.png"]["note"] == first["a.png"]["note"]
    assert {row["note"] for name, row in again.items() if name != "a.png"} == {
        "made by an earlier run"
    }


@pytest.mark.parametrize(
    "problem", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_a_picture_too_large_for_the_memory_does_not_stop_the_others(
    checkpoint: Path,
    album: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    problem: Exception,
) -> None:
    (album / "deep" / "broken.png").unlink()
    real = ms.enhance_pixels

    def scarce(model: ms.System, pixels: np.ndarray, *rest: Any, **named: Any) -> ms.Enhanced:
        if pixels.shape == read_image(album / "a.png").shape:
            raise problem
        return real(model, pixels, *rest, **named)

    monkeypatch.setattr(ms, "enhance_pixels", scarce)
    assert enhance(checkpoint, album, tmp_path / "out") == 1
    rows = rows_of(tmp_path / "out")
    assert "not enough memory" in rows["a.png"]["note"] and len(rows) == 3
    assert sum("failed" in row["note"] for row in rows.values()) == 1


def test_patterns_and_single_files_into_a_folder(
    checkpoint: Path, album: Path, tmp_path: Path
) -> None:
    # the broken one is among them
    assert enhance(checkpoint, f"{album}/**/*.[pP][nN][gG]", tmp_path / "one") == 1
    assert files_under(tmp_path / "one") == {
        "a.png",
        "deep",
        "deep/er",
        "deep/er/c.PNG",
        "enhance.csv",
    }
    assert enhance(checkpoint, album / "a.png", f"{tmp_path}/two/") == 0
    assert files_under(tmp_path / "two") == {"a.png"}
    odd = save_picture(tmp_path / "odd[1].png", dark_picture(target_picture(1)))
    # a name with magic characters is still a name
    assert enhance(checkpoint, odd, tmp_path / "three.png") == 0


def test_results_inside_the_input_folder_are_not_enhanced_again(
    checkpoint: Path, album: Path
) -> None:
    (album / "deep" / "broken.png").unlink()
    for _ in range(2):
        assert enhance(checkpoint, album, album / "out") == 0
        assert set(rows_of(album / "out")) == {"a.png", "b.jpg", "c.PNG"}
    assert not (album / "out" / "out").exists()


@pytest.mark.parametrize("kind", ["empty", "itself", "file", "nothing", "clips"])
def test_folders_that_are_refused(
    checkpoint: Path, album: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "films").mkdir()
    (tmp_path / "films" / "walk.mp4").write_bytes(b"film")
    source, target = {
        "empty": (tmp_path / "empty", tmp_path / "out"),
        "itself": (album, album),
        "file": (album, tmp_path / "out.png"),
        "nothing": (f"{album}/*.gif", tmp_path / "out"),
        "clips": (tmp_path / "films", tmp_path / "out"),
    }[kind]
    before = files_under(tmp_path)
    status = enhance(checkpoint, source, target)
    words = {"itself": ["itself"], "clips": [str(source), "tools/enhance_video.py"]}
    assert_one_line_error(status, capsys.readouterr().err, *words.get(kind, [str(source)]))
    assert files_under(tmp_path) == before


# what is not for this mode, and what is scored ----------------------------------------------------


def test_clips_among_the_pictures_are_counted_and_their_command_named(
    checkpoint: Path, album: Path, tmp_path: Path
) -> None:
    """By both commands, each in its last line."""
    (album / "deep" / "broken.png").unlink()
    for name in ("walk.mp4", "deep/RUN.MOV", ".hidden.mkv"):
        (album / name).write_bytes(b"film")
    tail = [*("--checkpoint", str(checkpoint)), *("--set", "device=cpu")]
    words = ["--mode", "enhance", "--input", album, "--output", "out", *tail]
    done = run_script(*words, cwd=tmp_path)
    expected = "out: 3 pictures enhanced, 0 failed; enhance.csv lists them; "
    expected += "2 clips left: tools/enhance_video.py enhances them"
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == expected
    assert set(rows_of(tmp_path / "out")) == {"a.png", "b.jpg", "c.PNG"}
    done = run_script(*words[:3], f"{album}/*.png", *words[4:], cwd=tmp_path)
    assert done.returncode == 0 and "left" not in done.stdout
    pytest.importorskip("av", reason="the optional package av is not installed")
    done = run_tool("enhance_video.py", *words[2:], cwd=tmp_path)
    expected = "out: 0 clips enhanced, 2 failed; enhance.csv lists them; "
    expected += "3 pictures left: model_script.py --mode enhance enhances them"
    assert done.returncode == 1 and done.stdout.splitlines()[-1] == expected


def test_a_clip_is_refused_and_its_command_named(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "walk.mp4").write_bytes(b"film")
    status = enhance(checkpoint, tmp_path / "walk.mp4", tmp_path / "out.mp4")
    words = ("walk.mp4", "tools/enhance_video.py")
    assert_one_line_error(status, capsys.readouterr().err, *words)
    assert (ROOT / "tools" / "enhance_video.py").is_file()
    assert files_under(tmp_path) == {"walk.mp4"}


@pytest.mark.parametrize("use", [{}, {"tile_size": 64}, {"temperature": 0.7}])
def test_what_is_scored_is_what_the_user_gets(
    checkpoint: Path, tmp_path: Path, use: dict[str, Any]
) -> None:
    """Evaluation writes the very levels that --mode enhance writes for the same picture."""
    high = target_picture(2, 150, 330)
    low = save_picture(tmp_path / "low" / "a.png", dark_picture(high))
    save_picture(tmp_path / "high" / "a.png", high)
    folders = {f"eval_{kind}_dir": tmp_path / kind for kind in ("low", "high")}
    given = folders | {"results_dir": tmp_path / "results", "eval_size": "native"} | use
    settings = [part for key, value in given.items() for part in ("--set", f"{key}={value}")]
    command = ["--mode", "evaluate", "--checkpoint", str(checkpoint), *settings]
    assert ms.main(command) == 0
    scored = next((tmp_path / "results").glob("eval_*/images/a.png"))
    own = [f"{key}={value}" for key, value in use.items()]
    assert enhance(checkpoint, low, tmp_path / "out.png", *own) == 0
    assert np.array_equal(read_image(scored), read_image(tmp_path / "out.png"))
