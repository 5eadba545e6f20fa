"""Packs two trained networks into one file, with the table that tells their cameras apart.

    python benchmarks/make_release.py --ordinary runs/ordinary4/best_model.pth \\
        --infrared runs/stage4/best_model.pth --out checkpoints/released.pth \\
        --infrared_pictures A/low --ordinary_pictures B/low --ordinary_pictures A/high \\
        --darken B/high

The table is a logistic regression on 13 statistics of a thumbnail and their squares (see
support/cameras.py), fitted to the pictures of the named folders, each also half a stop darker and
brighter. --darken adds well-exposed pictures as a simulated ordinary camera sees them in the dark.
--check FOLDER says how many of its pictures go to which network; they do not count for the fit.
Weights are stored in 16 bits.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import scipy.optimize
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model_script import RETIRED_KEYS  # noqa: E402
from support.cameras import STATISTICS, camera_of, statistics  # noqa: E402
from support.checkpoints import load_checkpoint, save_checkpoint  # noqa: E402
from support.decoding import read_image  # noqa: E402
from support.pairs import pictures_by_stem  # noqa: E402
from support.settings import UserError, complain  # noqa: E402
from support.simulated import darkened  # noqa: E402

# So many pictures are taken to be ordinary: a wrong choice costs them more. Chosen on validation
# scenes: 1/2 sent 5 of 44 LOL pairs astray, 3/4 sent 3 of them and 2 of 45 infrared ones.
ORDINARY = 3 / 4


def statistics_of(folder: str, darken: bool = False) -> np.ndarray:
    """(N, 13) of every picture in `folder`, as it is and half a stop darker and brighter."""
    rng, rows = np.random.default_rng(0), []
    for path in pictures_by_stem(folder, "folder").values():
        pixels = read_image(path)
        if darken:
            pixels = darkened(pixels, rng)[0]
        for gain in (0.85, 1.0, 1.18):  # of sRGB levels: about half a stop of light
            rows.append(statistics(np.clip(np.rint(pixels * gain), 0, 255).astype(np.uint8)))
    return np.array(rows)


def fit_probe(infrared: np.ndarray, ordinary: np.ndarray, penalty: float = 1e-3) -> torch.Tensor:
    """(5, 13) table for `support.cameras`, from the (N, 13) statistics of either kind.

    ORDINARY is how much the ordinary ones count, however many pictures either kind has.
    """
    both = np.concatenate([infrared, ordinary])
    mean, scale = both.mean(0), both.std(0) + 1e-6
    z = (both - mean) / scale
    inputs = np.concatenate([z, z**2, np.ones((len(z), 1))], axis=1)
    sign = np.where(np.arange(len(z)) < len(infrared), 1.0, -1.0)
    share = np.where(sign > 0, (1 - ORDINARY) / len(infrared), ORDINARY / len(ordinary))

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        margin = sign * (inputs @ weights)
        value = float(share @ np.logaddexp(0, -margin) + penalty * (weights[:-1] ** 2).sum())
        slope = -share * sign / (1 + np.exp(np.clip(margin, -30, 30)))
        decay = np.append(2 * penalty * weights[:-1], 0.0)
        return value, inputs.T @ slope + decay

    start = np.zeros(inputs.shape[1])
    weights = scipy.optimize.minimize(loss, start, jac=True, method="L-BFGS-B").x
    probe = np.zeros((5, STATISTICS))
    probe[0], probe[1] = mean, scale
    probe[2], probe[3], probe[4, 0] = weights[:STATISTICS], weights[STATISTICS:-1], weights[-1]
    return torch.from_numpy(probe)


def half(weights: dict[str, Any]) -> dict[str, Any]:
    """The weights in 16 bits; loading makes 32 of them again."""
    return {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}


def pack(ordinary: str, infrared: str, probe: torch.Tensor) -> dict[str, Any]:
    """The content of the released file. Raises UserError for networks of two architectures."""
    parts = [load_checkpoint(path) for path in (ordinary, infrared)]
    shapes = [{k: v.shape for k, v in part["model"].items()} for part in parts]
    if shapes[0] != shapes[1]:
        raise UserError(f"{infrared}: is of another architecture than {ordinary}")
    looks = {"training_thumbnails": torch.cat([part["training_thumbnails"] for part in parts])}
    chose = [part["validation_thumbnails"] for part in parts if "validation_thumbnails" in part]
    looks |= {"validation_thumbnails": torch.cat(chose)} if chose else {}  # old ones lack them
    # where the data lay is of no use elsewhere
    stored = {k: v for k, v in parts[0]["config"].items() if k not in RETIRED_KEYS}
    config = stored | {"sources": [], "init_from": ""}
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
        "cameras": {"infrared": half(parts[1]["model"]), "probe": probe},
    }


def main() -> int:
    """Fit, check and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ordinary", required=True)
    parser.add_argument("--infrared", required=True)
    parser.add_argument("--out", required=True)
    for name in ("infrared_pictures", "ordinary_pictures", "darken", "check"):
        parser.add_argument(f"--{name}", action="append", default=[], metavar="FOLDER")
    arguments = parser.parse_args()
    try:
        infrared = [statistics_of(folder) for folder in arguments.infrared_pictures]
        ordinary = [statistics_of(folder) for folder in arguments.ordinary_pictures]
        ordinary += [statistics_of(folder, darken=True) for folder in arguments.darken]
        if not infrared or not ordinary:
            raise UserError("name --infrared_pictures, and --ordinary_pictures or --darken")
        probe = fit_probe(np.concatenate(infrared), np.concatenate(ordinary))
        for folder in arguments.check:
            files = pictures_by_stem(folder, "check").values()
            cameras = [camera_of(read_image(path), probe) for path in files]
            print(f"{folder}: {cameras.count('infrared')} of {len(cameras)} infrared")
        content = pack(arguments.ordinary, arguments.infrared, probe)
        save_checkpoint(Path(arguments.out), content)
    except UserError as error:
        return complain(error)
    print(f"{arguments.out}: {Path(arguments.out).stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
