"""The conditional flow: every layer is a bijection with the log-determinant of its Jacobian."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from conftest import randomise
from torch import Tensor, nn

import model_script as ms
from support.tiles import pad_to_multiple

Case = tuple[nn.Module, Tensor, object]


def small_config(**settings: object) -> ms.Config:
    return ms.Config(
        **{"flow_channels": 16, "num_flow_blocks": 2, "thumbnail_size": 32, **settings}
    )


def small_model(
    dtype: torch.dtype = torch.float32, scale: float = 0.05, **settings: object
) -> ms.ConditionalFlow:
    torch.manual_seed(3)
    model = randomise(ms.ConditionalFlow(small_config(**settings)), scale)
    return model.to(dtype).eval()


def pixels(*shape: int, seed: int = 0) -> Tensor:
    """Uniform in [0, 1], float64."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def logit_case() -> Case:
    y = pixels(2, 3, 4, 4)
    y[0, 0, 0, :2] = torch.tensor([0.0, 1.0], dtype=y.dtype)
    return ms.LogitMap(), y, None


def squeeze_case() -> Case:
    return ms.Squeeze(), normals(2, 3, 6, 4), None


def conv_case() -> Case:
    return randomise(ms.InvertibleConv(12), 0.2), normals(2, 12, 4, 3), None


def coupling_case(first: bool) -> Case:
    torch.manual_seed(1)
    return (
        randomise(ms.Coupling(12, 5, 16, first), 0.3),
        normals(2, 12, 4, 4),
        normals(2, 5, 4, 4, seed=1),
    )


def flow_case(blocks: int = 2) -> Case:
    torch.manual_seed(2)
    condition = (normals(2, 4, 4, 4, seed=1), normals(2, 6, 2, 2, seed=2))
    return randomise(ms.Flow(blocks, 16, 4, 6), 0.1), pixels(2, 3, 8, 8), condition


CASES: dict[str, Callable[[], Case]] = {
    "logit": logit_case,
    "squeeze": squeeze_case,
    "conv": conv_case,
    "coupling_second": lambda: coupling_case(False),
    "coupling_first": lambda: coupling_case(True),
    "flow_1": lambda: flow_case(1),
    "flow_3": lambda: flow_case(3),
}


def cast(value: object, dtype: torch.dtype) -> object:
    if isinstance(value, Tensor):
        return value.to(dtype)
    return tuple(cast(part, dtype) for part in value) if isinstance(value, tuple) else value


def one(value: object, item: int) -> object:
    """A batch's condition cut down to one item."""
    if isinstance(value, Tensor):
        return value[item : item + 1]
    return tuple(one(part, item) for part in value) if isinstance(value, tuple) else value


def jacobian_log_det(layer: nn.Module, x: Tensor, condition: object) -> float:
    """log |det J| of layer.forward at one item (1, ...), by automatic differentiation."""
    matrix = torch.autograd.functional.jacobian(
        lambda v: layer(v.reshape(x.shape), condition)[0].flatten(), x.flatten()
    )
    assert matrix.shape == (x.numel(), x.numel())
    return float(torch.linalg.slogdet(matrix).logabsdet)


def check_bijection(layer: nn.Module, x: Tensor, condition: object, tolerance: float) -> None:
    """inverse(forward(x)) = x and forward(inverse(y)) = y; a log-determinant for each item."""
    with torch.no_grad():
        y, log_det = layer(x, condition)
        back = layer.inverse(y, condition)
        again, _ = layer(back, condition)
    assert log_det.shape == (len(x),)
    assert (back - x).abs().max() < tolerance
    assert (again - y).abs().max() < tolerance


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
def test_layer_and_inverse_undo_each_other(name: str, dtype: torch.dtype, tolerance: float) -> None:
    layer, x, condition = CASES[name]()
    check_bijection(layer.to(dtype), cast(x, dtype), cast(condition, dtype), tolerance)


@pytest.mark.parametrize("name", [name for name in CASES if name != "squeeze"])
def test_randomised_layers_are_no_identities(name: str) -> None:
    """Guards the tests around it: an identity would pass them all."""
    layer, x, condition = CASES[name]()
    y, log_det = layer.double()(x, condition)
    assert (y.flatten(1) - x.flatten(1)).abs().mean() > 0.02
    assert log_det.abs().min() > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_log_det_is_that_of_the_jacobian_for_each_item(name: str) -> None:
    layer, x, condition = CASES[name]()
    layer.double()
    log_det = layer(x, condition)[1].tolist()
    expected = [jacobian_log_det(layer, x[i : i + 1], one(condition, i)) for i in range(len(x))]
    assert log_det == pytest.approx(expected, abs=1e-8)
    if name not in ("squeeze", "conv"):  # the data-independent ones
        assert abs(expected[0] - expected[1]) > 1e-3


