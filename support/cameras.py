"""Cameras: which of the released networks a picture is for, told by its thumbnail."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from support.settings import UserError

CAMERAS = ("infrared", "ordinary")
SIDE, STATISTICS = 32, 13  # of the thumbnail; how many numbers are told of it


def statistics(pixels: np.ndarray) -> np.ndarray:
    """(13,) numbers of an (H, W, 3) uint8 or uint16 picture: the colour cast, its spread, and the
    brightness, all in powers of two, of a thumbnail of 32x32."""
    shallow = pixels if pixels.dtype == np.uint8 else (pixels >> 8).astype(np.uint8)
    small = Image.fromarray(shallow).resize((SIDE, SIDE), Image.Resampling.BOX)
    levels = np.log2(np.asarray(small).reshape(-1, 3) / 255 + 1 / 255)
    cast = levels - levels.mean(1, keepdims=True)
    marks = [np.percentile(cast[:, k] - cast[:, 1], [10, 50, 90]) for k in (0, 2)]
    brightness = (levels.mean(), levels.std(0).mean())
    return np.concatenate([cast.mean(0)[:2], cast.std(0), brightness, *marks])


def infrared_probability(pixels: np.ndarray, probe: Tensor) -> float:
    """How probable it is that a sensor without infrared-cut filter took `pixels`.

    A logistic regression on the statistics and their squares. probe: (5, 13): the statistics' means
    and deviations, the weights of the standardised and of their squares, and the bias (its first).
    """
    mean, scale, linear, square, bias = probe.double().numpy()
    z = (statistics(pixels) - mean) / scale
    logit = float(linear @ z + square @ z**2 + bias[0])
    return 1 / (1 + math.exp(-max(-30.0, min(30.0, logit))))


def camera_of(pixels: np.ndarray, probe: Tensor) -> str:
    """The camera, of CAMERAS, that is the more probable one."""
    return "infrared" if infrared_probability(pixels, probe) > 0.5 else "ordinary"


def check_probe(probe: Any, path: str) -> Tensor:
    """`probe`, if it is what `infrared_probability` needs. Raises UserError."""
    good = isinstance(probe, Tensor) and probe.shape == (5, STATISTICS)
    if not good or not bool(torch.isfinite(probe).all()):
        raise UserError(f"{path}: its table of cameras is damaged; use another checkpoint")
    return probe
