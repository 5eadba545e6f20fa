"""Convolutions that train faster on a processor without half precision."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input

# with fewer channels, or fewer values in the input, oneDNN's gradient is as fast
FEWEST_CHANNELS, FEWEST_VALUES = 12, 3 * 2**17


def weight_gradient(x: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of a 3x3 convolution's weights, (O, I, 3, 3).

    x: (B, I, H, W), its input; gradient: (B, O, H, W), that of its output. The input is shifted by
    each of the nine taps and multiplied with the gradient. With the rows of the padded pictures
    laid end to end, a shift is another start, so that nothing is copied for it.
    """
    batch, inputs, height, width = x.shape
    rows = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1)).reshape(batch, -1, inputs)
    # as wide as those rows: what lies beside the picture is zero
    given = F.pad(gradient.permute(0, 2, 3, 1), (0, 0, 0, 2)).reshape(batch, -1, gradient.shape[1])
    length = height * (width + 2) - 2  # the last tap ends with the last padded row
    given = given[:, :length].transpose(1, 2)
    starts = [row * (width + 2) + column for row in range(3) for column in range(3)]
    taps = [torch.bmm(given, rows[:, start : start + length]).sum(0) for start in starts]
    return torch.stack(taps, -1).unflatten(-1, (3, 3))


class ByProducts(torch.autograd.Function):
    """A 3x3 convolution at stride 1, with `weight_gradient`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias, padding=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = conv2d_input(x.shape, weight, gradient, padding=1)
        return of_x, weight_gradient(x, gradient), gradient.sum((0, 2, 3))


class Conv3(nn.Conv2d):
    """A 3x3 convolution that keeps the size, or halves it with stride 2.

    oneDNN takes two to three times as long for the gradient of float32 weights as for the
    convolution itself; matrix products take half to four fifths of that (benchmarks/ablation.md).
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__(inputs, outputs, 3, stride, 1)
        self.wide = stride == 1 and min(inputs, outputs) >= FEWEST_CHANNELS

    def forward(self, x: Tensor) -> Tensor:
        """(B, I, H, W) -> (B, O, H, W), or half of that size."""
        if torch.is_grad_enabled() and self.wide and self.by_products(x):
            return ByProducts.apply(x, self.weight, self.bias)
        return super().forward(x)

    def by_products(self, x: Tensor) -> bool:
        """Whether matrix products pay for it."""
        full = x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
        return full and x.dtype == self.weight.dtype and x.numel() >= FEWEST_VALUES
