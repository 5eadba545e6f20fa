"""Published systems to compare with, one file each.

They import model_script. The script knows none of them.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

SYSTEMS = {  # the name in a checkpoint: module, class, recipe for two cores
    "ConditionalFlow": ("model_script", "ConditionalFlow", "cpu_train_config.json"),
    "RetinexNet": ("baselines.retinexnet", "RetinexNet", "baselines/retinexnet.json"),
    "UPTFlow": ("baselines.upt_flow", "UPTFlow", "baselines/upt_flow.json"),
    "AnlightenDiff": (
        "baselines.anlightendiff",
        "AnlightenDiff",
        "baselines/anlightendiff.json",
    ),
}


def system_class(name: str) -> type[Any]:
    """The class of one of SYSTEMS, a model_script.System; its module is imported only now."""
    module, system, _ = SYSTEMS[name]
    return getattr(importlib.import_module(module), system)


def equalise(low: Tensor) -> Tensor:
    """Each channel of (B, C, H, W) in [0, 1], at 8 bits, with its histogram made flat over [0, 1].

    A constant channel becomes 0.
    """
    levels = (low.float() * 255).round().long().flatten(2)
    counts = levels.new_zeros(*levels.shape[:2], 256).scatter_add(
        2, levels, torch.ones_like(levels)
    )
    below = counts.cumsum(2).gather(2, levels)  # pixels that are no brighter
    lowest = below.amin(2, keepdim=True)
    return (
        ((below - lowest) / (levels.shape[2] - lowest).clamp(min=1))
        .reshape(low.shape)
        .to(low.dtype)
    )
