"""AnlightenDiff: diffusion against closed forms, maps against hand-made pixels, every mode."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_tools import assert_one_line_error, differing, environment, make_data, tiny_config
from conftest import ROOT, randomise
from torch import Tensor, nn

import model_script as ms
from baselines import anlightendiff as ad
from support.decoding import read_image
from support.settings import UserError, build, read_all

SMALL = dict(width=8, multipliers=[1, 2], timesteps=10, sampling_steps=3)


pytestmark = pytest.mark.usefixtures("one_thread")


def small_model(seed: int = 0, **changes: Any) -> ad.AnlightenDiff:
    """A tiny model none of whose layers is still an identity."""
    torch.manual_seed(seed)
    return randomise(ad.AnlightenDiff(ad.AnlightenConfig(**SMALL | changes)), 0.05, seed).eval()


def pictures(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(low, high) in [0, 1], `high` nowhere darker than `low`."""
    low = 0.2 * torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    return low, low + (1 - low) * torch.rand(
        shape, generator=torch.Generator().manual_seed(seed + 1)
    )


def sample_of(low: Tensor, high: Tensor) -> ms.Sample:
    return ms.Sample(low, high, low, torch.tensor([ms.WHOLE_BOX]).expand(len(low), 4))


# the diffusion ------------------------------------------------------------------------------------


@pytest.mark.parametrize("timesteps", [10, 100])
def test_schedule_against_numpy(timesteps: int) -> None:
    f = np.cos((np.arange(timesteps + 1) / timesteps + 0.008) / 1.008 * np.pi / 2) ** 2
    expected, alpha_bar = [], 1.0
    for t in range(timesteps):
        alpha_bar *= 1 - min(1 - f[t + 1] / f[t], 0.999)
        expected.append(alpha_bar)
    found = ad.cosine_alpha_bars(timesteps).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    # the clip acts on the last step, whose cosine is 0
    assert found[-1] == pytest.approx(found[-2] / 1000)


def test_forward_is_the_papers_formula_and_undiffuse_its_inverse() -> None:
    rng = np.random.default_rng(0)
    x0, noise, centre = rng.uniform(-1, 1, 50), rng.normal(size=50), rng.uniform(0, 1, 50)
    for a in ad.cosine_alpha_bars(100).tolist():
        c1 = (1 - a**0.5) / (1 - a) ** 0.5
        expected = a**0.5 * x0 + (1 - a) ** 0.5 * (noise + c1 * (2 * centre - 1))
        x, e, c = (torch.from_numpy(values) for values in (x0, noise, centre))
        noisy = ad.diffuse(x, e, c, torch.tensor(a, dtype=torch.float64))
        np.testing.assert_allclose(noisy.numpy(), expected, atol=1e-12)
        back = ad.undiffuse(noisy, e, c, torch.tensor(a, dtype=torch.float64))
        np.testing.assert_allclose(back.numpy(), x0, atol=1e-9)


def steps_of(times: list[int], timesteps: int = 100) -> list[tuple[float, float]]:
    """(abar_t, abar_{t-1}) of each reverse step."""
    schedule = ad.cosine_alpha_bars(timesteps).tolist()
    return [
        (schedule[t], schedule[earlier] if earlier >= 0 else 1.0)
        for t, earlier in zip(times, [*times[1:], -1], strict=True)
    ]


@pytest.mark.parametrize("steps", [0, 7, 1])
def test_reverse_step_is_the_posterior_of_two_gaussians(steps: int) -> None:
    """Bayes with x_{t-1} ~ DRDA given x0, and x_t given x_{t-1}: y = x - m shrinks by sqrt(alpha)
    and gains 1 - alpha."""
    x0, xt, m = 0.3, -0.8, 0.55
    for now, before in steps_of(ad.sampling_times(100, steps))[:-1]:
        alpha, prior_mean = now / before, m + math.sqrt(before) * (x0 - m)
        precision = 1 / (1 - before) + alpha / (1 - alpha)
        evidence = math.sqrt(alpha) * (xt - m + math.sqrt(alpha) * m) / (1 - alpha)
        step = ad.reverse_step(now, before)
        mean = step.residual * x0 + step.noisy * xt + step.centre * m
        assert mean == pytest.approx((prior_mean / (1 - before) + evidence) / precision, rel=1e-9)
        assert step.deviation == pytest.approx(precision**-0.5, rel=1e-9)


