"""Which exposure control is best? Three ways to bring a result to the target's mean brightness.

    python benchmarks/exposure.py [--checkpoint FILE] \\
        [--set eval_low_dir=... --set eval_high_dir=...]

none     the model's own brightness
gain     values multiplied, as the literature's GT-mean does
light    gain in linear light, what `--set exposure` and `--set reference` apply
model    the prior mean shifted by one number in the flow's space before decoding

Each is set, picture by picture, to the target's mean. That is help from the ground truth, for
comparison only.
"""

from __future__ import annotations

import numpy as np
import torch
from eval_pairs import Bench, batch, enhance, open_bench

from support.metrics import ciede2000_of, match_mean, psnr_of, ssim_of
from support.pictures import exposed, stops_to_mean


@torch.no_grad()
def through_the_model(bench: Bench, low: np.ndarray, mean: float) -> np.ndarray:
    """Decoded from the prior mean plus the shift that gives the picture the mean brightness `mean`.

    The shift is found by bisection.
    """
    with bench.runtime.autocast():
        condition = bench.model(low).condition(batch(low, bench))
        down, up = -4.0, 4.0
        for _ in range(12):
            shift = (down + up) / 2
            shifted = condition._replace(prior_mean=condition.prior_mean + shift)
            picture = bench.model(low).decode(shifted)[0].float()
            down, up = (shift, up) if float(picture.mean()) < mean else (down, shift)
    return picture.permute(1, 2, 0).double().cpu().numpy()


def main() -> None:
    """Print PSNR, SSIM and CIEDE2000 of each."""
    bench = open_bench(__doc__)
    scores: dict[str, list[tuple[float, float, float]]] = {}
    for _, low, high in bench.pairs():
        best, target = enhance(bench, low), high / 255
        levels = np.rint(best * 65535).astype(np.uint16)
        light = exposed(stops_to_mean(levels, target.mean()))[levels]
        ways = {"none": best, "gain": match_mean(best, target), "light": light}
        ways["model"] = through_the_model(bench, low, target.mean())
        for name, picture in ways.items():
            picture = picture.clip(0, 1)
            score = (
                psnr_of(picture, target),
                ssim_of(picture, target),
                ciede2000_of(picture, target),
            )
            scores.setdefault(name, []).append(score)
    print("way     PSNR    SSIM  CIEDE2000")
    for name, rows in scores.items():
        psnr, ssim, ciede = np.mean(rows, axis=0)
        print(f"{name:6} {psnr:6.2f}  {ssim:.4f}  {ciede:9.2f}")


if __name__ == "__main__":
    main()