def test_flow_latent_has_as_many_numbers_as_the_picture() -> None:
    flow, y, condition = flow_case()
    assert flow.double()(y, condition)[0].shape == (2, 48, 2, 2)


def test_two_blocks_change_every_channel() -> None:
    """With the 1x1 convolutions left at the identity, the alternating couplings alone must reach
    every latent value."""
    flow, y, condition = flow_case(2)
    flow.double()
    with torch.no_grad():
        for layer in flow.layers:
            if isinstance(layer, ms.InvertibleConv):
                for parameter in layer.parameters():
                    parameter.zero_()
        plain = F.pixel_unshuffle(F.pixel_unshuffle(ms.LogitMap()(y)[0], 2), 2)
        assert ((flow(y, condition)[0] - plain).abs() > 1e-6).all()


@pytest.mark.parametrize("first", [False, True])
def test_log_scale_is_bounded_for_huge_weights(first: bool) -> None:
    layer, x, condition = coupling_case(first)
    layer = randomise(layer, 1e3).double()
    kept, _ = layer._split(x)
    scale, _ = layer.scale_and_shift(kept, condition)
    assert 0.499 < scale.abs().max() <= 0.5


def test_condition_reaches_both_levels() -> None:
    flow, y, condition = flow_case()
    flow.double()
    plain = flow(y, condition)[0]
    for level in (0, 1):
        changed = tuple(part + (place == level) for place, part in enumerate(condition))
        assert (flow(y, changed)[0] - plain).abs().max() > 1e-3


def test_invertible_conv_stays_exact_under_autocast() -> None:
    layer, x, _ = conv_case()
    with torch.autocast("cpu", torch.bfloat16):
        check_bijection(layer, x.float(), None, 1e-4)


@pytest.mark.parametrize(("mean", "sigma"), [(0.0, 1.0), (0.5, 0.01), (-2.0, 7.0)])
def test_gaussian_log_prob_is_that_of_scipy(mean: float, sigma: float) -> None:
    z = mean + sigma * normals(3, 2, 4, 4)
    ours = ms.gaussian_log_prob(
        z, torch.full_like(z, mean), torch.tensor(math.log(sigma), dtype=z.dtype)
    )
    expected = scipy.stats.norm.logpdf(z.numpy(), mean, sigma).reshape(3, -1).sum(1)
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-12)


def test_bits_per_dim_of_a_gaussian_is_its_entropy_plus_eight() -> None:
    """A density of [0, 1] values costs its differential entropy in bits and 8 more for 256
    levels."""
    sigma = 0.05
    z = 0.5 + sigma * normals(4, 50_000)
    log_prob = ms.gaussian_log_prob(
        z, torch.full_like(z, 0.5), torch.tensor(math.log(sigma), dtype=z.dtype)
    )
    bits = ms.to_bits_per_dim(log_prob, z.shape[1])
    expected = float(scipy.stats.norm(0.5, sigma).entropy()) / math.log(2) + 8
    assert bits.shape == (4,)
    assert bits.tolist() == pytest.approx([expected] * 4, abs=0.02)


def test_uniform_density_costs_eight_bits() -> None:
    assert ms.to_bits_per_dim(torch.zeros(2), 192).tolist() == [8.0, 8.0]


def test_discrete_gaussian_costs_what_its_probabilities_say() -> None:
    """Dequantisation bounds the discrete code length from above, and tightly for a density that is
    flat within a level."""
    levels = torch.arange(256, dtype=torch.float64)
    mass = torch.from_numpy(scipy.stats.norm.pdf(levels.numpy(), 128, 30))
    mass /= mass.sum()
    drawn = torch.multinomial(
        mass, 100_000, replacement=True, generator=torch.Generator().manual_seed(0)
    )
    y = ms.dequantise(drawn.double() / 255, pixels(len(drawn), seed=4))[None]
    log_prob = ms.gaussian_log_prob(
        y, torch.full_like(y, 128.5 / 256), torch.tensor(math.log(30 / 256), dtype=y.dtype)
    )
    assert float(ms.to_bits_per_dim(log_prob, len(drawn))) == pytest.approx(
        float(-mass[drawn].log2().mean()), abs=2e-3
    )


