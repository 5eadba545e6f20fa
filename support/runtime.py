"""Runtime: where to compute and how precisely."""

from __future__ import annotations

import os
import shutil
import sys
from typing import NamedTuple, TypeVar, cast

import torch
from torch import nn

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
