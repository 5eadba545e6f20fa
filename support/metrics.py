"""Metrics: float images in [0, 1], (H, W, 3), by scikit-image."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import skimage
import torch

GREY = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as in the literature's test scripts


def check_range(*images: np.ndarray) -> None:
    """Metrics assume a peak of 1; one value of 1.001 must not turn into a guess."""
    for image in images:
        if image.min() < 0 or image.max() > 1:
            raise ValueError(
                f"images must be in [0, 1], got [{image.min():.4f}, {image.max():.4f}]"
            )


def psnr_of(enhanced: np.ndarray, high: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB; 100 for equal images, so that means stay finite."""
    check_range(enhanced, high)
    if np.array_equal(enhanced, high):
        return 100.0
    return float(skimage.metrics.peak_signal_noise_ratio(high, enhanced, data_range=1.0))


def ssim_of(enhanced: np.ndarray, high: np.ndarray) -> float:
    """Structural similarity of (H, W, 3) or grey (H, W) images, scikit-image's default window."""
    check_range(enhanced, high)
    axis = 2 if enhanced.ndim == 3 else None
    return float(
        skimage.metrics.structural_similarity(high, enhanced, data_range=1.0, channel_axis=axis)
    )


def ciede2000_of(enhanced: np.ndarray, high: np.ndarray) -> float:
    """Mean colour difference CIEDE2000 (about 1 is just noticeable)."""
    lab = [skimage.color.rgb2lab(image) for image in (enhanced, high)]
    return float(skimage.color.deltaE_ciede2000(*lab).mean())


def colourfulness(image: np.ndarray) -> float:
    """Hasler & Suesstrunk 2003, eq. 9-11; 0 for grey."""
    red_green = image[..., 0] - image[..., 1]
    yellow_blue = (image[..., 0] + image[..., 1]) / 2 - image[..., 2]
    spread = math.hypot(red_green.std(), yellow_blue.std())
    return spread + 0.3 * math.hypot(red_green.mean(), yellow_blue.mean())


def wasserstein_of(enhanced: np.ndarray, high: np.ndarray) -> float:
    """Exact 1-Wasserstein distance between the channels' value distributions, mean over R, G, B, in
    [0, 1]."""
    a, b = (np.sort(image.reshape(-1, 3), axis=0) for image in (enhanced, high))
    return float(np.abs(a - b).mean())


def match_mean(enhanced: np.ndarray, high: np.ndarray) -> np.ndarray:
    """`enhanced` at the target's mean grey: the literature's GT-mean trick. It uses the ground
    truth."""
    return np.clip(enhanced * ((high @ GREY).mean() / max((enhanced @ GREY).mean(), 1e-6)), 0, 1)


def image_metrics(enhanced: np.ndarray, high: np.ndarray) -> dict[str, float]:
    """Every score of one picture, (H, W, 3) float in [0, 1] each. Names ending in gt_mean had help
    from the ground truth."""
    matched = match_mean(enhanced, high)
    return {
        "psnr": psnr_of(enhanced, high),
        "ssim": ssim_of(enhanced, high),
        "ciede2000": ciede2000_of(enhanced, high),
        "colourfulness_ratio": colourfulness(enhanced) / max(colourfulness(high), 1e-6),
        "wasserstein": wasserstein_of(enhanced, high),
        "psnr_gt_mean": psnr_of(matched, high),
        "ssim_grey_gt_mean": ssim_of(np.clip(matched @ GREY, 0, 1), np.clip(high @ GREY, 0, 1)),
    }


def validation_means(
    scores: Sequence[tuple[str, dict[str, float]]],
) -> tuple[dict[str, float], float]:
    """(means of (source, row) under SOURCE/NAME, what the best weights are chosen by).

    The nameless source has plain names, and its PSNR chooses. Of several sources it is the mean
    over them of (PSNR + GT-mean PSNR) / 2 + 20 SSIM: raw PSNR of few pairs is mostly brightness.
    """
    means: dict[str, float] = {}
    choices = []
    for source in dict.fromkeys(name for name, _ in scores):
        rows = [row for name, row in scores if name == source]
        mean = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
        mixed = (mean["psnr"] + mean["psnr_gt_mean"]) / 2 + 20 * mean["ssim"]
        choices.append(mixed if source else mean["psnr"])
        means |= {f"{source}/{name}" if source else name: value for name, value in mean.items()}
    return means, float(np.mean(choices))


