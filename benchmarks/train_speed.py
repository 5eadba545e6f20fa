"""Training speed of the published CPU recipe: our model against the published layer sizes.

    python benchmarks/train_speed.py [--rounds 5] [--size 128]

ours      the real Trainer, built from cpu_train_config.json and stepped by its own _train_step:
          ConditionalFlow with all its losses, AdamW, gradient clip, averaged weights, channels last
stand-in  a model for timing only, written from the published layer sizes; it was never trained and
          its values mean nothing. Encoder 3-64-128-96, prior mean 96-96, projections 3-96 and 96-3,
          two affine couplings on 96 channels at full resolution; negative log-likelihood + L1 +
          64-bin soft histograms of all pixels; Adam, gradient clip

Both take the same picture, in memory, in fp32 and by turns in one process, so that other load on
the machine falls on both. Medians over the rounds are printed. Data loading and validation are left
out. The stand-in keeps PyTorch's default memory layout, as the published code does.
--stand-in-channels-last gives it ours, which tells layout from layers.

On a machine that others use, run it under OMP_WAIT_POLICY=PASSIVE. By default OpenMP's threads spin
while they wait for one that has lost its core. That can cost a model of many small layers (ours)
nine tenths of its speed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import model_script  # noqa: E402  first, so that whatever it does before it loads torch counts here too

# isort: split
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from baselines import system_class  # noqa: E402
from support import settings  # noqa: E402

CHANNELS, BINS = 96, 64


def conv3(inputs: int, outputs: int) -> nn.Conv2d:
    """3x3 convolution that keeps the size."""
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class StandInCoupling(nn.Module):
    """Affine coupling at full resolution.

    48 kept channels and 96 of the condition give scale and shift of the other 48.
    """

    def __init__(self, flip: bool) -> None:
        super().__init__()
        self.flip = flip
        self.net = nn.Sequential(
            conv3(CHANNELS // 2 + CHANNELS, 256),
            nn.ReLU(),
            conv3(256, 256),
            nn.ReLU(),
            conv3(256, CHANNELS),
        )

    def forward(self, x: Tensor, condition: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        kept, changed = x.chunk(2, 1)[:: -1 if self.flip else 1]
        scale, shift = self.net(torch.cat((kept, condition), 1)).chunk(2, 1)
        scale = 0.5 * torch.tanh(scale)
        changed = (changed - shift) * (-scale).exp() if inverse else changed * scale.exp() + shift
        return torch.cat((kept, changed)[:: -1 if self.flip else 1], 1), scale.mean()


class StandIn(nn.Module):
    """The published model's layers, for their cost alone."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            conv3(3, 64), nn.ReLU(), conv3(64, 128), nn.ReLU(), conv3(128, CHANNELS), nn.ReLU()
        )
        self.prior_mean = conv3(CHANNELS, CHANNELS)
        self.project, self.unproject = nn.Conv2d(3, CHANNELS, 1), nn.Conv2d(CHANNELS, 3, 1)
        self.couplings = nn.ModuleList([StandInCoupling(False), StandInCoupling(True)])

    def decode(self, latent: Tensor, condition: Tensor) -> Tensor:
        """Back through the couplings to a picture."""
        for coupling in reversed(self.couplings):
            latent = coupling(latent, condition, inverse=True)[0]
        return self.unproject(latent).sigmoid()

    def enhance(self, low: Tensor) -> Tensor:
        """The deterministic pass: decode the prior's mean."""
        condition = self.encoder(low)
        return self.decode(self.prior_mean(condition), condition)

    def loss(self, low: Tensor, high: Tensor) -> Tensor:
        """Encode for the likelihood, decode for the picture's losses."""
        condition = self.encoder(low)
        mean = self.prior_mean(condition)
        latent, log_det = self.project(high), 0.0
        for coupling in self.couplings:
            latent, change = coupling(latent, condition)
            log_det = log_det + change
        nll = 0.5 * ((latent - mean) ** 2).mean() - log_det
        enhanced = self.decode(mean, condition)
        histograms = (soft_histogram(enhanced) - soft_histogram(high)).cumsum(-1).abs().mean()
        return nll + F.l1_loss(enhanced, high) + histograms


def soft_histogram(image: Tensor) -> Tensor:
    """(B, 3, bins) of every pixel of (B, 3, H, W), d counted in bins."""
    distance = (image.flatten(2)[..., None] - torch.linspace(0, 1, BINS, device=image.device)) * (
        BINS - 1
    )
    weight = 1 / (1 + 0.1 * distance**2)
    return weight.sum(2) / weight.sum((2, 3))[..., None]


