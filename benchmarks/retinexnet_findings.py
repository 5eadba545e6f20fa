"""Two findings of a student project on RetinexNet: white images, and noise in plain zones.

    python benchmarks/retinexnet_findings.py [--minutes 10] [--weights VARIANT=FILE] \\
        [--only VARIANT ...] [--set KEY=VALUE ...]

The first is said to come from joint training, the second from resizing in place of transposed
convolutions. Trains each variant for --minutes by baselines/retinexnet.json, and prints means over
the evaluation pairs:

psnr, ssim         of the enhanced picture at 128x128
best light         PSNR with the best illumination there is for that reflectance, by least squares
                   at each pixel, in place of Enhance-Net's; what is missing then is the
                   reflectance's colour
relit, its white   mean of the new illumination, clamped to 1, and the share of it from 0.98; "white
                   images" would be near 1
white              share of the enhanced pixels whose three channels all exceed 0.9; the target's
                   share stands beside it
plain noise        deviation of what a Gaussian of 2 pixels removes, over the flattest fifth of the
                   target, at the pictures' own size, divided by the target's own

Writes results/retinexnet_findings_*/: findings.csv, a strip input | reflectance | relit | enhanced
| target of every tenth scene and variant, and the trained weights.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from compare import Task, markdown, read_command_line, train
from scipy.ndimage import gaussian_filter

import model_script as ms
from baselines import system_class
from support.files import results_folder, write_csv
from support.metrics import image_metrics, psnr_of
from support.pictures import resize, to_tensor, triptych, write_image
from support.settings import UserError, complain

VARIANTS: dict[str, dict[str, Any]] = {
    "split": {"training": "split"},
    "split, transposed": {"training": "split", "transposed": True},
    "join": {"training": "join"},
    "join, transposed": {"training": "join", "transposed": True},
    "ignore_ienhance": {"training": "ignore_ienhance"},
}


def detail(image: np.ndarray) -> np.ndarray:
    """What a Gaussian of 2 pixels removes from an (H, W, 3) picture."""
    return image - gaussian_filter(image, (2, 2, 0))


def plain_zones(target: np.ndarray) -> np.ndarray:
    """(H, W), true in the fifth of an (H, W, 3) picture that varies least within some 4 pixels."""
    grey = target.mean(2)
    spread = gaussian_filter(grey**2, 4) - gaussian_filter(grey, 4) ** 2
    return spread <= np.quantile(spread, 0.2)


def white_share(image: np.ndarray) -> float:
    """Share of an (H, W, 3) picture's pixels whose three channels all exceed 0.9."""
    return float((image.min(2) > 0.9).mean())


def findings(
    model: ms.System, low: torch.Tensor, high: torch.Tensor
) -> tuple[dict[str, float], list[torch.Tensor]]:
    """(The figures of one pair (1, 3, H, W), the pictures of its strip.)"""
    small_low, small_high = (resize(image, (128, 128), quantise=True) for image in (low, high))
    maps, enhanced = model.pictures(low), model.enhance(low)
    ours, target = (image[0].permute(1, 2, 0).double().numpy() for image in (enhanced, high))
    pictures = [
        image[0].permute(1, 2, 0).double().numpy()
        for image in (model.enhance(small_low), small_high)
    ]
    scores, zones = image_metrics(*pictures), plain_zones(target)
    reflectance = model.pictures(small_low)["reflectance"]
    light = (reflectance * small_high).sum(1, keepdim=True) / (reflectance**2).sum(
        1, keepdim=True
    ).clamp(min=1e-6)
    lit = (reflectance * light).clamp(0, 1)[0].permute(1, 2, 0).double().numpy()
    return {
        "psnr": scores["psnr"],
        "ssim": scores["ssim"],
        "best light": psnr_of(lit, pictures[1]),
        "relit": float(maps["relit"].mean()),
        "relit white": float((maps["relit"] >= 0.98).float().mean()),
        "white": white_share(ours),
        "target white": white_share(target),
        "plain noise": float(detail(ours)[zones].std() / max(detail(target)[zones].std(), 1e-3)),
    }, [low[0], maps["reflectance"][0], maps["relit"][0], enhanced[0], high[0]]


@torch.no_grad()
def measure(task: Task) -> None:
    """Train or load each variant, measure, write."""
    weights, store = task.weights, task.store()
    folder = results_folder(task.use.results_dir, "retinexnet_findings")
    table = []
    for name in task.only:
        plain = name.replace(", ", "_")
        if name not in weights:
            with torch.enable_grad():
                weights[name] = train("RetinexNet", task, folder / plain, VARIANTS[name])
        given = VARIANTS[name] | {"device": "cpu"}
        model = ms.load_model(str(weights[name]), given, system_class("RetinexNet")).model
        rows = []
        for index in range(len(store)):
            low, high = (to_tensor(pixels)[None] for pixels in store[index])
            row, pictures = findings(model, low, high)
            rows.append(row)
            if index % 10 == 0:
                strip = triptych(pictures, ["input", "reflectance", "relit", "enhanced", "target"])
                write_image(folder / f"{plain}_{store.pairs[index].low.stem}.png", strip)
        table.append(
            {"variant": name}
            | {key: round(float(np.mean([row[key] for row in rows])), 3) for key in rows[0]}
        )
        print(table[-1], flush=True)
        write_csv(folder / "findings.csv", table)
    print(markdown(table) + f"{folder}: findings.csv, *.png")


def main() -> int:
    """The variants that the command line asks for; returns the exit status."""
    try:
        measure(read_command_line(__doc__, 10, dict.fromkeys(VARIANTS, "RetinexNet")))
    except UserError as error:
        return complain(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