def told(means: dict[str, float]) -> str:
    """The validation means that a line has room for."""
    names = ("psnr", "ssim", "psnr_gt_mean", "bits_per_dim")
    shown = {name: value for name, value in means.items() if name.split("/")[-1] in names}
    return "  ".join(f"{name} {value:.4g}" for name, value in shown.items())


LOWER_IS_BETTER = (
    *("ciede2000", "wasserstein", "bits_per_dim", "seconds"),
    *("clipped_new", "black_new", "noise_flat"),
)
NEITHER_IS_BETTER = ("brightness", "colourfulness")  # they have no worst file


def summarise(
    rows: Sequence[dict[str, Any]], lower_is_better: Sequence[str] = ()
) -> dict[str, dict[str, Any]]:
    """Mean, deviation, median and, where a direction is better, the worst file of every metric.

    `lower_is_better` names further columns to LOWER_IS_BETTER.
    """
    summary = {}
    for name in rows[0]:
        if name in ("filename", "twin_in_training", "camera"):
            continue
        values = np.array([row[name] for row in rows])
        # the worst colourfulness ratio is the one farthest from the target's
        distance = (
            np.abs(np.log(values + 1e-9))
            if name == "colourfulness_ratio"
            else values
            if name in (*LOWER_IS_BETTER, *lower_is_better)
            else -values
        )
        summary[name] = {
            "mean": float(values.mean()),
            "std": float(values.std()),
            "median": float(np.median(values)),
        }
        if name not in NEITHER_IS_BETTER:
            worst = int(distance.argmax())
            summary[name] |= {"worst": float(values[worst]), "worst_file": rows[worst]["filename"]}
        summary[name]["uses_ground_truth"] = name.endswith("gt_mean")
    return summary


def evaluation_summary(
    rows: list[dict[str, Any]],
    checkpoint: str | None,
    facts: dict[str, Any],
    lower_is_better: Sequence[str] = (),
) -> dict[str, Any]:
    """The content of summary.json: of all pairs, of those without a twin in training where some
    have one, and `facts`. Scores that the rows lack are left out, and without a checkpoint what it
    says."""
    means = summarise(rows, lower_is_better)
    alone = [row for row in rows if row.get("twin_in_training") is False]
    without: dict[str, Any] | None = None
    if alone and any(row["twin_in_training"] for row in rows):
        without = {"num_images": len(alone), "metrics": summarise(alone, lower_is_better)}
    source: dict[str, Any] = {}
    if "seconds" in means:
        source["seconds_per_image"] = means["seconds"]["median"]
    if checkpoint is not None:
        digest = hashlib.sha256(Path(checkpoint).read_bytes()).hexdigest()
        source |= {"checkpoint": checkpoint, "checkpoint_sha256": digest}
    return {
        "num_images": len(rows),
        **{name: means[name]["mean"] for name in ("psnr", "ssim") if name in means},
        "metrics": means,
        "without_twins": without,
        **source,
        "versions": {"python": sys.version.split()[0]}
        | {module.__name__: module.__version__ for module in (torch, np, skimage)},
        **facts,
    }


def print_summary(summary: dict[str, Any]) -> None:
    """Means on all pairs and on those whose target was not trained on."""
    parts = [("all", summary["num_images"], summary["metrics"])]
    if summary["without_twins"]:
        alone = summary["without_twins"]
        parts.append(("no twin in training", alone["num_images"], alone["metrics"]))
    for label, count, scores in parts:
        means = "  ".join(f"{name} {value['mean']:.4g}" for name, value in scores.items())
        print(f"{label} ({count}): {means}")
