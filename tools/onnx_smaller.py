"""Smaller ONNX files of an exported network: in 16-bit floats or in 8-bit integers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

from support.decoding import read_image
from support.metrics import psnr_of
from support.pairs import pictures_by_stem
from support.settings import UserError

ROUNDS = 5
SIDE = 256  # of the pieces that calibrate
MOST = 32  # pictures that calibrate, and pictures that check
LEAST = {"fp16": 45.0, "int8": 38.0}  # dB between the outputs and PyTorch's
# what stays in 32 bits: the view of the whole sets every pixel, the stem reads logarithms and
# ratios of wide range, the flow's own 1x1 convolutions and its last layers set a pixel's value
# directly; together they are a small share of the work
EXACT = ("global_branch.", "local_branch.stem.", "residual.", ".out.")


def as_array(pixels: np.ndarray) -> np.ndarray:
    """(1, 3, H, W) float32 in [0, 1] of (H, W, 3) uint8 pixels."""
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None]).astype(np.float32) / 255


def some_pictures(folder: str, option: str) -> list[np.ndarray]:
    """At most MOST pictures of `folder`, evenly spread, (H, W, 3) uint8. Raises UserError."""
    paths = list(pictures_by_stem(folder, option).values())
    places = np.linspace(0, len(paths) - 1, min(MOST, len(paths))).round().astype(int)
    return [read_image(paths[place]) for place in places]


class Pieces(CalibrationDataReader):
    """The middle SIDE x SIDE pixels of pictures, or what there is of them, for calibration."""

    def __init__(self, pictures: Sequence[np.ndarray]) -> None:
        self.pieces: Iterator[np.ndarray] = map(self._middle, pictures)

    @staticmethod
    def _middle(pixels: np.ndarray) -> np.ndarray:
        top, left = (max(0, (side - SIDE) // 2) for side in pixels.shape[:2])
        return as_array(pixels[top : top + SIDE, left : left + SIDE])

    def get_next(self) -> dict[str, np.ndarray] | None:
        piece = next(self.pieces, None)
        return None if piece is None else {"low": piece}


def to_half(path: Path) -> None:
    """Rewrite the file with 16-bit weights and arithmetic; input and output stay float32.

    A processor without 16-bit arithmetic computes in 32 bits and rounds in between.
    """
    exact = [*DEFAULT_OP_BLOCK_LIST, "Resize"]  # what has no 16-bit form
    model = convert_float_to_float16(onnx.load(path), keep_io_types=True, op_block_list=exact)
    onnx.save(model, path)


def exact_nodes(model: Any) -> list[str]:
    """The names of the convolutions that stay in 32 bits."""
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    return [
        node.name
        for node in convolutions
        if len(node.input) < 3 or any(part in node.input[1] for part in EXACT)
    ]


def to_integers(path: Path, pictures: Sequence[np.ndarray]) -> None:
    """Rewrite the file with convolutions in 8-bit integers, their ranges those that `pictures` of
    the training show (static quantisation, a scale for each channel of the weights)."""
    model = onnx.load(path)
    quantize_static(
        model,
        path,
        Pieces(pictures),
        per_channel=True,
        reduce_range=True,  # processors without VNNI add pairs of products in 16 bits
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=["Conv"],
        nodes_to_exclude=exact_nodes(model),
    )


def parity(
    session: Any, reference: Callable[[np.ndarray], np.ndarray], pictures: Sequence[np.ndarray]
) -> list[float]:
    """PSNR in dB between the outputs of an ONNX session and of `reference`, for each picture."""
    found = []
    for pixels in pictures:
        low = as_array(pixels)
        found.append(psnr_of(session.run(None, {"low": low})[0].clip(0, 1), reference(low)))
    return found


def seconds_by_turns(works: Sequence[Callable[[], Any]]) -> list[float]:
    """The median seconds of each of `works`, by turns, the first round left out."""
    taken: list[list[float]] = [[] for _ in works]
    for turn in range(ROUNDS + 1):
        for work, times in zip(works, taken, strict=True):
            started = time.perf_counter()
            work()
            if turn:
                times.append(time.perf_counter() - started)
    return [statistics.median(times) for times in taken]


def opened_session(path: Path) -> Any:
    """An onnxruntime session on the processor, with as many threads as PyTorch."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def check_parity(precision: str, found: Sequence[float]) -> None:
    """Raises UserError where an output is too far from PyTorch's."""
    if min(found) < LEAST[precision]:
        far = f"an output is {min(found):.1f} dB from PyTorch's, below {LEAST[precision]:g}"
        raise UserError(f"--precision {precision}: {far}; not written, use fp32")