@pytest.mark.parametrize("noise", [0.0, 0.5, 1 - 1e-9])
def test_dequantise_round_trip(noise: float) -> None:
    levels = torch.arange(256, dtype=torch.float64) / 255
    y = ms.dequantise(levels, torch.full_like(levels, noise))
    assert y.min() >= 0 and y.max() < 1
    # each level keeps to its own bin
    assert torch.equal((y * 256).floor(), torch.arange(256, dtype=torch.float64))
    back = ms.requantise(y) * 255
    assert (back - levels * 255).abs().max() <= 0.5 + 1e-9
    if noise == 0.5:
        torch.testing.assert_close(back, levels * 255, atol=1e-9, rtol=0)


@pytest.mark.parametrize("size", [(16, 16), (17, 33), (50, 31)])
def test_enhance_keeps_size_and_range(size: tuple[int, int]) -> None:
    model = small_model()
    with torch.no_grad():
        enhanced = model.enhance(pixels(2, 3, *size).float(), 0.5)
    assert enhanced.shape == (2, 3, *size)
    assert enhanced.min() >= 0 and enhanced.max() <= 1
    assert enhanced.std() > 0.01


def test_fresh_model_answers_middle_grey() -> None:
    """Everything between the picture and the prior mean starts as the identity, and the mean at 0,
    the logit of 1/2."""
    model = ms.ConditionalFlow(small_config()).eval()
    with torch.no_grad():
        enhanced = model.enhance(pixels(1, 3, 16, 24).float())
    torch.testing.assert_close(enhanced, torch.full_like(enhanced, 0.5), atol=1e-5, rtol=0)


def test_decoding_the_encoded_picture_gives_it_back() -> None:
    model = small_model()
    low, high = (pixels(1, 3, 24, 16, seed=s).float().mul(255).round() / 255 for s in (1, 2))
    with torch.no_grad():
        condition = model.condition(low)
        _, standardised = model.code_length(high, condition)
        back = model.decode(condition, standardised)
    assert (back - high).abs().max() * 255 <= 0.5 + 1e-2
    assert torch.equal(
        (back * 255 + torch.where(back > high, -0.02, 0.02)).round(), (high * 255).round()
    )


def test_likelihood_is_the_change_of_variables_by_hand() -> None:
    """Log density of the latent by SciPy plus the log-determinant of a 192 x 192 Jacobian, for each
    of two pictures."""
    model = small_model(torch.float64)
    low, high = pixels(2, 3, 8, 8, seed=1), pixels(2, 3, 8, 8, seed=2)
    torch.manual_seed(5)
    with torch.no_grad():
        bits, standardised = model.bits_per_dim(high, low)
        torch.manual_seed(5)
        y = (high * 255 + torch.rand_like(high[:1])) / 256  # one draw for the batch
        condition = model.condition(low)
        latent = model.flow(y, condition.features)[0]
    sigma = float(model.log_sigma.detach().exp())
    for item in range(2):
        features = tuple(part[item : item + 1] for part in condition.features)
        log_density = scipy.stats.norm.logpdf(
            latent[item].numpy(), condition.prior_mean[item].numpy(), sigma
        ).sum()
        log_density += jacobian_log_det(model.flow, y[item : item + 1], features)
        assert float(bits[item]) == pytest.approx(-log_density / (192 * math.log(2)) + 8, abs=1e-8)
    torch.testing.assert_close(standardised, (latent - condition.prior_mean) / sigma)


def test_likelihood_of_odd_sizes_never_counts_padding() -> None:
    """What lies beyond the last multiple of 4 may be anything."""
    model = small_model(torch.float64)
    low, high = pixels(1, 3, 21, 23, seed=1), pixels(1, 3, 21, 23, seed=2)
    other = high.clone()
    other[..., 20:, :] = 0
    other[..., 20:] = 0
    bits, latents = [], []
    with torch.no_grad():
        for picture in (high, other):
            torch.manual_seed(0)
            value, latent = model.bits_per_dim(picture, low)
            bits.append(float(value))
            latents.append(latent)
    assert latents[0].shape == (1, 48, 5, 5)
    assert bits[0] == bits[1]


