"""Curves: what a training tells TensorBoard, in the first process alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from support.files import make_folder
from support.processes import rank
from support.settings import UserError, is_text


class Curves:
    """What a training logs; without a `writer`, in all but the first process, nothing."""

    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """A point of each curve."""
        for name, value in values.items() if self.writer else ():
            self.writer.add_scalar(name, value, step)

    def text(self, name: str, words: str, step: int) -> None:
        """Some `words`, where there are any."""
        if words and self.writer:
            self.writer.add_text(name, words, step)

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


@contextmanager
def curves_in(folder: Path) -> Iterator[Curves]:
    """The curves of a training, to `folder`. Raises UserError when they cannot be written.

    TensorBoard's thread hands an error on and then dies of it: that traceback would be the second
    report of one full disk.
    """
    from torch.utils.tensorboard import (
        SummaryWriter,
    )  # two seconds to import; only training needs it

    def report(failed: threading.ExceptHookArgs) -> None:
        if not isinstance(failed.exc_value, OSError):
            before(failed)

    before, threading.excepthook = threading.excepthook, report
    others = set(threading.enumerate())
    try:
        if rank():
            yield Curves(None)
            return
        make_folder(folder)
        with SummaryWriter(folder) as writer:
            yield Curves(writer)
    except OSError as error:
        for thread in set(threading.enumerate()) - others:
            thread.join(timeout=1)  # it may still be on its way to its traceback
        where, reason = error.filename or folder, error.strerror or error
        hint = "check the folder and the free space"
        raise UserError(f"{where}: cannot write ({reason}); {hint}") from None
    finally:
        threading.excepthook = before


def is_run_name(name: Any) -> bool:
    """Whether `name` is one that a run may have: it becomes a folder's."""
    return is_text(name) and name != "" and Path(name).name == name and not name.startswith(".")


def run_folder(checkpoint: Mapping[str, Any]) -> Path | None:
    """The folder with the curves of the run that made a checkpoint; None where it is not here.

    A stranger's checkpoint may name any folder, so it must be one that TensorBoard wrote.
    """
    parent, name = checkpoint.get("config", {}).get("log_dir"), checkpoint.get("run_id")
    if not is_text(parent) or not is_run_name(name):
        return None
    folder = Path(parent) / str(name)
    try:
        return folder if any(folder.glob("events.out.tfevents.*")) else None
    except OSError:  # a name that is too long, a folder that is not ours
        return None


def evaluation_curves(
    checkpoint: Mapping[str, Any], summary: Mapping[str, Any], results: Path
) -> None:
    """The means of an evaluation, as points beside the curves of the run that made the weights.

    Where the run's folder is not here nothing is written, and none is made.
    """
    folder = run_folder(checkpoint)
    if folder is None:
        return
    step = checkpoint.get("step", checkpoint.get("epoch"))
    place = step if isinstance(step, int) and 0 <= step < 2**63 else 0
    means = {f"evaluation/{name}": entry["mean"] for name, entry in summary["metrics"].items()}
    try:
        with curves_in(folder) as curves:
            curves.scalars(means, place)
            curves.text("evaluation/details", f"{summary['protocol']}, {results}", place)
    except UserError as error:  # the results are there all the same
        print(f"curves: {error}")
        return
    print(f"curves: the means are points of {folder}, too")
