"""Runtime: where to compute, how precisely, and by which commit of the code."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import nn
from torch.utils.data import default_collate

from support.settings import UserError

Model = TypeVar("Model", bound=nn.Module)
Batch = TypeVar("Batch", bound=tuple)


class Runtime(NamedTuple):
    """Where and how precisely to compute; decided once. `dtype` is that of autocast, float32 for
    none."""

    device: torch.device
    dtype: torch.dtype

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def place(self, model: Model) -> Model:
        """The model on the device, channels last: 1.2x (batch 8) to 9x (batch 1) faster 3x3
        convolutions on CPU."""
        return model.to(self.device).to(memory_format=torch.channels_last)

    def batch(self, sample: Batch) -> Batch:
        """A named tuple of tensors on the device."""
        return type(sample)(*(part.to(self.device, non_blocking=True) for part in sample))

    @torch.no_grad()
    def losses_of(self, model: Any, samples: Sequence[Any], seed: int) -> dict[str, float]:
        """The terms of `model.losses` on one batch of `samples`, and their sum, total.

        What it draws at random follows from `seed`; what others draw afterwards stays the same.
        """
        batch = self.batch(default_collate(list(samples)))
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), self.autocast():
            torch.manual_seed(seed)
            terms = {name: float(term) for name, term in model.losses(batch).items()}
        return terms | {"total": sum(terms.values())}

    def __str__(self) -> str:
        threads = f"{torch.get_num_threads()} threads"
        cuda = self.device.type == "cuda"
        name = torch.cuda.get_device_name(self.device) if cuda else threads
        return f"{self.device.type} ({name}), {str(self.dtype).removeprefix('torch.')}"


def choose_runtime(device: str, mixed: bool) -> Runtime:
    """The device that is asked for and, where `mixed`, the half precision it is good at.

    Raises UserError for a device that is not there.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    there["cpu"] = True
    name = next(n for n in there if there[n]) if device == "auto" else device
    if not there[name]:
        raise UserError(f"device: {name} is not available here; use --set device=auto")
    dtype = torch.float32
    if mixed and name == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = torch.bfloat16 if native else torch.float16
    if mixed and name == "cpu" and torch.cpu._is_avx512_bf16_supported():
        dtype = torch.bfloat16  # emulated bf16, on processors without it, is slower than fp32
    return Runtime(torch.device(name), dtype)


def cpp_compiler() -> str:
    """The C++ compiler that torch.compile calls on the processor."""
    return os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")


def compiled(module: nn.Module, device: torch.device) -> nn.Module:
    """`module` by torch.compile, with the random numbers that it draws without. Raises UserError
    without a C++ compiler."""
    if device.type == "cpu" and not shutil.which(cpp_compiler()):
        lacking = f"{cpp_compiler()} is not here; install it or use --set compile=false"
        raise UserError(f"compile: needs a C++ compiler, and {lacking}")
    return cast(nn.Module, torch.compile(module, options={"fallback_random": True}))


@functools.cache
def git_commit() -> str:
    """The commit that is checked out here; empty without git, or where this is no repository."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():  # git itself would take a repository further up
        return ""
    try:
        command = ["git", "-C", str(root), "rev-parse", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, ValueError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def commits(checkpoint: Mapping[str, Any]) -> dict[str, str]:
    """The commits of the code that runs and of the code that made a checkpoint; empty: unknown."""
    made = checkpoint.get("commit")
    known = isinstance(made, str) and len(made) <= 64
    return {"commit": git_commit(), "checkpoint_commit": str(made) if known else ""}
