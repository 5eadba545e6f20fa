"""The deterministic enhancement as one ONNX file, for other languages and runtimes.

    pip install onnx onnxruntime onnxscript
    python tools/export_onnx.py --output enhancer.onnx [--checkpoint FILE]
    python tools/export_onnx.py --output half.onnx --precision fp16 --check HELD_OUT/low
    python tools/export_onnx.py --output small.onnx --precision int8 --check HELD_OUT/low \\
        --calibrate TRAIN/low

The file has free height and width. It is compared with PyTorch at three sizes before it is written,
and then timed beside it. fp16 and int8 are compared once more, on the pictures of --check: every
output must be within 45 and 38 dB (PSNR) of PyTorch's. The pictures of --calibrate set the ranges
of the 8-bit integers.
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
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from repository import load_any
from torch import Tensor, nn

import model_script as ms
from support.cameras import CAMERAS
from support.commands import run, shipped
from support.files import atomic_path
from support.settings import OneLineParser, RunError, UserError

SIZES = ((64, 96), (131, 201), (400, 600))
TOLERANCE = 1e-3
PRECISIONS = ("fp32", "fp16", "int8")


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


def need_packages() -> None:
    """Raises UserError, which names it, where one is missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        packages = "onnx onnxruntime onnxscript"
        raise UserError(f"needs the package {error.name}; run pip install {packages}") from None


def write_network(enhancer: Enhancer, path: Path, name: str) -> None:
    """The ONNX file of a network of the system `name`, in 32 bits. Raises UserError."""
    sides = {
        2: torch.export.Dim("height", min=16, max=65536),
        3: torch.export.Dim("width", min=16, max=65536),
    }
    try:
        torch.onnx.export(
            enhancer,
            (torch.rand(1, 3, 120, 168),),
            path,
            input_names=["low"],
            output_names=["enhanced"],
            dynamic_shapes={"low": sides},
            opset_version=20,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    except torch.onnx.OnnxExporterError:
        hint = "use model_script.py --mode enhance"
        raise UserError(f"ONNX cannot express what {name} computes; {hint}") from None


def compare_sizes(enhancer: Enhancer, session: Any, target: Path) -> None:
    """Compare both on random pictures of SIZES. Raises RunError where they differ."""
    generator = torch.Generator().manual_seed(0)
    for height, width in SIZES:
        low = torch.rand(1, 3, height, width, generator=generator) ** 3
        found = session.run(None, {"low": low.numpy()})[0]
        difference = float(np.abs(found - enhancer(low).numpy()).max())
        print(f"{height}x{width}: largest difference from PyTorch {difference:.1e}")
        if not difference < TOLERANCE:
            problem = f"ONNX and PyTorch differ by {difference:.3g}"
            raise RunError(f"{target}: {problem}; not written, please report it")


def make_smaller(
    enhancer: Enhancer, path: Path, precision: str, pictures: dict[str, list[np.ndarray]]
) -> None:
    """Rewrite the file at `path` in fewer bits, calibrated and checked on the `pictures` of these
    options. Raises UserError."""
    import onnx_smaller as smaller

    if precision == "fp16":
        smaller.to_half(path)
    else:
        smaller.to_integers(path, pictures["calibrate"])
    session = smaller.opened_session(path)
    dark = pictures["check"]
    found = smaller.parity(session, lambda low: enhancer(torch.from_numpy(low)).numpy(), dark)
    brief = f"mean {np.mean(found):.1f} dB, least {min(found):.1f}"
    print(f"{precision} on the {len(found)} pictures of --check: {brief}, against PyTorch")
    smaller.check_parity(precision, found)


def tell_speed(enhancer: Enhancer, path: Path) -> None:
    """Print the seconds of a 600x400 picture by onnxruntime and by PyTorch, by turns."""
    import onnx_smaller as smaller

    low, session = torch.rand(1, 3, 400, 600) ** 3, smaller.opened_session(path)
    works = (lambda: session.run(None, {"low": low.numpy()}), lambda: enhancer(low))
    ours, theirs = smaller.seconds_by_turns(works)
    threads = f"{torch.get_num_threads()} threads, medians of {smaller.ROUNDS}"
    print(f"600x400: onnxruntime {ours:.3f} s, PyTorch in fp32 {theirs:.3f} s ({threads})")


def export(arguments: argparse.Namespace) -> None:
    """Write the ONNX file of a checkpoint and say how to run it; of two networks, that of
    `camera`.

    Raises UserError.
    """
    checkpoint, target, camera = arguments.checkpoint, Path(arguments.output), arguments.camera
    if target.suffix.lower() != ".onnx":
        raise UserError(f"--output {target}: the suffix must be .onnx")
    need_packages()
    from onnx_smaller import opened_session, some_pictures

    given = {"check": arguments.check, "calibrate": arguments.calibrate}
    pictures = {key: some_pictures(value, f"--{key}") for key, value in given.items() if value}
    loaded = load_any(checkpoint, {"device": "cpu"})
    if camera == "infrared" and loaded.infrared is None:
        raise UserError(f"--camera infrared: {checkpoint} holds one network; leave it out")
    model = loaded.infrared if camera == "infrared" else loaded.model
    enhancer = Enhancer(model)
    with atomic_path(target) as temporary, torch.no_grad(), quiet():
        write_network(enhancer, temporary, model.name())
        compare_sizes(enhancer, opened_session(temporary), target)
        if arguments.precision != "fp32":
            make_smaller(enhancer, temporary, arguments.precision, pictures)
        tell_speed(enhancer, temporary)
    size, form = f"{target.stat().st_size / 2**20:.1f} MiB", "float32 in [0, 1]"
    print(f"{target}: {size}; low (1, 3, H, W) {form} -> enhanced, sides from 16")
    print("to run it:")
    print(f"  session = onnxruntime.InferenceSession({str(target)!r})")
    print('  enhanced = session.run(None, {"low": low})[0]')


def check_options(arguments: argparse.Namespace) -> None:
    """Raises UserError for options that are lacking, or that do nothing."""
    precision = arguments.precision
    wanted = {"fp32": (), "fp16": ("check",), "int8": ("check", "calibrate")}[precision]
    for name in ("check", "calibrate"):
        if name in wanted and not getattr(arguments, name):
            raise UserError(f"--precision {precision} needs --{name} FOLDER, of dark pictures")
        if name not in wanted and getattr(arguments, name):
            raise UserError(f"--{name} does nothing with --precision {precision}; leave it out")


def main(argv: Sequence[str] | None = None) -> int:
    """Export; returns the exit status."""
    parser = OneLineParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--output", metavar="FILE", required=True, help="the ONNX file")
    weights = "a file, or released (the default) or fast"
    add("--checkpoint", metavar="FILE", type=shipped, default=str(ms.RELEASED), help=weights)
    add("--camera", choices=CAMERAS, default="ordinary", help="of released weights, which network")
    add("--precision", choices=PRECISIONS, default="fp32", help="default: fp32")
    add("--check", metavar="FOLDER", help="fp16, int8: dark pictures to compare the outputs on")
    add("--calibrate", metavar="FOLDER", help="int8: dark pictures of the training")

    def work() -> int:
        arguments = parser.parse_args(argv)
        check_options(arguments)
        export(arguments)
        return 0

    return run(work)


if __name__ == "__main__":
    sys.exit(main())
