"""Packs two trained networks into one file, with a small one that tells their cameras apart.

    python benchmarks/make_release.py --ordinary runs/ordinary5/best_model.pth \\
        --infrared runs/stage4/best_model.pth --out checkpoints/released.pth \\
        --infrared_pictures A/low --ordinary_pictures B/low --ordinary_pictures A/high \\
        --darken B/high --known A/low --known B/low --known_darkened B/high

The small network (support/cameras.py) is trained here, for about five minutes, on thumbnails of
the named folders, cut, turned, mirrored, brightened and darkened at random. --darken adds
well-exposed pictures as a simulated ordinary camera sees them in the dark. --check FOLDER says how
many of its pictures go to the infrared network, as they are and in warm light; they do not count
for the training. --known and --known_darkened name the pictures that the networks were trained on,
see benchmarks/add_looks.py. Weights are stored in 16 bits.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from add_looks import looks_of  # noqa: E402

from support.cameras import (  # noqa: E402
    SIDE,
    CameraNet,
    build_camera_net,
    camera_of,
    small_thumbnail,
)
from support.checkpoints import RETIRED, camera_parts, load_checkpoint, save_checkpoint  # noqa: E402
from support.decoding import read_image  # noqa: E402
from support.pairs import pictures_by_stem  # noqa: E402
from support.settings import UserError, complain  # noqa: E402
from support.simulated import darkened  # noqa: E402

# A quarter of a step's thumbnails is infrared: there are more kinds of ordinary pictures, and a
# wrong choice costs those more.
INFRARED, STEP, STEPS, RATE, TINT = 32, 128, 9000, 3e-3, 0.3
# Of the ordinary ones some are under a lamp, half of these in places only: blue is up to so many
# stops (of sRGB) weaker, green a tenth to six tenths of that. Such a night looks much like an
# infrared one.
LAMPLIT, WARMEST = 0.5, 3.0
LAMP = 2.0 ** np.array([0.0, -0.8, -2.0])  # for --check

# Added to the log-odds: half-way between the held-out infrared pictures, the lowest of which has
# -0.3, and the held-out ones of LOL and SICE, the highest of which has -3.5.
SHIFT = 1.9
FOLDERS = ("infrared_pictures", "ordinary_pictures", "darken", "check", "known", "known_darkened")


def thumbnails_of(folder: str, darken: bool = False) -> Tensor:
    """(N, 3, 64, 64) in [0, 1] of every picture in `folder`."""
    rng, found = np.random.default_rng(0), []
    for path in pictures_by_stem(folder, "folder").values():
        pixels = read_image(path)
        if darken:
            pixels = darkened(pixels, rng)[0]
        found.append(small_thumbnail(pixels, 2 * SIDE))
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2) / 255


def varied(thumbnails: Tensor, ordinary: Tensor) -> Tensor:
    """(N, 3, 32, 32) windows of (N, 3, 64, 64), mirrored, up to 0.6 stops brighter or darker, at
    256 levels.

    Where `ordinary` (N,) is 1, not 0, each channel is up to TINT stops brighter or darker still,
    and some are under a lamp: ordinary light has many colours, the infrared veil has its own.
    """
    count = len(thumbnails)
    side = torch.empty(count, 2).uniform_(0.5, 1)
    place = torch.zeros(count, 2, 3)
    place[:, 0, 0], place[:, 1, 1] = (side * (2 * torch.randint(0, 2, (count, 2)) - 1)).unbind(1)
    place[:, :, 2] = (2 * torch.rand(count, 2) - 1) * (1 - side)
    grid = F.affine_grid(place, [count, 3, SIDE, SIDE], align_corners=False)
    window = F.grid_sample(thumbnails, grid, align_corners=False)
    stops = torch.empty(count, 1, 1, 1).uniform_(-0.6, 0.6)
    tint = TINT * torch.empty(count, 3, 1, 1).uniform_(-1, 1)
    lit = F.interpolate(torch.rand(count, 1, 4, 4), (SIDE, SIDE), mode="bicubic").clamp(0, 1)
    lit = torch.where(torch.rand(count, 1, 1, 1) < 0.5, lit, 1.0)
    warmth = WARMEST * torch.rand(count, 1, 1, 1) * (torch.rand(count, 1, 1, 1) < LAMPLIT)
    green = torch.empty(count, 1, 1, 1).uniform_(0.1, 0.6)
    weaker = warmth * torch.cat([torch.zeros_like(green), green, torch.ones_like(green)], 1)
    gain = 2 ** (stops + ordinary[:, None, None, None] * (tint - lit * weaker))
    return (window * gain * 255).round().div(255).clamp(0, 1)


def train_camera_net(
    infrared: Tensor, ordinary: Sequence[Tensor], steps: int = STEPS
) -> dict[str, Tensor]:
    """Weights of a CameraNet, from (N, 3, 64, 64) thumbnails of either kind; each of the `ordinary`
    sets gives as many to a step as any other."""
    torch.manual_seed(0)
    net = CameraNet()
    optimizer = torch.optim.AdamW(net.parameters(), RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    wanted = (torch.arange(STEP) < INFRARED).float()
    for _ in range(steps):
        batch = [infrared[torch.randint(len(infrared), (INFRARED,))]]
        kinds = torch.randint(len(ordinary), (STEP - INFRARED,)).tolist()
        batch += [ordinary[k][torch.randint(len(ordinary[k]), (1,))] for k in kinds]
        loss = F.binary_cross_entropy_with_logits(net(varied(torch.cat(batch), 1 - wanted)), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    weights = net.state_dict()
    weights[list(weights)[-1]] += SHIFT  # the last layer's bias
    return weights


def half(weights: dict[str, Any]) -> dict[str, Any]:
    """The weights in 16 bits; loading makes 32 of them again."""
    return {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}


def joined(parts: Sequence[dict[str, Any]], key: str) -> Tensor:
    """The thumbnails that the `parts` have under `key`, each once."""
    return torch.cat([part[key] for part in parts]).unique(dim=0)


def pack(ordinary: str, infrared: str, camera_net: dict[str, Tensor]) -> dict[str, Any]:
    """The content of the released file. Raises UserError for networks of two architectures."""
    parts = [load_checkpoint(path) for path in (ordinary, infrared)]
    shapes = [{k: v.shape for k, v in part["model"].items()} for part in parts]
    if shapes[0] != shapes[1]:
        raise UserError(f"{infrared}: is of another architecture than {ordinary}")
    looks = {"training_thumbnails": joined(parts, "training_thumbnails")}
    chose = [part for part in parts if "validation_thumbnails" in part]  # old ones lack them
    looks |= {"validation_thumbnails": joined(chose, "validation_thumbnails")} if chose else {}
    # where the data lay is of no use elsewhere
    stored = {k: v for k, v in parts[0]["config"].items() if k not in RETIRED}
    config = stored | {"sources": [], "init_from": "", "teacher": ""}
    config |= {key: "" for key in config if key.endswith(("_low_dir", "_high_dir"))}
    config |= {"checkpoint_dir": "checkpoints", "log_dir": "logs", "seed": 0}
    return {
        "system": parts[0].get("system", "ConditionalFlow"),
        "run_id": parts[0]["run_id"],
        "config": config,
        "model": half(parts[0]["model"]),
        "epoch": parts[0].get("epoch", 0),
        "commit": str(parts[0].get("commit", "")),
        **looks,
        "cameras": {"infrared": half(parts[1]["model"]), "camera_net": camera_net},
    }


def camera_weights(arguments: argparse.Namespace) -> dict[str, Tensor]:
    """The small network, from the named folders. Raises UserError."""
    infrared = [thumbnails_of(folder) for folder in arguments.infrared_pictures]
    ordinary = [thumbnails_of(folder) for folder in arguments.ordinary_pictures]
    ordinary += [thumbnails_of(folder, darken=True) for folder in arguments.darken]
    if not infrared or not ordinary:
        hint = "--infrared_pictures, and --ordinary_pictures or --darken; or --like"
        raise UserError(f"name {hint}")
    return train_camera_net(torch.cat(infrared), ordinary)


def content_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """All that is written. Raises UserError."""
    if arguments.like:
        if any(getattr(arguments, name) for name in FOLDERS if name != "check"):
            raise UserError("--like takes the place of the folders; leave one of the two out")
        like = load_checkpoint(arguments.like)
        if not {"cameras", "known"} <= like.keys():
            hint = "name one such as checkpoints/released.pth"
            raise UserError(f"--like {arguments.like}: is no release of two networks; {hint}")
        weights = half(camera_parts(like, arguments.like)[1].state_dict())
        content = pack(arguments.ordinary, arguments.infrared, weights)
        content.pop("validation_thumbnails", None)  # a fortieth of a small file
        return content | {"known": like["known"] | {"looks": like["known"]["looks"].half()}}
    content = pack(arguments.ordinary, arguments.infrared, camera_weights(arguments))
    if arguments.known:
        content["known"] = looks_of(arguments.known, arguments.known_darkened)
    return content


def main() -> int:
    """Fit, check and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ordinary", required=True)
    parser.add_argument("--infrared", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--like", metavar="RELEASE", default="")
    for name in FOLDERS:
        parser.add_argument(f"--{name}", action="append", default=[], metavar="FOLDER")
    arguments = parser.parse_args()
    try:
        content = content_of(arguments)
        net = build_camera_net(content["cameras"]["camera_net"], arguments.out)
        for folder in arguments.check:
            files = pictures_by_stem(folder, "check").values()
            plain = lamplit = 0
            for pixels in map(read_image, files):
                plain += camera_of(pixels, net) == "infrared"
                lamplit += camera_of(np.rint(pixels * LAMP).astype(pixels.dtype), net) == "infrared"
            print(f"{folder}: {plain} of {len(files)} infrared, under a lamp {lamplit}")
        save_checkpoint(Path(arguments.out), content)
    except UserError as error:
        return complain(error)
    print(f"{arguments.out}: {Path(arguments.out).stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