def stand_in_step(
    model: StandIn, optimizer: torch.optim.Optimizer, low: Tensor, high: Tensor
) -> None:
    """One update of the stand-in."""
    optimizer.zero_grad(set_to_none=True)
    model.loss(low, high).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def trainer_on_noise(
    recipe: str,
    size: tuple[int, int],
    folder: Path,
    system: str = "ConditionalFlow",
    **changes: Any,
) -> model_script.Trainer:
    """The real Trainer on eight pictures of noise (height, width).

    An update costs the same whatever it sees.
    """
    rng = np.random.default_rng(0)
    for part in ("low", "high"):
        (folder / part).mkdir(parents=True, exist_ok=True)
        for name in range(8):
            Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(
                folder / part / f"{name}.png"
            )
    kind = system_class(system)
    kinds = (kind.config_class, model_script.Use)
    given = settings.read_all(kinds, str(ROOT / recipe), [], kind.unused) | changes
    given |= dict(train_low_dir=str(folder / "low"), train_high_dir=str(folder / "high"))
    given |= dict(num_epochs=10_000, init_from="", checkpoint_dir=str(folder / "weights"))
    config, use = (settings.build(each, given, "benchmark") for each in kinds)
    return model_script.Trainer(config, use, kind)


def first_batch(trainer: model_script.Trainer) -> model_script.Sample:
    """A batch of the trainer's own size."""
    plan = [
        model_script.Draw(0, index % len(trainer.training))
        for index in range(trainer.config.batch_size)
    ]
    return next(iter(trainer._loader([plan])))


def images_per_second(step: Callable[[], object], seconds: float, batch: int) -> float:
    """Speed of `step`, repeated for at least `seconds`."""
    started, steps = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < seconds:
        step()
        steps += 1
    return steps * batch / elapsed


def main() -> None:
    """Measure by turns and print the medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of each model")
    parser.add_argument("--size", type=int, default=128, help="side of the pictures")
    parser.add_argument("--seconds", type=float, default=4.0, help="least time of one turn")
    parser.add_argument(
        "--stand-in-channels-last", action="store_true", help="the stand-in in our memory layout"
    )
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        side = arguments.size
        trainer = trainer_on_noise(
            "cpu_train_config.json", (side, side), Path(folder), image_size=[side, side]
        )
        batch = first_batch(trainer)
    trainer.model.train()
    torch.manual_seed(0)
    model = StandIn()
    low, high = batch.low, batch.high
    if arguments.stand_in_channels_last:
        model = model.to(memory_format=torch.channels_last)
        low, high = (image.contiguous(memory_format=torch.channels_last) for image in (low, high))
    optimizer = torch.optim.Adam(model.parameters(), trainer.config.learning_rate)

    turns: dict[str, Callable[[], object]] = {
        "ours": lambda: trainer._train_step([(batch, 1.0)]),
        "stand-in": lambda: stand_in_step(model, optimizer, low, high),
    }
    millions = {
        name: sum(p.numel() for p in m.parameters()) / 1e6
        for name, m in (("ours", trainer.model), ("stand-in", model))
    }
    layout = "channels last" if arguments.stand_in_channels_last else "default layout"
    policy = os.environ.get("OMP_WAIT_POLICY", "unset")
    print(
        f"torch {torch.__version__}, {trainer.runtime}, {arguments.size}x{arguments.size}, batch"
        f" {len(low)}"
    )
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before, OMP_WAIT_POLICY {policy}")
    print(
        f"ours {millions['ours']:.2f} M parameters, stand-in {millions['stand-in']:.2f} M"
        f" ({layout})",
        flush=True,
    )
    for step in turns.values():  # warm up: the first steps choose kernels and allocate
        step()
        step()
    speeds: dict[str, list[float]] = {name: [] for name in turns}
    for place in range(arguments.rounds):
        for name, step in turns.items():
            speeds[name].append(images_per_second(step, arguments.seconds, len(low)))
        ours, theirs = (speeds[name][-1] for name in turns)
        print(
            f"round {place + 1}: ours {ours:.2f} images/s, stand-in {theirs:.2f} images/s,"
            f" {ours / theirs:.1f}x",
            flush=True,
        )
    ours, theirs = (statistics.median(values) for values in speeds.values())
    ratio = statistics.median(a / b for a, b in zip(*speeds.values(), strict=True))
    print(
        f"median: ours {ours:.2f} images/s, stand-in {theirs:.2f} images/s, {ratio:.1f}x (median of"
        " the rounds' ratios)"
    )


if __name__ == "__main__":
    main()
