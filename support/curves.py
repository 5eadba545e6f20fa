"""Curves: what a training tells TensorBoard, in the first process alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from support.files import make_folder
from support.processes import rank


class Curves:
    """A TensorBoard log in `folder` as a context; in all but the first process it does nothing."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter  # two seconds; only training needs it

        self.writer: Any = None
        if rank() == 0:
            make_folder(folder)
            self.writer = SummaryWriter(folder)

    def __enter__(self) -> Curves:
        return self

    def __exit__(self, *_: Any) -> None:
        if self.writer:
            self.writer.close()

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """A point of each curve."""
        for name, value in values.items() if self.writer else ():
            self.writer.add_scalar(name, value, step)

    def validation(self, images: Sequence[Tensor], latents: Sequence[Tensor], step: int) -> None:
        """Pictures (3, H, W) in [0, 1], and the histogram of the standardised latents."""
        for place, image in enumerate(images if self.writer else ()):
            self.writer.add_image(f"validation/low_enhanced_high_{place}", image, step)
        if latents and self.writer:
            latent = torch.cat(list(latents))
            self.writer.add_histogram("validation/standardised_latent", latent, step)

    def conclude(self, config: Mapping[str, Any], found: Mapping[str, float]) -> None:
        """The run's settings beside what came of them."""
        if self.writer:
            plain = {k: str(v) if isinstance(v, list) else v for k, v in config.items()}
            self.writer.add_hparams(plain, dict(found), run_name=".")
