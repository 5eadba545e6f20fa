"""support/convolutions.py: the quicker gradient is the gradient, and is taken where it pays."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import nn

from support import convolutions
from support.convolutions import FEWEST_VALUES, Conv3, weight_gradient


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(1, 5, 7, 12), (2, 12, 9, 4), (3, 13, 1, 1), (2, 16, 1, 6)])
def test_gradients_are_autograds(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    quick = Conv3(shape[1], 12).double()
    plain = nn.Conv2d(shape[1], 12, 3, padding=1).double()
    plain.load_state_dict(quick.state_dict())
    x = torch.randn(shape, dtype=torch.float64).to(memory_format=layout)
    grown = torch.randn(shape[0], 12, *shape[2:], dtype=torch.float64)
    found = []
    with mock.patch.object(convolutions, "FEWEST_VALUES", 1):
        quick.wide = True
        for layer in (quick, plain):
            given = x.clone().requires_grad_()
            answer = layer(given)
            answer.backward(grown)
            found.append([answer, given.grad, layer.weight.grad, layer.bias.grad])
    assert "ByProducts" in type(found[0][0].grad_fn).__name__
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_gradients_in_float32_are_as_exact_as_onednns() -> None:
    torch.manual_seed(0)
    x, grown = torch.randn(2, 48, 64, 64), torch.randn(2, 24, 64, 64)
    shape, exact = (24, 48, 3, 3), (x.double(), grown.double())
    wanted = torch.nn.grad.conv2d_weight(exact[0], shape, exact[1], padding=1)
    plain = torch.nn.grad.conv2d_weight(x, shape, grown, padding=1)
    off = (weight_gradient(x, grown) - wanted).abs().max()
    assert off < 2 * (plain - wanted).abs().max() < 1e-2


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        ("", True),
        ("few values", False),
        ("few channels", False),
        ("half the size", False),
        ("no gradient", False),
        ("mixed precision", False),
    ],
)
def test_it_is_taken_where_it_pays(change: str, taken: bool) -> None:
    channels = 8 if change == "few channels" else 48
    layer = Conv3(channels, 24, 2 if change == "half the size" else 1)
    side = 16 if change == "few values" else 128
    x = torch.randn(2, channels, side, side)
    assert (x.numel() >= FEWEST_VALUES) == (side == 128 and channels == 48)
    half = torch.autocast("cpu", torch.bfloat16, enabled=change == "mixed precision")
    with torch.set_grad_enabled(change != "no gradient"), half:
        answer = layer(x)
    assert ("ByProducts" in type(answer.grad_fn).__name__) == taken
    assert answer.shape[-1] == (side // 2 if change == "half the size" else side)


def test_what_is_before_it_need_not_learn() -> None:
    layer, x = Conv3(48, 24), torch.randn(2, 48, 128, 128)
    layer(x).sum().backward()
    assert layer.weight.grad is not None and x.grad is None
