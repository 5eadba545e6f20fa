"""Noise from frame to frame: a running mean of what stands still, and nothing of what moves."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

LEAST = 0.15  # share of the newest frame where all stands still: about 12 frames count
BLOCK, WINDOW = 16, 5  # sides in pixels
RENEW = 8  # frames between two looks at the noise
FLOOR = 1 / 12  # variance of the rounding to whole levels
LAPLACIANS = torch.tensor([[1.0, -2, 1], [-2, 4, -2], [1, -2, 1]]) / 6  # their difference


def local_mean(image: Tensor) -> Tensor:
    """(1, C, H, W): the mean over 5x5 around each pixel, rims repeated; a box is separable.

    Sums of shifted views: seven times as fast as F.avg_pool2d here.
    """
    mean = F.pad(image, [WINDOW // 2] * 4, mode="replicate")
    for axis in (-2, -1):
        length = mean.shape[axis] - WINDOW + 1
        views = [mean.narrow(axis, start, length) for start in range(WINDOW)]
        mean = sum(views[1:], views[0]) / WINDOW
    return mean


def noise_curve(frame: Tensor, groups: int = 6) -> Tensor:
    """(256,): the variance of the noise at each grey level, of (1, 3, H, W) in levels of 255.

    Immerkaer's estimate (CVIU 1996) in blocks of 16x16, of which the lower quartile counts in each
    of a few groups of one brightness: edges and texture raise it, and brighter pixels are noisier.
    """
    kernel = LAPLACIANS.expand(3, 1, 3, 3)
    padded = F.pad(frame, (1, 1, 1, 1), mode="replicate")
    magnitude = F.conv2d(padded, kernel, groups=3).abs().mean(1, keepdim=True)
    side = min(BLOCK, *frame.shape[-2:])
    deviation = F.avg_pool2d(magnitude, side).flatten() * (np.pi / 2) ** 0.5
    level = F.avg_pool2d(frame.mean(1, keepdim=True), side).flatten()
    parts = [part for part in level.argsort().tensor_split(groups) if len(part)]
    levels = [float(level[part].mean()) for part in parts]
    lower = [float(deviation[part].quantile(0.25)) for part in parts]
    found = np.interp(np.arange(256), levels, lower).astype(np.float32)
    return torch.from_numpy(found).square() + FLOOR


class Steady:
    """Averages the frames of one clip over time, (H, W, 3) uint8 to uint16, one after another.

    Each pixel has a running mean, and its share of the newest frame is what a Kalman filter gives a
    scene that stands still. Where a frame differs from the mean by more than its noise, in square
    or in a 5x5's mean, that share rises to 1: what moves is left as it is.
    """

    def __init__(self) -> None:
        self.mean: Tensor | None = None
        self.variance = torch.ones(1)  # of the mean, relative to a frame's
        self.noise = torch.ones(256)
        self.count = 0

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        frame = torch.from_numpy(pixels).permute(2, 0, 1)[None].float().contiguous()
        if self.count % RENEW == 0:
            self.noise = noise_curve(frame)
        self.count += 1
        if self.mean is None or self.mean.shape != frame.shape:
            self.mean, self.variance = frame, torch.ones_like(frame[:, :1])
        else:
            difference = frame - self.mean
            grey = local_mean(frame.mean(1, keepdim=True)).round().long()
            expected = self.noise[grey] * (1 + self.variance)
            square = local_mean(difference.square().mean(1, keepdim=True)) / expected
            shift = local_mean(difference).square().mean(1, keepdim=True) * WINDOW**2 / expected
            # beyond what chance makes of 25 pixels, in three colours
            moved = torch.maximum((square - 1.6) / 1.4, (shift - 4) / 6).clamp(0, 1)
            still = (self.variance / (1 + self.variance)).clamp(min=LEAST)
            share = still + (1 - still) * moved
            self.variance = (1 - share).square() * self.variance + share.square()
            self.mean = self.mean + share * difference
        levels = (self.mean[0] * 257).round().clamp(0, 65535)
        return levels.permute(1, 2, 0).numpy().astype(np.uint16)