@pytest.mark.parametrize("steps", [0, 7, 1])
def test_reverse_step_keeps_the_centre_and_the_marginals(steps: int) -> None:
    x0, m = -0.4, 0.7
    for now, before in steps_of(ad.sampling_times(100, steps)):
        step = ad.reverse_step(now, before)
        # x0 = x_t = m is a fixed point
        assert step.residual + step.noisy + step.centre == pytest.approx(1, abs=1e-12)
        mean_of = {a: math.sqrt(a) * x0 + (1 - math.sqrt(a)) * m for a in (now, before)}  # DRDA's
        assert step.residual * x0 + step.noisy * mean_of[now] + step.centre * m == pytest.approx(
            mean_of[before], abs=1e-12
        )
        assert step.noisy**2 * (1 - now) + step.deviation**2 == pytest.approx(1 - before, abs=1e-12)


def test_the_last_step_returns_the_residual_without_noise() -> None:
    ((now, before),) = steps_of([0])
    assert ad.reverse_step(now, before) == pytest.approx((1, 0, 0, 0), abs=1e-12)


def test_sampling_times_are_even_and_reach_both_ends() -> None:
    assert ad.sampling_times(100, 0) == list(range(99, -1, -1))
    assert ad.sampling_times(100, 4) == [99, 66, 33, 0]
    assert ad.sampling_times(100, 1) == [99]
    assert len(set(ad.sampling_times(100, 37))) == 37


