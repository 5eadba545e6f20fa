"""Extra metrics: scores by optional packages, pyiqa and stlpips_pytorch, for those who ask."""

from __future__ import annotations

import difflib
import functools
import importlib
import io
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, NamedTuple

import torch
from torch import Tensor

from support.metrics import match_mean
from support.settings import UserError

SHIFT_TOLERANT = "st_lpips"  # Ghildyal & Liu, Shift-tolerant perceptual similarity, ECCV 2022
INSTALL = {"pyiqa": "pyiqa", "stlpips_pytorch": "stlpips_pytorch torchsummary ipython"}
OWN = ("psnr", "ssim", "ciede2000")  # every evaluation has them


class ExtraMetric(NamedTuple):
    """A score of a picture, or of a picture and its target, (1, 3, H, W) in [0, 1] on `device`."""

    name: str
    needs_target: bool
    lower_is_better: bool
    score: Callable[..., Any]
    device: torch.device

    @property
    def columns(self) -> list[str]:
        """Its columns: of the picture and, if it needs a target, at the target's mean grey."""
        return [self.name, f"{self.name}_gt_mean"] if self.needs_target else [self.name]


def names_in(text: str) -> list[str]:
    """The names in a text such as 'niqe,musiq', each once."""
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


@contextmanager
def silence() -> Iterator[None]:
    """What the packages print about their weights, and their warnings, stay away."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def package(module: str, name: str) -> Any:
    """The imported `module`, which the metric `name` needs. Raises UserError with what to
    install."""
    try:
        with silence():
            return importlib.import_module(module)
    except Exception as error:  # a package that is there may fail in any way where others are not
        top = module.partition(".")[0]
        hint = f"run pip install {INSTALL[top]}, or leave {name} out"
        raise UserError(
            f"extra_metrics: {top} cannot be imported ({reason(error)}); {hint}"
        ) from None


def reason(error: BaseException) -> str:
    """The first line of an error, at most 120 characters, or its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


def built(name: str, build: Callable[[], Any]) -> Any:
    """What `build` makes of a metric. Raises UserError where its weights cannot be had."""
    try:
        with silence():
            return build()
    except Exception as error:  # weights are downloaded, which fails in many ways
        hint = "go online once, or leave it out"
        problem = f"{name} could not load its weights ({reason(error)})"
        raise UserError(f"extra_metrics: {problem}; {hint}") from None


def shift_tolerant(device: torch.device) -> ExtraMetric:
    """LPIPS with anti-aliased AlexNet features, whose weights the package holds."""
    module = package("stlpips_pytorch.stlpips", SHIFT_TOLERANT)
    options = dict(net="alex", variant="shift_tolerant", verbose=False)
    network = built(SHIFT_TOLERANT, lambda: module.LPIPS(**options).to(device).eval())
    score = functools.partial(network, normalize=True)  # it works in [-1, 1]
    return ExtraMetric(SHIFT_TOLERANT, True, True, score, device)


def load_extra(text: str, have_targets: bool, device: torch.device) -> list[ExtraMetric]:
    """The metrics that `text` names, by pyiqa but for st_lpips, ready to score.

    Raises UserError, before anything is downloaded, for a package that is not installed, an unknown
    name and a metric that needs targets where there are none; then for weights that cannot be had.
    """
    names = names_in(text)
    for name in names:
        if name in OWN:
            raise UserError(f"extra_metrics: every evaluation has {name}; leave it out")
    others = [name for name in names if name != SHIFT_TOLERANT]
    pyiqa = package("pyiqa", others[0]) if others else None
    known: Collection[str] = pyiqa.list_models() if pyiqa else ()
    with_target = {SHIFT_TOLERANT, *(pyiqa.list_models(metric_mode="FR") if pyiqa else ())}
    for name in names:
        if name in others and name not in known:
            near = difflib.get_close_matches(name[:80], [*known, SHIFT_TOLERANT], n=3, cutoff=0.0)
            hint = f"the nearest are {', '.join(near)}"
            raise UserError(f"extra_metrics: unknown metric {name[:80]}; {hint}")
        if name in with_target and not have_targets:
            hint = "leave it out, or name the targets"
            raise UserError(
                f"extra_metrics: {name} compares with targets, and eval_high_dir is empty; {hint}"
            )
    found = []
    for name in names:
        if name == SHIFT_TOLERANT:
            found.append(shift_tolerant(device))
            continue
        assert pyiqa is not None
        network = built(name, functools.partial(pyiqa.create_metric, name, device=device))
        found.append(
            ExtraMetric(name, name in with_target, bool(network.lower_better), network, device)
        )
    return found


@torch.no_grad()
def extra_scores(
    extra: Sequence[ExtraMetric], enhanced: Tensor, high: Tensor | None, file: str
) -> dict[str, float]:
    """The scores of (3, H, W) pictures in [0, 1]. A metric that needs a target has a second column,
    NAME_gt_mean, of `enhanced` at the target's mean grey.

    Raises UserError where a metric cannot score the picture, which `file` names.
    """
    row: dict[str, float] = {}
    for metric in extra:
        row[metric.name] = one_score(metric, enhanced, high, file)
        if metric.needs_target and high is not None:
            ours, target = (image.permute(1, 2, 0).double().numpy() for image in (enhanced, high))
            matched = torch.from_numpy(match_mean(ours, target)).permute(2, 0, 1).float()
            row[f"{metric.name}_gt_mean"] = one_score(metric, matched, high, file)
    return row


def one_score(metric: ExtraMetric, enhanced: Tensor, high: Tensor | None, file: str) -> float:
    """One number of `extra_scores`, the same in every run. Raises UserError."""
    pictures = [image[None].to(metric.device) for image in (enhanced, high) if image is not None]
    torch.manual_seed(0)  # some take crops at random
    try:
        with silence():
            number = float(metric.score(*pictures[: 1 + metric.needs_target]))
        problem = "gives no finite number for"
    except Exception as error:  # too small a picture, say; each has its own way of saying so
        number, problem = math.nan, f"cannot score ({reason(error)})"
    if not math.isfinite(number):
        size = f"{enhanced.shape[2]}x{enhanced.shape[1]}"
        raise UserError(f"extra_metrics: {metric.name} {problem} {file}, {size}; leave it out")
    return number
