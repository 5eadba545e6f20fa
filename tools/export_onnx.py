"""The deterministic enhancement as one ONNX file, for other languages and runtimes.

    pip install onnx onnxruntime onnxscript
    python tools/export_onnx.py --output enhancer.onnx [--checkpoint FILE]

The file has free height and width. It is compared with PyTorch at three sizes before it is written.
"""

from __future__ import annotations

import argparse
import copy
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from repository import load_any
from torch import Tensor, nn

import model_script as ms
from support.cameras import CAMERAS
from support.commands import run
from support.files import atomic_path
from support.settings import OneLineParser, RunError, UserError

SIZES = ((64, 96), (131, 201), (400, 600))
TOLERANCE = 1e-3


class FixedConv(nn.Module):
    """The inverse of an InvertibleConv with its matrix worked out, which ONNX has no operator
    for."""

    weight: Tensor

    def __init__(self, layer: ms.InvertibleConv) -> None:
        super().__init__()
        inverse = torch.linalg.inv(layer.weight().double()).float()
        self.register_buffer("weight", inverse[:, :, None, None])

    def inverse(self, y: Tensor, condition: Tensor | None = None) -> Tensor:
        return F.conv2d(y, self.weight)


class Enhancer(nn.Module):
    """low (1, 3, H, W) in [0, 1] -> enhanced, the same shape; all that `enhance` does, thumbnail
    and padding included."""

    def __init__(self, model: ms.System) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).float().cpu().eval()
        for flow in [module for module in self.model.modules() if isinstance(module, ms.Flow)]:
            for place, layer in enumerate(flow.layers):
                if isinstance(layer, ms.InvertibleConv):
                    flow.layers[place] = FixedConv(layer)

    def forward(self, low: Tensor) -> Tensor:
        return self.model.enhance(low)


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings: the exporter tells of its own deprecations and of guesses that it mends
    itself."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def export(checkpoint: str, target: Path, camera: str = "ordinary") -> None:
    """Write the ONNX file of a checkpoint and say how to run it; of two networks, that of `camera`.

    Raises UserError.
    """
    if target.suffix.lower() != ".onnx":
        raise UserError(f"--output {target}: the suffix must be .onnx")
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        packages = "onnx onnxruntime onnxscript"
        raise UserError(f"needs the package {error.name}; run pip install {packages}") from None
    loaded = load_any(checkpoint, {"device": "cpu"})
    if camera == "infrared" and loaded.infrared is None:
        raise UserError(f"--camera infrared: {checkpoint} holds one network; leave it out")
    model = loaded.infrared if camera == "infrared" else loaded.model
    enhancer = Enhancer(model)
    sides = {
        2: torch.export.Dim("height", min=16, max=65536),
        3: torch.export.Dim("width", min=16, max=65536),
    }
    with atomic_path(target) as temporary, torch.no_grad(), quiet():
        try:
            torch.onnx.export(
                enhancer,
                (torch.rand(1, 3, 120, 168),),
                temporary,
                input_names=["low"],
                output_names=["enhanced"],
                dynamic_shapes={"low": sides},
                opset_version=20,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError:
            name = model.name()
            hint = "use model_script.py --mode enhance"
            raise UserError(f"ONNX cannot express what {name} computes; {hint}") from None
        session = onnxruntime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])
        generator = torch.Generator().manual_seed(0)
        for height, width in SIZES:
            low = torch.rand(1, 3, height, width, generator=generator) ** 3
            found = session.run(None, {"low": low.numpy()})[0]
            difference = float(np.abs(found - enhancer(low).numpy()).max())
            print(f"{height}x{width}: largest difference from PyTorch {difference:.1e}")
            if not difference < TOLERANCE:
                problem = f"ONNX and PyTorch differ by {difference:.3g}"
                raise RunError(f"{target}: {problem}; not written, please report it")
    size, form = f"{target.stat().st_size / 2**20:.1f} MiB", "float32 in [0, 1]"
    print(f"{target}: {size}; low (1, 3, H, W) {form} -> enhanced, sides from 16")
    print("to run it:")
    print(f"  session = onnxruntime.InferenceSession({str(target)!r})")
    print('  enhanced = session.run(None, {"low": low})[0]')


def main(argv: Sequence[str] | None = None) -> int:
    """Export; returns the exit status."""
    parser = OneLineParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--output", metavar="FILE", required=True, help="the ONNX file")
    add("--checkpoint", metavar="FILE", default=str(ms.RELEASED), help="default: released weights")

    add("--camera", choices=CAMERAS, default="ordinary", help="of released weights, which network")

    def work() -> int:
        arguments = parser.parse_args(argv)
        export(arguments.checkpoint, Path(arguments.output), arguments.camera)
        return 0

    return run(work)


if __name__ == "__main__":
    sys.exit(main())
