"""Loaded: a model in use, which network a picture is for, and what names an enhancement."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from torch import nn

from support import cameras, journal
from support.known import Known
from support.runtime import Runtime

# what changes a picture, beside the weights
LOOK_KEYS: tuple[str, ...] = ("camera", "temperature", "samples", "uncertainty", "exposure")
LOOK_KEYS += ("strength", "denoise", "quality")


class Loaded(NamedTuple):
    """A model to use, where it computes, and the checkpoint that it came from.

    Released weights may hold a second network, for infrared pictures, which `choose` finds.
    """

    model: Any
    use: Any
    runtime: Runtime
    checkpoint: dict[str, Any]
    known: Known | None = None
    infrared: Any = None
    camera_net: nn.Module | None = None

    def knows(self, pixels: np.ndarray) -> bool | None:
        """Whether (H, W, 3) pixels look like a picture that the weights were trained on; None where
        the checkpoint does not say what those look like."""
        return None if self.known is None else not self.known.strange(pixels)

    def choose(self, pixels: np.ndarray) -> tuple[Any, str]:
        """(the network for (H, W, 3) pixels, the camera that it is for; empty where there is one).

        `camera` says which, or, where that is auto, the picture's thumbnail.
        """
        camera = self.use.camera
        if self.infrared is None or self.camera_net is None:
            return self.model, ""
        if camera == "auto":
            camera = cameras.camera_of(pixels, self.camera_net)
        return (self.infrared if camera == "infrared" else self.model), camera

    def made_with(self, path: str) -> str:
        """What names the weights, of the file `path`, and the settings that change a picture."""
        facts = {key: getattr(self.use, key) for key in LOOK_KEYS}
        facts |= {"reference": [self.use.reference, journal.stamp(self.use.reference)]}
        return journal.fingerprint(path, facts | {"amp": self.model.config.use_amp})
