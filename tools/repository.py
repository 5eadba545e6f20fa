"""What the tools share: the repository on Python's path, and the model of any checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import baselines
import model_script as ms
from support.checkpoints import load_checkpoint
from support.settings import UserError

ROOT = Path(__file__).resolve().parent.parent


def system_of(path: str) -> type[ms.System]:
    """The class of the model that a checkpoint holds, ours or a baseline's. Raises UserError."""
    system = load_checkpoint(path).get("system", ms.ConditionalFlow.system)
    if system not in baselines.SYSTEMS:
        known = ", ".join(baselines.SYSTEMS)
        raise UserError(f"{path}: holds weights of {system}, which is none of {known}")
    return baselines.system_class(system)


def load_any(path: str, given: dict[str, Any]) -> ms.Loaded:
    """A checkpoint's model, of whichever system it is, under the settings `given`."""
    return ms.load_model(path, given, system_of(path))