@pytest.mark.parametrize("steps", [0, 4, 1])
def test_the_true_noise_leads_from_the_centre_to_the_target(
    steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # not the sampler's own seed, whose noise would resemble the pictures
    low, high = pictures(2, 3, 16, 16, seed=10)
    model = small_model(timesteps=50, sampling_steps=steps)
    centre = model.predict_centre(low)[0].detach().clamp(0, 1).double()
    schedule, seen = ad.cosine_alpha_bars(50), []

    def true_noise(noisy: Tensor, low: Tensor, t: Tensor, features: object) -> Tensor:
        seen.append((int(t[0]), noisy))
        alpha_bar = schedule[t[0]]
        zero = torch.zeros_like(noisy, dtype=torch.float64)
        signal = ad.diffuse(ad.to_residual(high, low).double(), zero, centre, alpha_bar)
        return ((noisy - signal) / (1 - alpha_bar).sqrt()).float()

    monkeypatch.setattr(model, "predict_noise", true_noise)
    assert (low - high).abs().mean() > 0.2
    with torch.no_grad():
        enhanced = model.enhance(low)
    # abar_T is 1e-6 in one step
    assert torch.allclose(enhanced, high, atol=5e-3 if steps == 1 else 1e-5)
    assert [t for t, _ in seen] == ad.sampling_times(50, steps)
    anchor, residual = 2 * centre - 1, ad.to_residual(high, low).double()
    assert torch.allclose(seen[0][1], anchor.float(), atol=1e-6)  # no noise in the start
    # the way there leads through DRDA's means: nothing is left of either end but noise
    for t, noisy in seen:
        left = noisy - ad.diffuse(residual, torch.zeros_like(residual), centre, schedule[t])
        for end in (anchor, residual):
            assert abs(float((left * end).sum() / (end * end).sum())) < 0.15, t


@pytest.mark.parametrize(("start", "steps"), [(20, 0), (20, 4), (1, 1), (50, 5)])
def test_a_later_start_is_the_centre_under_that_steps_noise(
    start: int, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the true noise leads from there, too, to the target."""
    low, high = pictures(2, 3, 16, 16, seed=10)
    model = small_model(timesteps=50, sampling_steps=steps, start_step=start)
    centre, schedule = (
        model.predict_centre(low)[0].detach().clamp(0, 1),
        ad.cosine_alpha_bars(50).float(),
    )
    seen: list[tuple[int, Tensor]] = []

    def true_noise(noisy: Tensor, low: Tensor, t: Tensor, features: object) -> Tensor:
        seen.append((int(t[0]), noisy))
        signal = ad.diffuse(
            ad.to_residual(high, low), torch.zeros_like(low), centre, schedule[t[0]]
        )
        return (noisy - signal) / (1 - schedule[t[0]]).sqrt()

    monkeypatch.setattr(model, "predict_noise", true_noise)
    with torch.no_grad():
        enhanced = model.enhance(low)
    assert [t for t, _ in seen] == ad.sampling_times(start, steps)
    noise = torch.randn(low.shape, generator=torch.Generator().manual_seed(model.config.seed))
    alpha_bar = schedule[start - 1]
    mean = alpha_bar.sqrt() * (2 * (centre - low) - 1) + (1 - alpha_bar.sqrt()) * (2 * centre - 1)
    torch.testing.assert_close(seen[0][1], mean + (1 - alpha_bar).sqrt() * noise, atol=1e-5, rtol=0)
    assert torch.allclose(enhanced, high, atol=1e-3 if start < 50 else 2e-2)


def test_the_denoised_residual_is_clamped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last step returns the residual itself: -1 is `low` as it was, 1 is white."""
    low, _ = pictures(1, 3, 16, 16)
    model = small_model()
    for noise, expected in ((1e6, low), (-1e6, torch.ones_like(low))):
        monkeypatch.setattr(
            model, "predict_noise", lambda noisy, *_, noise=noise: torch.full_like(noisy, noise)
        )
        with torch.no_grad():
            assert torch.allclose(model.enhance(low), expected, atol=1e-5)


def test_residual_and_picture_are_inverse() -> None:
    low, high = pictures(1, 3, 4, 4)
    residual = ad.to_residual(high, low)
    assert residual.min() >= -1 and residual.max() <= 1
    assert torch.allclose(ad.to_picture(residual, low), high, atol=1e-6)
    assert float(ad.to_residual(torch.tensor(0.75), torch.tensor(0.25))) == 0.0


# what the condition U-Net sees --------------------------------------------------------------------


def test_colour_and_gradient_map_on_hand_made_pixels() -> None:
    low = torch.zeros(1, 3, 2, 3)
    low[0, :, 0, 0], low[0, :, 0, 1], low[0, :, 1, 1] = (
        torch.tensor(rgb) for rgb in ([0.2, 0.1, 0.1], [0, 0, 0.3], [1.0] * 3)
    )
    colours = ad.colour_map(low)
    third = 1 / 3
    expected = [
        [[0.5, 0, 0], [0, third, 0]],
        [[0.25, 0, 0], [0, third, 0]],
        [[0.25, 1, 0], [0, third, 0]],
    ]
    assert torch.allclose(colours[0], torch.tensor(expected), atol=1e-6)
    ramp = torch.tensor([[0.0, 0.1, 0.5], [0.3, 0.3, 0.4]])[None, None]
    assert torch.allclose(
        ad.gradient_map(ramp)[0, 0], torch.tensor([[0.3, 0.4, 0.1], [0.0, 0.1, 0.0]]), atol=1e-6
    )


def test_equalise_on_hand_made_pixels_and_against_counting() -> None:
    four = torch.tensor([[10, 10], [20, 40]]) / 255  # the darkest level becomes 0, the brightest 1
    other = torch.full((2, 2), 0.5)
    found = ad.equalise(torch.stack([four, other])[None])
    assert torch.equal(found[0, 0], torch.tensor([[0.0, 0.0], [0.5, 1.0]]))
    assert torch.equal(found[0, 1], torch.zeros(2, 2))
    levels = np.random.default_rng(0).integers(0, 60, (9, 7))
    ranks = np.array([[(levels <= level).sum() for level in row] for row in levels])
    darkest = (levels == levels.min()).sum()
    found = ad.equalise(torch.from_numpy(levels)[None, None].float() / 255)[0, 0].numpy()
    np.testing.assert_allclose(found, (ranks - darkest) / (levels.size - darkest), atol=1e-6)


def test_the_predictor_sees_four_maps_and_adds_to_the_equalised_input(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    low, _ = pictures(1, 3, 16, 16)
    model, seen = small_model(), []
    forward = model.predictor.forward
    monkeypatch.setattr(model.predictor, "forward", lambda x: (seen.append(x), forward(x))[1])
    centre, _ = model.predict_centre(low)
    colours = ad.colour_map(low)
    assert torch.equal(
        seen[0], torch.cat([low, ad.equalise(low), colours, ad.gradient_map(colours)], 1)
    )
    assert torch.allclose(centre, ad.equalise(low) + forward(seen[0])[0])
    untrained = ad.AnlightenDiff(ad.AnlightenConfig(**SMALL))
    assert torch.equal(untrained.predict_centre(low)[0], ad.equalise(low))
    shown = model.pictures(low)["centre"]
    assert shown.min() >= 0 and shown.max() <= 1


# networks -----------------------------------------------------------------------------------------


def test_filters_are_standardised() -> None:
    layer, x = ad.StandardisedConv(4, 6), torch.rand(1, 4, 8, 8)
    with torch.no_grad():
        before = layer(x)
        layer.weight.mul_(3.0).add_(0.2)
        assert torch.allclose(layer(x), before, atol=1e-3)
        one = torch.zeros(1, 4, 3, 3)
        one[:, :, 1, 1] = 1.0
        centre_taps = layer(one)[0, :, 1, 1]
    weight = layer.weight.detach().numpy()
    expected = (weight - weight.mean((1, 2, 3), keepdims=True)) / weight.std(
        (1, 2, 3), keepdims=True
    )
    np.testing.assert_allclose(centre_taps.numpy(), expected[:, :, 1, 1].sum(1), atol=1e-3)


def test_the_denoiser_listens_to_the_step_and_to_every_level_of_the_condition() -> None:
    low, high = pictures(1, 3, 16, 16)
    model, t = small_model(multipliers=[1, 2, 3]), torch.tensor([3])
    _, features = model.predict_centre(low)
    before = model.predict_noise(high, low, t, features)
    assert [tuple(feature.shape[1:]) for feature in features] == [
        (8, 16, 16),
        (16, 8, 8),
        (24, 4, 4),
    ]
    assert not torch.allclose(model.predict_noise(high, low, t + 1, features), before, atol=1e-5)
    assert not torch.allclose(model.predict_noise(high, low + 0.1, t, features), before, atol=1e-5)
    for level in range(3):
        changed = [
            feature * (2.0 if level == place else 1.0) for place, feature in enumerate(features)
        ]
        assert not torch.allclose(model.predict_noise(high, low, t, changed), before, atol=1e-5), (
            level
        )


def test_block_against_numpy() -> None:
    """conv, instance norm, shift by the step, SiLU, conv, instance norm, SiLU; the input passes
    around them."""
    torch.manual_seed(0)
    block = randomise(ad.Block(4, 6, 5), 0.5).double()
    x, time = torch.rand(2, 4, 7, 5, dtype=torch.float64), torch.rand(2, 5, dtype=torch.float64)

    def norm(layer: nn.Module, values: np.ndarray) -> np.ndarray:
        mean, variance = values.mean((2, 3), keepdims=True), values.var((2, 3), keepdims=True)
        weight, bias = (p.detach().numpy()[:, None, None] for p in (layer.weight, layer.bias))
        return (values - mean) / np.sqrt(variance + 1e-5) * weight + bias

    def silu(values: np.ndarray) -> np.ndarray:
        return values / (1 + np.exp(-values))

    with torch.no_grad():
        hidden = (
            norm(block.norms[0], block.first(x).numpy())
            + block.time(time).numpy()[:, :, None, None]
        )
        hidden = norm(block.norms[1], block.second(torch.from_numpy(silu(hidden))).numpy())
        np.testing.assert_allclose(
            block(x, time).numpy(), block.skip(x).numpy() + silu(hidden), atol=1e-12
        )


def test_the_conditions_features_are_added_level_by_level(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each level's block gets what the block above gave plus that level's feature, at half the
    size."""
    low, high = pictures(1, 3, 16, 16)
    model, t = small_model(multipliers=[1, 2, 3]), torch.tensor([3])
    features = [torch.randn_like(feature) for feature in model.predict_centre(low)[1]]
    seen: list[tuple[Tensor, Tensor]] = []
    for block in [*model.denoiser.encoder, model.denoiser.middle]:
        block.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    model.predict_noise(high, low, t, features)
    for level, feature in enumerate(features):
        expected = seen[level][1] + feature
        below = seen[level + 1][0]
        torch.testing.assert_close(
            below, expected if level == 2 else nn.functional.avg_pool2d(expected, 2)
        )


@pytest.mark.parametrize("size", [(16, 16), (17, 31), (40, 23)])
def test_any_size_from_16(size: tuple[int, int]) -> None:
    low, high = pictures(1, 3, *size)
    model = small_model(multipliers=[1, 1, 1, 1, 2], sampling_steps=2)
    with torch.no_grad():
        enhanced = model.enhance(low)
    assert enhanced.shape == low.shape
    assert enhanced.isfinite().all() and enhanced.min() >= 0 and enhanced.max() <= 1
    assert all(term.isfinite() for term in model.train().losses(sample_of(low, high)).values())


def test_every_parameter_is_trained() -> None:
    low, high = pictures(2, 3, 16, 16)
    model = small_model().train()
    sum(model.losses(sample_of(low, high)).values()).backward()
    dead = [
        name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0
    ]
    assert not dead


def test_the_defaults_are_the_published_networks_and_schedule() -> None:
    config = ad.AnlightenConfig()
    assert (config.width, config.multipliers, config.timesteps) == (64, [1, 2, 2, 4, 4, 8], 100)
    assert (config.start_step, config.sampling_steps) == (0, 0)  # the paper's sampler
    assert (config.crop_size, config.batch_size, config.learning_rate) == (160, 24, 4e-4)
    with torch.device("meta"):
        model = ad.AnlightenDiff(config)
    assert (model.predictor.stem.in_channels, model.denoiser.stem.in_channels) == (12, 6)
    assert [block.second.out_channels for block in model.denoiser.encoder] == [
        64,
        128,
        128,
        256,
        256,
        512,
    ]


@pytest.mark.slow
def test_the_published_size_runs_forward_and_backward() -> None:
    low, high = pictures(1, 3, 64, 64)
    model = ad.AnlightenDiff(ad.AnlightenConfig())
    sum(model.losses(sample_of(low, high)).values()).backward()
    assert 20e6 < sum(p.numel() for p in model.parameters()) < 60e6


# losses -------------------------------------------------------------------------------------------


def seen_terms(
    model: ad.AnlightenDiff, low: Tensor, high: Tensor, guess: Tensor
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The terms when the denoiser says `guess`, and what it was asked: noisy, low, t."""
    asked: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            model,
            "predict_noise",
            lambda noisy, low, t, features: (asked.extend([noisy, low, t]), guess)[1],
        )
        terms = model.losses(sample_of(low, high))
    return {name: term.detach() for name, term in terms.items()}, asked


@pytest.mark.parametrize("kind", ["ssim", "l1"])
def test_losses_against_direct_computation(kind: str) -> None:
    """The centre that was drawn is the one whose noise has the error that the noise term states:
    both must occur."""
    low, high = pictures(1, 3, 16, 16)
    model = small_model(dfpl_image_loss=kind, centre_weight=3.0, dfpl_weight=0.5, noise_weight=2.0)
    guess, predicted = torch.randn(low.shape), model.predict_centre(low)[0].detach()
    drawn, steps = {"reference": 0, "predicted": 0}, set()
    for seed in range(30):
        torch.manual_seed(seed)
        terms, (noisy, _, t) = seen_terms(model, low, high, guess)
        a = float(ad.cosine_alpha_bars(10)[t])
        errors = {}
        for name, centre in (("reference", high), ("predicted", predicted.clamp(0, 1))):
            signal = a**0.5 * (2 * (high - low) - 1) + (1 - a**0.5) * (2 * centre - 1)
            errors[name] = guess - (noisy - signal) / (1 - a) ** 0.5
        (name,) = [
            n
            for n, error in errors.items()
            if float(terms["noise"]) == pytest.approx(2 * float((error**2).mean()))
        ]
        ours = low + (noisy + (1 - a) ** 0.5 * errors[name] + 1) / 2
        theirs = low + (noisy + 1) / 2
        expected = (
            (ours - theirs).abs().mean() if kind == "l1" else 1 - ms.ssim(ours, theirs).mean()
        )
        assert float(terms["dfpl"]) == pytest.approx(0.5 * float(expected), rel=1e-3, abs=1e-5)
        assert float(terms["centre"]) == pytest.approx(3 * float((predicted - high).abs().mean()))
        drawn[name] += 1
        steps.add(int(t))
    assert min(drawn.values()) >= 7 and len(steps) >= 7


def test_the_centre_is_the_prediction_or_the_reference_half_and_half() -> None:
    """Told from x_t at the last step, where it is the centre's image and noise; 2000 pictures, 5
    deviations."""
    count = 2000
    low = torch.zeros(count, 3, 16, 16)
    model = small_model()
    predicted = torch.ones_like(low)
    features = [feature.expand(count, -1, -1, -1) for feature in model.predict_centre(low[:1])[1]]
    # a white prediction of a black reference
    model.predict_centre = lambda low: (predicted, features)
    torch.manual_seed(0)
    _, (noisy, _, t) = seen_terms(model, low, torch.zeros_like(low), torch.zeros_like(low))
    late = t == 9
    white = (noisy[late].mean((1, 2, 3)) > 0).double()
    assert late.sum() > 100
    assert abs(float(white.mean()) - 0.5) < 5 * 0.5 / math.sqrt(int(late.sum()))


def test_the_true_noise_costs_nothing_and_weights_of_zero_drop_terms() -> None:
    low, high = pictures(1, 3, 16, 16)
    for kind in ("ssim", "l1"):
        assert float(ad.image_loss(kind, high, high)) == pytest.approx(0, abs=1e-6)
        assert float(ad.image_loss(kind, high, low)) > 0.05
    names = {"centre", "noise", "dfpl"}
    for name in names:
        model = small_model(**{f"{name}_weight": 0.0})
        assert model.losses(sample_of(low, high)).keys() == names - {name}


def test_the_denoiser_does_not_train_the_centre() -> None:
    low, high = pictures(4, 3, 16, 16)
    model = small_model(centre_weight=0.0).train()
    sum(model.losses(sample_of(low, high)).values()).backward()
    assert all(p.grad is None for p in model.predictor.decoder.parameters())
    # its features do steer the denoiser
    assert all(p.grad.abs().sum() > 0 for p in model.predictor.encoder.parameters())


class FakeLPIPS(nn.Module):
    """Looks like the package's network; one weight, so that its training would show."""

    def __init__(self, net: str, verbose: bool = True) -> None:
        super().__init__()
        assert net == "vgg"
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.weight * (a - b).abs().mean((1, 2, 3), keepdim=True)


@pytest.fixture
def forget_lpips() -> Iterator[None]:
    ad.lpips_vgg.cache_clear()
    yield
    ad.lpips_vgg.cache_clear()


def test_lpips_compares_in_its_range_and_is_no_part_of_the_model(
    monkeypatch: pytest.MonkeyPatch, forget_lpips: None
) -> None:
    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=FakeLPIPS))
    low, high = pictures(2, 3, 16, 16)
    assert float(ad.image_loss("lpips", low, high)) == pytest.approx(
        2 * float((low - high).abs().mean())
    )
    model = small_model(dfpl_image_loss="lpips").train()
    names = set(model.state_dict())
    model.make_optimizer()
    sum(model.losses(sample_of(low, high)).values()).backward()
    assert set(model.state_dict()) == names
    network = ad.lpips_vgg().__closure__[0].cell_contents
    assert network.weight.grad is None and not network.training


# enhancement --------------------------------------------------------------------------------------


def test_enhance_follows_its_seeds() -> None:
    low, _ = pictures(1, 3, 16, 16)
    model, other = small_model(), small_model()
    other.config = dataclasses.replace(other.config, seed=1)
    with torch.no_grad():
        torch.manual_seed(5)
        state = torch.get_rng_state()
        best = model.enhance(low)
        # a validation must not change the training around it
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(6)
        assert torch.equal(model.enhance(low), best)
        assert not torch.equal(other.enhance(low), best)

        def drawn(seed: int, temperature: float) -> Tensor:
            torch.manual_seed(seed)
            return model.enhance(low, temperature)

        first = drawn(1, 1.0)
        assert torch.equal(drawn(1, 1.0), first)
        assert not torch.equal(drawn(2, 1.0), first) and not torch.equal(drawn(1, 0.5), first)
        torch.manual_seed(1)
        # two alternatives in a row differ
        assert not torch.equal(model.enhance(low, 1.0), model.enhance(low, 1.0))


def test_temperature_scales_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a denoiser that always says x0 = centre, only noise moves x away from the centre."""
    low, _ = pictures(1, 3, 16, 16)
    model, asked = small_model(timesteps=20, sampling_steps=2), []

    def still(noisy: Tensor, low: Tensor, t: Tensor, features: object) -> Tensor:
        asked.append(noisy)
        alpha_bar = ad.cosine_alpha_bars(20)[t[0]].float()
        return (noisy - asked[0]) / (1 - alpha_bar).sqrt()

    monkeypatch.setattr(model, "predict_noise", still)
    for temperature in (0.0, 1.0, 3.0):
        asked.clear()
        with torch.no_grad():
            model.enhance(low, temperature)
        expected = (temperature or 1.0) * ad.reverse_step(*steps_of([19, 0], 20)[0]).deviation
        assert float((asked[1] - asked[0]).std()) == pytest.approx(expected, rel=0.1)


def test_sampling_shows_its_progress_only_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    low, _ = pictures(1, 3, 16, 16)
    for shown in (False, True):
        with torch.no_grad():
            small_model(sampling_bar=shown).enhance(low)
        assert ("sampling" in capsys.readouterr().err) == shown


# training and modes -------------------------------------------------------------------------------


def test_training_lowers_the_losses() -> None:
    low, high = pictures(4, 3, 16, 16)
    model = ad.AnlightenDiff(ad.AnlightenConfig(**SMALL, learning_rate=1e-2))
    optimizer = model.make_optimizer()
    history = []
    for step in range(40):
        torch.manual_seed(step % 4)
        terms = model.losses(sample_of(low, high))
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        history.append({name: float(term.detach()) for name, term in terms.items()})
    for name in ("centre", "noise", "dfpl"):
        first, last = (
            np.mean([terms[name] for terms in part]) for part in (history[:4], history[-4:])
        )
        assert last < 0.8 * first, name


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"), train=3)


def run(data: Path, folder: Path, *arguments: str, **changes: Any) -> int:
    """`arguments` through the command line under the tiny settings, reading `data` and writing
    below `folder`."""
    outputs = {f"{kind}_dir": str(folder / kind) for kind in ("checkpoint", "log", "results")}
    path = folder / "config.json"
    path.write_text(json.dumps(tiny_config(data) | SMALL | outputs | changes), encoding="utf-8")
    return ms.main([*arguments, "--config", str(path)], ad.AnlightenDiff)


def trained(data: Path, folder: Path, *arguments: str, **changes: Any) -> dict[str, Any]:
    """The content of the second epoch's checkpoint."""
    folder.mkdir(exist_ok=True)
    assert run(data, folder, "--mode", "train", *arguments, **changes) == 0
    return torch.load(folder / "checkpoint" / "checkpoint_epoch_2.pth", weights_only=True)


def test_every_mode_and_an_exact_resume(data: Path, tmp_path: Path) -> None:
    straight = trained(data, tmp_path / "straight")
    first = tmp_path / "straight" / "checkpoint" / "checkpoint_epoch_1.pth"
    assert first.exists()
    resumed = trained(data, tmp_path / "resumed", "--resume", str(first))
    assert not differing(straight["training"]["model"], resumed["training"]["model"])
    assert not differing(straight["training"]["optimizer"], resumed["training"]["optimizer"])
    assert not differing(straight["model"], resumed["model"])
    unseen = trained(data, tmp_path / "unseen", val_freq=2)  # a validation less changes no weight
    assert not differing(straight["training"]["model"], unseen["training"]["model"])

    folder = tmp_path / "straight"
    assert run(data, folder, "--mode", "evaluate") == 0
    (results,) = (folder / "results").glob("eval_*")
    assert {"0.png", "0_centre.png", "0_viz.png"} <= {
        path.name for path in (results / "images").iterdir()
    }
    low = str(data / "data" / "eval" / "low" / "0.png")
    outputs = [str(folder / name) for name in ("a.png", "b.png")]
    for output in outputs:
        assert run(data, folder, "--mode", "enhance", "--input", low, "--output", output) == 0
    assert Path(outputs[0]).read_bytes() == Path(outputs[1]).read_bytes()
    assert read_image(outputs[0]).shape == read_image(low).shape
    assert (
        run(
            data,
            folder,
            "--mode",
            "enhance",
            "--input",
            low,
            "--output",
            outputs[0],
            "--set",
            "samples=2",
        )
        == 0
    )
    # it would misread every step
    assert run(data, folder, "--mode", "evaluate", "--set", "timesteps=20") == 2


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = [
        "--set",
        "image_size=32,32",
        "--set",
        "max_minutes=0.0001",
        "--set",
        "sampling_steps=1",
    ]
    assert run(tmp_path, tmp_path, "--mode", "demo", *small) == 0
    assert "ours" in capsys.readouterr().out
    assert list(tmp_path.glob("results/demo_*/demo.csv"))


def after_bars(text: str) -> str:
    """What stays visible on a terminal where progress bars were wiped."""
    return "\n".join(line.rsplit("\r", 1)[-1] for line in text.split("\n"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer": "lion"}, ["lion is not installed", "pip install lion-pytorch"]),
        ({"dfpl_image_loss": "lpips"}, ["lpips is not installed", "pip install lpips"]),
        ({"sampling_steps": 11}, ["sampling_steps", "timesteps (10)"]),
        ({"sampling_steps": 5, "start_step": 4}, ["sampling_steps", "start_step (4)"]),
        ({"start_step": 11}, ["start_step", "timesteps (10)"]),
        ({"width": 9}, ["width must be even"]),
        (
            {"noise_weight": 0, "dfpl_weight": 0, "centre_weight": 0},
            ["noise_weight, dfpl_weight and centre_weight"],
        ),
        ({"dfpl_image_los": "l1"}, ["unknown key dfpl_image_los", "dfpl_image_loss"]),
        ({"dfpl_image_loss": "vgg"}, ["dfpl_image_loss", "ssim, l1, lpips"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_mistakes_are_one_line(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    forget_lpips: None,
    changes: dict[str, Any],
    words: list[str],
) -> None:
    for name in ("lion_pytorch", "lpips"):
        monkeypatch.setitem(sys.modules, name, None)  # makes their import fail
    status = run(data, tmp_path, "--mode", "train", **changes)
    assert_one_line_error(status, after_bars(capsys.readouterr().err), *words)
    assert not (tmp_path / "checkpoint").exists()


def test_lpips_without_its_weights_is_one_line(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    forget_lpips: None,
) -> None:
    def offline(**_: Any) -> nn.Module:
        raise OSError("no route to host")

    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=offline))
    status = run(data, tmp_path, "--mode", "train", dfpl_image_loss="lpips")
    assert_one_line_error(
        status,
        after_bars(capsys.readouterr().err),
        "could not load its weights (OSError)",
        "dfpl_image_loss=ssim",
    )


def test_lion_is_built_from_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lion(torch.optim.SGD):
        def __init__(
            self, parameters: Any, lr: float, betas: tuple[float, float], weight_decay: float
        ) -> None:
            assert betas == (0.9, 0.99)
            super().__init__(parameters, lr, weight_decay=weight_decay)

    monkeypatch.setitem(sys.modules, "lion_pytorch", types.SimpleNamespace(Lion=Lion))
    model = small_model(optimizer="lion", learning_rate=4e-4, weight_decay=0.3)
    optimizer = model.make_optimizer()
    assert isinstance(optimizer, Lion)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"], len(group["params"])) == (
        4e-4,
        0.3,
        len(list(model.parameters())),
    )
    assert isinstance(small_model().make_optimizer(), torch.optim.AdamW)


def test_the_lion_package_trains_and_resumes(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("lion_pytorch")
    straight = trained(data, tmp_path / "straight", optimizer="lion")
    first = tmp_path / "straight" / "checkpoint" / "checkpoint_epoch_1.pth"
    resumed = trained(data, tmp_path / "resumed", "--resume", str(first), optimizer="lion")
    assert not differing(straight["training"]["model"], resumed["training"]["model"])


def test_the_recipe_fits_and_the_module_runs_as_a_command(tmp_path: Path) -> None:
    recipe = ROOT / "baselines" / "anlightendiff.json"
    given = read_all((ad.AnlightenConfig, ms.Use), str(recipe), [], ())
    config = build(ad.AnlightenConfig, given, str(recipe))
    assert config.checkpoint_dir == "checkpoints/anlightendiff" and config.image_size == [128, 128]
    assert sum(p.numel() for p in ad.AnlightenDiff(config).parameters()) < 2e6
    command = [
        sys.executable,
        "-m",
        "baselines.anlightendiff",
        "--mode",
        "train",
        "--config",
        str(recipe),
        "--set",
        "widht=8",
    ]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert_one_line_error(done.returncode, done.stderr, "unknown key widht", "width")


def test_levels_without_end_are_refused() -> None:
    assert len(ad.AnlightenConfig(multipliers=[1] * 8).multipliers) == 8
    with pytest.raises(UserError, match="at most 8 levels, got 9"):
        ad.AnlightenConfig(multipliers=[1] * 9)
