"""Optimising: the learning rate of a step, the optimizer, the average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def learning_rate_at(progress: float, step: int, config: Any) -> float:
    """Linear warm-up, then half a cosine to 1 % of the peak; `progress` in [0, 1]."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    cosine = (1 + math.cos(math.pi * min(progress, 1.0))) / 2
    return config.learning_rate * warm * (0.01 + 0.99 * cosine)


def adamw(parameters: Iterable[Any], config: Any) -> torch.optim.Optimizer:
    """AdamW; `lr_scale` of a group of parameters multiplies the scheduled rate."""
    rate, decay = config.learning_rate, config.weight_decay
    return torch.optim.AdamW(parameters, rate, betas=(0.9, 0.99), weight_decay=decay, fused=True)


def averaged_model(model: nn.Module, decay: float) -> torch.optim.swa_utils.AveragedModel:
    """Exponential moving average; its decay warms up, so that it forgets the start."""

    def average(averages: Any, current: Any, count: Tensor | int) -> None:  # lists of tensors
        now = min(decay, (1 + int(count)) / (10 + int(count)))
        torch._foreach_lerp_(averages, current, 1 - now)

    return torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=average)
