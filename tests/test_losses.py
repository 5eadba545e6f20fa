"""Losses against scikit-image, SciPy and formulas written out."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import skimage
import torch
from conftest import randomise, smooth_scene
from torch import Tensor

import model_script as ms
from support.pictures import to_tensor


def picture(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scene(seed: int, side: int = 48) -> Tensor:
    return to_tensor(smooth_scene(seed, side, side))[None].double()


@pytest.mark.parametrize("contrast", [0.02, 0.3])
def test_ssim_is_that_of_scikit_image_for_each_item(contrast: float) -> None:
    high = picture(3, 3, 24, 31)
    enhanced = (high * (1 - contrast) + contrast * picture(3, 3, 24, 31, seed=1)).clamp(0, 1)
    expected = [
        skimage.metrics.structural_similarity(a.numpy(), b.numpy(), channel_axis=0, data_range=1.0)
        for a, b in zip(enhanced, high, strict=True)
    ]
    ours = ms.ssim(enhanced, high)
    assert ours.shape == (3,)
    assert ours.tolist() == pytest.approx(expected, abs=1e-9)
    assert ms.ssim(enhanced.float(), high.float()).tolist() == pytest.approx(expected, abs=1e-5)


def test_ssim_of_equal_pictures_is_one() -> None:
    assert ms.ssim(scene(0), scene(0)).tolist() == pytest.approx([1.0], abs=1e-12)


@pytest.mark.parametrize("kernel", ["triangle", "inverse_quadratic"])
def test_histograms_sum_to_one_along_the_last_axis(kernel: str) -> None:
    histogram = ms.soft_histogram(picture(2, 3, 50), 16, kernel, 0.1)
    assert histogram.shape == (2, 3, 16)
    assert (histogram >= 0).all()
    torch.testing.assert_close(histogram.sum(-1), torch.ones(2, 3, dtype=torch.float64))


def test_triangle_histogram_by_hand() -> None:
    """Five bins at 0, 1/4, ... 1: 0.3 gives 4/5 to the bin at 0.25 and 1/5 to the next; 0 and 1 hit
    their bins whole."""
    histogram = ms.soft_histogram(torch.tensor([0.3, 0.0, 1.0, 0.5], dtype=torch.float64), 5)
    np.testing.assert_allclose(histogram.numpy(), np.array([1, 0.8, 1.2, 0, 1]) / 4, atol=1e-12)


def test_triangle_histogram_is_the_adjoint_of_linear_interpolation() -> None:
    """For any function on the bin centres, its mean under the histogram is the mean of np.interp at
    the values."""
    values = picture(200)
    centres = np.linspace(0, 1, 17)
    for seed in range(3):
        function = np.random.default_rng(seed).normal(size=17)
        expected = np.interp(values.numpy(), centres, function).mean()
        assert float(ms.soft_histogram(values, 17).numpy() @ function) == pytest.approx(
            expected, abs=1e-12
        )


@pytest.mark.parametrize("sigma", [0.002, 0.05, 3.16])
def test_inverse_quadratic_kernel_by_its_formula(sigma: float) -> None:
    values = picture(40)
    weight = 1 / (1 + ((values.numpy()[:, None] - np.linspace(0, 1, 32)) / sigma) ** 2)
    expected = weight.sum(0) / weight.sum()
    ours = ms.soft_histogram(values, 32, "inverse_quadratic", sigma)
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize("bins", [2, 5, 64])
def test_histogram_wasserstein_is_that_of_scipy(bins: int) -> None:
    centres = np.linspace(0, 1, bins)
    p, q = (picture(4, bins, seed=s) ** 3 for s in (1, 2))
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    expected = [
        scipy.stats.wasserstein_distance(centres, centres, a, b) for a, b in zip(p, q, strict=True)
    ]
    assert ms.histogram_wasserstein(p, q).tolist() == pytest.approx(expected, abs=1e-12)


def test_histogram_wasserstein_of_the_two_ends_is_one() -> None:
    black, white = torch.zeros(64), torch.zeros(64)
    black[0] = white[-1] = 1
    assert float(ms.histogram_wasserstein(black, white)) == pytest.approx(1.0)


@pytest.mark.parametrize("bins", [16, 64])
def test_triangle_distance_is_the_samples_distance_to_a_bin(bins: int) -> None:
    for seed in range(4):
        rng = np.random.default_rng(seed)
        a, b = rng.beta(2, 5, 300), rng.beta(*rng.uniform(1, 5, 2), 300)
        ours = ms.histogram_wasserstein(
            *(ms.soft_histogram(torch.from_numpy(v), bins) for v in (a, b))
        )
        assert abs(float(ours) - scipy.stats.wasserstein_distance(a, b)) < 1 / (bins - 1)


def test_colour_loss_is_the_mean_over_pictures_and_channels() -> None:
    """Small pictures are not averaged before, so the sample distances of the raw values are the
    referee."""
    a, b = picture(2, 3, 20, 16, seed=1), picture(2, 3, 20, 16, seed=2) ** 2
    a[0] *= 0.3
    expected = np.mean(
        [
            scipy.stats.wasserstein_distance(a[i, c].flatten(), b[i, c].flatten())
            for i in range(2)
            for c in range(3)
        ]
    )
    assert float(ms.colour_loss(a, b, ms.Config(histogram_bins=256))) == pytest.approx(
        expected, abs=1 / 255
    )


def test_colour_loss_of_large_pictures_uses_averages() -> None:
    """Fine noise around grey is grey at histogram_size; without averaging it is not."""
    noisy, grey = picture(1, 3, 320, 320), torch.full((1, 3, 320, 320), 0.5, dtype=torch.float64)
    assert float(ms.colour_loss(noisy, grey, ms.Config(histogram_size=40))) < 0.05
    assert float(ms.colour_loss(noisy, grey, ms.Config(histogram_size=320))) == pytest.approx(
        0.25, abs=0.01
    )


def test_colour_loss_sees_each_channel_apart() -> None:
    """Swapped channels have the same values altogether, and still count."""
    a = scene(1)
    assert float(ms.colour_loss(a, a[:, [1, 2, 0]], ms.Config())) > 0.02


@pytest.mark.parametrize(("kernel", "sigma"), [("triangle", 1.0), ("inverse_quadratic", 0.02)])
def test_colour_loss_is_zero_with_zero_gradient_for_equal_pictures(
    kernel: str, sigma: float
) -> None:
    config = ms.Config(histogram_kernel=kernel, histogram_sigma=sigma)
    a = scene(1).requires_grad_()
    loss = ms.colour_loss(a, scene(1), config)
    loss.backward()
    assert float(loss.detach()) == 0
    assert float(a.grad.abs().max()) == 0


@pytest.mark.parametrize(("kernel", "sigma"), [("triangle", 1.0), ("inverse_quadratic", 0.02)])
def test_a_step_against_the_gradient_lowers_the_colour_loss(kernel: str, sigma: float) -> None:
    config = ms.Config(histogram_kernel=kernel, histogram_sigma=sigma)
    a, b = (0.2 + 0.3 * scene(1)).requires_grad_(), scene(2)
    before = ms.colour_loss(a, b, config)
    before.backward()
    assert a.grad.isfinite().all()
    assert float(a.grad.abs().max()) > 0
    stepped = (a - 0.01 * a.grad / a.grad.abs().max()).detach()
    assert float(ms.colour_loss(stepped, b, config)) < float(before.detach()) - 1e-4


def test_triangle_gradient_brightens_a_dark_picture() -> None:
    dark = (0.1 * scene(1)).requires_grad_()
    ms.colour_loss(dark, scene(1), ms.Config()).backward()
    assert (dark.grad <= 1e-12).all()
    assert (dark.grad < 0).double().mean() > 0.9


def test_the_published_wide_kernel_is_nearly_blind() -> None:
    """A sigma of 3.16 on values in [0, 1] spreads every pixel over all bins; hence the triangle."""
    a, b = 0.1 * scene(1), scene(2)
    sharp = float(ms.colour_loss(a, b, ms.Config()))
    wide = float(
        ms.colour_loss(a, b, ms.Config(histogram_kernel="inverse_quadratic", histogram_sigma=3.16))
    )
    assert sharp > 0.3
    assert 0 < wide < 0.05 * sharp


def make_batch(height: int, width: int) -> ms.Sample:
    low, high = (
        picture(2, 3, height, width, seed=1).float() * 0.2,
        picture(2, 3, height, width, seed=2).float(),
    )
    box = torch.tensor([ms.WHOLE_BOX, (0.1, 0.2, 0.6, 0.7)])
    return ms.Sample(low, high, ms.resize(low, (32, 32)), box)


def make_model(**settings: object) -> ms.ConditionalFlow:
    torch.manual_seed(0)
    return randomise(
        ms.ConditionalFlow(ms.Config(flow_channels=16, thumbnail_size=32, **settings)), 0.05
    ).eval()


@pytest.mark.parametrize("size", [(24, 24), (19, 26)])
def test_model_losses_are_the_weighted_terms(size: tuple[int, int]) -> None:
    weights = dict(nll_weight=0.25, l1_weight=3.0, ssim_weight=0.5, colour_weight=4.0)
    model, batch = make_model(**weights), make_batch(*size)
    torch.manual_seed(1)
    with torch.no_grad():
        terms = model.losses(batch)
        survey = model.survey(batch.thumbnail)
        condition = model.condition(batch.low, survey, batch.box)
        enhanced = model.decode(condition).double().numpy()
        torch.manual_seed(1)
        bits, _ = model.code_length(batch.high, condition)
    high = batch.high.double().numpy()
    ssims = [
        skimage.metrics.structural_similarity(a, b, channel_axis=0, data_range=1)
        for a, b in zip(enhanced, high, strict=True)
    ]
    channels = [
        (a, b) for x, y in zip(enhanced, high, strict=True) for a, b in zip(x, y, strict=True)
    ]
    distance = np.mean(
        [scipy.stats.wasserstein_distance(a.ravel(), b.ravel()) for a, b in channels]
    )
    assert set(terms) == {"nll", "l1", "ssim", "colour"}
    assert float(terms["nll"]) == pytest.approx(0.25 * float(bits.mean()), rel=1e-6)
    assert float(terms["l1"]) == pytest.approx(3 * np.abs(enhanced - high).mean(), rel=1e-5)
    assert float(terms["ssim"]) == pytest.approx(0.5 * (1 - np.mean(ssims)), abs=1e-5)
    assert float(terms["colour"]) == pytest.approx(4 * distance, abs=4 / 63)


@pytest.mark.parametrize("name", ["nll", "l1", "ssim", "colour"])
def test_terms_of_weight_zero_are_left_out(name: str) -> None:
    model = make_model(**{f"{name}_weight": 0.0})
    assert set(model.losses(make_batch(24, 24))) == {"nll", "l1", "ssim", "colour"} - {name}


def test_the_loss_reaches_every_weight() -> None:
    model = make_model()
    sum(model.losses(make_batch(24, 24)).values()).backward()
    dead = [
        name
        for name, p in model.named_parameters()
        if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()
    ]
    assert dead == []


def test_a_colour_loss_of_no_number_is_none() -> None:
    """A training that diverges is told so by its terms, and not by a histogram's error."""
    broken = torch.full((1, 3, 8, 8), 0.5)
    broken[0, 0, 2, 3] = float("nan")
    found = ms.colour_loss(broken, torch.full_like(broken, 0.5), ms.Config())
    assert bool(found.isnan())