def test_temperature_zero_is_deterministic_and_above_zero_is_not() -> None:
    model = small_model()
    low = pixels(1, 3, 16, 16).float()
    pictures = []
    with torch.no_grad():
        for temperature, seed in ((0.0, 1), (0.0, 2), (0.7, 1), (0.7, 1), (0.7, 2)):
            torch.manual_seed(seed)
            pictures.append(model.enhance(low, temperature))
    assert torch.equal(pictures[0], pictures[1])
    assert torch.equal(pictures[2], pictures[3])
    assert (pictures[2] - pictures[0]).abs().max() > 0.01
    assert (pictures[2] - pictures[4]).abs().max() > 0.01


def test_temperature_is_in_prior_deviations(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    latents: list[Tensor] = []

    def inverse(self: ms.Flow, z: Tensor, condition: Sequence[Tensor]) -> Tensor:
        latents.append(z)
        return z.new_zeros(1, 3, 64, 64)

    monkeypatch.setattr(ms.Flow, "inverse", inverse)
    with torch.no_grad():
        model.enhance(pixels(1, 3, 64, 64).float())
        model.enhance(pixels(1, 3, 64, 64).float(), 0.8)
    spread = float((latents[1] - latents[0]).std() / model.log_sigma.detach().exp())
    assert spread == pytest.approx(0.8, rel=0.05)


# top, left, bottom, right of a 32 x 48 picture
BOXES = [(8, 16, 24, 40), (0, 0, 16, 8), (24, 40, 32, 48)]


def box_of(top: int, left: int, bottom: int, right: int, height: int, width: int) -> Tensor:
    return torch.tensor(
        [[left / width, top / height, right / width, bottom / height]], dtype=torch.float64
    )


def test_sample_grid_of_the_whole_is_bilinear_interpolation() -> None:
    grid = normals(2, 5, 8, 8)
    box = torch.tensor([ms.WHOLE_BOX], dtype=torch.float64).expand(2, 4)
    expected = F.interpolate(grid, size=(32, 48), mode="bilinear", align_corners=False)
    torch.testing.assert_close(ms.sample_grid(grid, box, (32, 48)), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("place", BOXES)
def test_sample_grid_of_a_box_is_the_slice_of_the_whole(place: tuple[int, int, int, int]) -> None:
    grid = normals(1, 5, 8, 8)
    whole = ms.sample_grid(grid, torch.tensor([ms.WHOLE_BOX], dtype=torch.float64), (32, 48))
    top, left, bottom, right = place
    part = ms.sample_grid(grid, box_of(*place, 32, 48), (bottom - top, right - left))
    torch.testing.assert_close(part, whole[..., top:bottom, left:right], atol=1e-12, rtol=0)


def test_sample_grid_reads_every_item_at_its_own_box() -> None:
    grid = normals(3, 2, 8, 8)
    boxes = torch.cat([box_of(*place, 32, 48) for place in BOXES])
    together = ms.sample_grid(grid, boxes, (8, 8))
    for item in range(3):
        torch.testing.assert_close(
            together[item : item + 1],
            ms.sample_grid(grid[item : item + 1], boxes[item : item + 1], (8, 8)),
        )
    assert not torch.allclose(together[0], ms.sample_grid(grid[:1], boxes[1:2], (8, 8))[0])


@pytest.mark.parametrize(("height", "width"), [(16, 16), (17, 33), (50, 31)])
def test_padding_leaves_the_picture_where_it_was(
    monkeypatch: pytest.MonkeyPatch, height: int, width: int
) -> None:
    """What the flow is told of a picture with padding is told at its pixels' own places."""
    image = pixels(1, 3, height, width)
    padded = pad_to_multiple(image)
    assert padded.shape[-2] % 8 == padded.shape[-1] % 8 == 0
    assert 0 <= padded.shape[-2] - height < 8 and 0 <= padded.shape[-1] - width < 8
    assert torch.equal(padded[..., :height, :width], image)
    assert (padded[..., height:, :width] == image[..., -1:, :]).all()
    assert (padded[..., :height, width:] == image[..., -1:]).all()
    model = small_model(torch.float64)
    survey = model.survey(ms.resize(image, (32, 32)))
    read: list[Tensor] = []
    sample_grid = ms.sample_grid

    def spy(grid: Tensor, box: Tensor, size: Sequence[int]) -> Tensor:
        read.append(sample_grid(grid, box, size))
        return read[-1]

    monkeypatch.setattr(ms, "sample_grid", spy)
    for box in (None, box_of(3, 5, 20, 30, 40, 60)):
        read.clear()
        condition = model.condition(image, survey, box)
        assert condition.size == (height, width)
        given = torch.tensor([ms.WHOLE_BOX], dtype=torch.float64) if box is None else box
        plain = sample_grid(survey.colour, given, (height, width))
        assert read[0].shape[-2:] == padded.shape[-2:]
        torch.testing.assert_close(read[0][..., :height, :width], plain, atol=1e-12, rtol=0)
        assert model.decode(condition).shape == (1, 3, height, width)


def crop_difference(
    model: ms.ConditionalFlow, low: Tensor, place: Sequence[int], shift: float, cut: int
) -> Tensor:
    """Largest |crop - whole| of the enhanced picture and of every condition, `cut` pixels inside
    the crop's rims.

    `shift` falsifies the crop's box, as a share of the picture.
    """
    top, left, bottom, right = place
    size = model.config.thumbnail_size
    with torch.no_grad():
        thumbnail = ms.resize(low, (size, size))
        whole = model.condition(low)
        box = box_of(*place, *low.shape[-2:]).float() + shift
        part = model.condition(low[..., top:bottom, left:right], model.survey(thumbnail), box)
        pairs = [(model.decode(part), model.decode(whole), 1)]
        pairs += [
            (part.features[0], whole.features[0], 2),
            (part.features[1], whole.features[1], 4),
        ]
        pairs += [(part.prior_mean, whole.prior_mean, 4)]
    worst = []
    for ours, full, stride in pairs:
        full = full[..., top // stride : bottom // stride, left // stride : right // stride]
        inside = slice(cut // stride, -(cut // stride) or None)
        worst.append((ours - full)[..., inside, inside].abs().max())
    return torch.stack(worst)


def test_crop_with_the_whole_thumbnail_agrees_with_the_whole_picture() -> None:
    """Away from the crop's rims; and the test would notice rims, and a box that is a little off."""
    model = small_model(scale=0.03)
    low = pixels(1, 3, 304, 288).float()
    place = (24, 16, 280, 272)
    assert crop_difference(model, low, place, 0.0, model.receptive_field).max() < 1e-4
    assert crop_difference(model, low, place, 0.0, 0).max() > 1e-3
    assert crop_difference(model, low, place, 0.02, 112).max() > 1e-3


def test_prior_mean_is_in_the_latents_layout() -> None:
    """A fresh flow is logit map and squeezes alone, so decoding the mean must give the colour grid,
    read as a picture."""
    torch.manual_seed(0)
    model = ms.ConditionalFlow(small_config()).eval().double()
    randomise(model.global_branch, 0.05)
    low = pixels(1, 3, 32, 48)
    with torch.no_grad():
        thumbnail = ms.resize(low, (32, 32))
        colour = model.survey(thumbnail).colour
        expected = ms.LogitMap().inverse(
            F.interpolate(colour, size=(32, 48), mode="bilinear", align_corners=False)
        )
        enhanced = model.enhance(low)
    assert enhanced.std() > 1e-3
    torch.testing.assert_close(enhanced, ms.requantise(expected), atol=1e-9, rtol=0)


def test_brightness_of_a_black_picture_is_no_division_by_zero() -> None:
    model = small_model()
    with torch.no_grad():
        assert model.enhance(torch.zeros(1, 3, 16, 16)).isfinite().all()


def test_the_global_branch_has_a_width_of_its_own() -> None:
    """0 is the local branch's width; another changes the global branch and nothing beside it."""
    sizes = {}
    for width in (0, 16, 24):
        torch.manual_seed(0)
        model = ms.ConditionalFlow(ms.Config(flow_channels=16, global_channels=width))
        parts = model.global_branch, model.local_branch, model.flow
        sizes[width] = [sum(p.numel() for p in part.parameters()) for part in parts]
    assert sizes[0] == sizes[16]
    assert sizes[24][0] > 1.5 * sizes[16][0] and sizes[24][1:] == sizes[16][1:]


def test_without_gradients_nothing_but_the_memory_is_another() -> None:
    """SiLU writes over its input there; no input that is needed later may be lost."""
    torch.manual_seed(0)
    config = ms.Config(flow_channels=16, num_flow_blocks=2, thumbnail_size=32, global_dropout=0.0)
    model = randomise(ms.ConditionalFlow(config), 0.1)
    low, high = torch.rand(2, 1, 3, 48, 40).unbind()
    found = []
    for learning in (True, False):
        with torch.set_grad_enabled(learning):
            torch.manual_seed(1)
            bits, latent = model.code_length(high, model.condition(low))
            found.append([model.enhance(low).detach(), bits.detach(), latent.detach()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
