"""Cameras: which of the released networks a picture is for, told by its thumbnail."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from support.settings import UserError

CAMERAS = ("infrared", "ordinary")
SIDE = 32  # of the thumbnail


class CameraNet(nn.Module):
    """Thumbnails (B, 3, 32, 32) in [0, 1] -> (B,), the log-odds that a sensor without infrared-cut
    filter took them. It sees the colour cast of every place and how bright it is."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        sides = [3, width, 2 * width, 3 * width]
        convolutions = [nn.Conv2d(a, b, 3, 2, 1) for a, b in pairwise(sides)]
        self.layers = nn.Sequential(
            *[layer for conv in convolutions for layer in (conv, nn.SiLU())],
            nn.Conv2d(3 * width, 3 * width, 1),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(3 * width, 1),
        )

    def forward(self, thumbnail: Tensor) -> Tensor:
        red, green, blue = (thumbnail + 1 / 255).log2().unbind(1)
        brightness = (red + green + blue) / 6 + 2.5  # about 0 for a dark picture
        return self.layers(torch.stack([red - green, blue - green, brightness], 1)).squeeze(1)


def small_thumbnail(pixels: np.ndarray, side: int = SIDE) -> np.ndarray:
    """(side, side, 3) uint8 of an (H, W, 3) uint8 or uint16 picture."""
    shallow = pixels if pixels.dtype == np.uint8 else (pixels >> 8).astype(np.uint8)
    return np.asarray(Image.fromarray(shallow).resize((side, side), Image.Resampling.BOX))


@torch.no_grad()
def camera_of(pixels: np.ndarray, net: nn.Module) -> str:
    """The camera, of CAMERAS, that more probably took (H, W, 3) uint8 or uint16 `pixels`."""
    thumbnail = torch.from_numpy(small_thumbnail(pixels).copy()).permute(2, 0, 1)[None] / 255
    return "infrared" if float(net(thumbnail)[0]) > 0 else "ordinary"


def build_camera_net(weights: Any, path: str) -> CameraNet:
    """The network of the weights that a released file holds. Raises UserError."""
    net = CameraNet()
    try:
        net.load_state_dict({name: value.float() for name, value in weights.items()})
        good = all(bool(p.isfinite().all()) for p in net.parameters())
    except (AttributeError, RuntimeError, TypeError, ValueError):
        good = False
    if not good:
        raise UserError(f"{path}: what tells its cameras apart is damaged; use another checkpoint")
    return net.eval()
