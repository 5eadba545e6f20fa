"""Curves: what a training tells TensorBoard, in the first process alone."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from support.files import make_folder
from support.processes import rank
from support.settings import UserError


class Curves:
    """A TensorBoard log in `folder` as a context; in all but the first process it does nothing.

    The writer's thread hands an error on, and then dies of it with a traceback: of a full disk that
    would be the second report, so it is kept quiet.
    """

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter  # two seconds; only training needs it

        self.folder = folder
        self.writer: Any = None
        self.others, self.report = set(threading.enumerate()), threading.excepthook
        if rank() == 0:
            make_folder(folder)
            self.writer = SummaryWriter(folder)

    def __enter__(self) -> Curves:
        threading.excepthook = self._quietly
        return self

    def _quietly(self, failed: Any) -> None:
        if not isinstance(failed.exc_value, OSError):
            self.report(failed)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            if self.writer:
                self.writer.close()
        except OSError as late:
            error = late
        if isinstance(error, OSError):
            for thread in set(threading.enumerate()) - self.others:
                thread.join(timeout=1)  # it may still be on its way to its traceback
        threading.excepthook = self.report
        if isinstance(error, OSError):
            where, reason = error.filename or self.folder, error.strerror or error
            hint = "check the folder and the free space"
            raise UserError(f"{where}: cannot write ({reason}); {hint}") from None

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
