"""One-line mistakes, each of which the fast tests must notice.

    python tests/mutants.py [NUMBER ...]

They lie in the flow, the losses, metrics, training, resuming and the baselines. Each mutant is
applied to a copy of the project, and the fast tests of the file named beside it run. A mutant that
they pass survives, and the exit status is 1. One under which they hang counts as killed. About half
a minute each on two cores.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Mutant(NamedTuple):
    """`before`, found once in `file`, becomes `after`; `tests` is the file that should notice."""

    before: str
    after: str
    tests: str
    file: str = "model_script.py"


FLOW, LOSSES, METRICS, TRAINING, DATA = (
    "test_flow",
    "test_losses",
    "test_metrics",
    "test_training",
    "test_data",
)
RETINEX, UPT, ANLIGHTEN = (
    (f"test_{name}", f"baselines/{name}.py") for name in ("retinexnet", "upt_flow", "anlightendiff")
)
PASSED, FAILED, HUNG = "SURVIVED", "killed", "killed, the tests hung,"
MUTANTS = [
    # flow
    Mutant(
        "log_det = math.log(1 - 2 * self.alpha) - p.log() - (1 - p).log()",
        "log_det = -p.log() - (1 - p).log()",
        FLOW,
    ),
    Mutant(
        "y = (v.sigmoid() - self.alpha) / (1 - 2 * self.alpha)",
        "y = v.sigmoid() - self.alpha",
        FLOW,
    ),
    Mutant(
        "return F.pixel_shuffle(y, 2), y.new_zeros",
        "return F.pixel_shuffle(y.flip(1), 2), y.new_zeros",
        FLOW,
    ),
    Mutant("self.lower.tril(-1) + torch.eye", "self.lower.tril(0) + torch.eye", FLOW),
    Mutant(
        "log_det = self.log_diagonal.sum() * x.shape[2] * x.shape[3]",
        "log_det = self.log_diagonal.sum()",
        FLOW,
    ),
    Mutant(
        "log_det = -self.log_diagonal.sum() * y.shape[2]",
        "log_det = self.log_diagonal.sum() * y.shape[2]",
        FLOW,
    ),
    Mutant("return SCALE_BOUND * torch.tanh(scale), shift", "return scale, shift", FLOW),
    Mutant(
        "(changed - shift) * (-scale).exp()), -scale",
        "changed * (-scale).exp() - shift), -scale",
        FLOW,
    ),
    Mutant(
        "changed * scale.exp() + shift), scale.flatten(1).sum(1)",
        "changed * scale.exp() + shift), scale.flatten(1).mean(1)",
        FLOW,
    ),
    Mutant("first=block % 2 == 1)", "first=False)", FLOW),
    Mutant(
        "-0.5 * deviation**2 - log_sigma - 0.5 * math.log(2 * math.pi)",
        "-0.5 * deviation**2 - 0.5 * math.log(2 * math.pi)",
        FLOW,
    ),
    Mutant(
        "return -log_likelihood / (dimensions * math.log(2)) + 8",
        "return -log_likelihood / dimensions + 8",
        FLOW,
    ),
    Mutant("return (image * 255 + noise) / 256", "return (image * 255 + noise) / 255", FLOW),
    Mutant(
        "return ((y * 256 - 0.5) / 255).clamp(0, 1)", "return (y * 256 / 255).clamp(0, 1)", FLOW
    ),
    Mutant("return log_prob + log_det, (latent", "return log_prob - log_det, (latent", FLOW),
    # the condition: what a crop is told must be what the whole picture is told
    Mutant(
        "(torch.arange(width, device=grid.device) + 0.5) / width",
        "torch.arange(width, device=grid.device) / width",
        FLOW,
    ),
    Mutant(
        'points * 2 - 1, padding_mode="border", align_corners=False',
        'points * 2 - 1, padding_mode="border", align_corners=True',
        FLOW,
    ),
    # losses
    Mutant("sample = window**2 / (window**2 - 1)", "sample = 1.0", LOSSES),
    Mutant("c1, c2 = 0.01**2, 0.03**2", "c1, c2 = 0.01**2, 0.01**2", LOSSES),
    Mutant("place = values * (bins - 1)", "place = values * bins", LOSSES),
    Mutant(
        "(p - q).cumsum(-1).abs().sum(-1) / (p.shape[-1] - 1)",
        "(p - q).abs().sum(-1) / (p.shape[-1] - 1)",
        LOSSES,
    ),
    Mutant(
        "config.ssim_weight * (1 - ssim(enhanced, high).mean())",
        "config.ssim_weight * ssim(enhanced, high).mean()",
        LOSSES,
    ),
    # metrics
    Mutant(
        "yellow_blue = (image[..., 0] + image[..., 1]) / 2 - image",
        "yellow_blue = (image[..., 0] + image[..., 1]) - image",
        METRICS,
        "support/metrics.py",
    ),
    Mutant(
        "a, b = (np.sort(image.reshape(-1, 3), axis=0)",
        "a, b = (np.sort(image.reshape(-1, 3), axis=1)",
        METRICS,
        "support/metrics.py",
    ),
    Mutant(
        "np.clip(enhanced * ((high @ GREY).mean()",
        "np.clip(enhanced + ((high @ GREY).mean()",
        METRICS,
        "support/metrics.py",
    ),
    Mutant(".min() <= tolerance", ".max() <= tolerance", METRICS),
    # training and resuming
    Mutant(
        "rng = np.random.default_rng((self.config.seed, epoch, index))",
        "rng = np.random.default_rng((self.config.seed, index))",
        DATA,
    ),
    Mutant(
        "rng = np.random.default_rng((config.seed, epoch))",
        "rng = np.random.default_rng()",
        TRAINING,
    ),
    Mutant("torch.manual_seed(self.config.seed * 1_000_003 + self.step)", "torch.seed()", TRAINING),
    Mutant("config, epoch)[self.step % self.steps_per_epoch :]", "config, epoch)", TRAINING),
    Mutant('self.optimizer.load_state_dict(training["optimizer"] | own)', "pass", TRAINING),
    Mutant('self.ema.n_averaged.copy_(training["averaged"])', "pass", TRAINING),
    Mutant(
        "torch._foreach_lerp_(averages, current, 1 - now)",
        "torch._foreach_lerp_(averages, current, now)",
        TRAINING,
    ),
    Mutant('better = means["psnr"] > self.best', 'better = means["psnr"] < self.best', TRAINING),
    Mutant(
        "os.replace(temporary, path)",
        "path.write_bytes(temporary.read_bytes())",
        "test_kill",
        "support/files.py",
    ),
    Mutant(
        "len(chunk) / len(batch)) for chunk in chunks]",
        "1 / len(chunks)) for chunk in chunks]",
        "test_processes",
        "support/processes.py",
    ),
    # baselines
    Mutant('"exchanged": 0.001 *', '"exchanged": 0.01 *', *RETINEX),
    Mutant("(-10 * edges).exp()", "(-1 * edges).exp()", *RETINEX),
    Mutant(
        'self.frozen = self.config.training == "split" and progress >= 0.5',
        "self.frozen = False",
        *RETINEX,
    ),
    Mutant("(low.sum(1, keepdim=True) + 1e-4)", "(low.sum(1, keepdim=True) + 1e-3)", *UPT),
    # the public code's
    Mutant("return y / scale - shift, -scale.log()", "return y / scale - shift, scale.log()", *UPT),
    Mutant(
        "return torch.cat([moved, kept], 1), log_det",
        "return torch.cat([kept, moved], 1), log_det",
        *UPT,
    ),
    Mutant("* (1 - alpha) - math.sqrt(alpha)", "* (1 - alpha) + math.sqrt(alpha)", *ANLIGHTEN),
    Mutant("x = x + condition[level]", "x = x * condition[level]", *ANLIGHTEN),
    Mutant("device=low.device) < 0.5", "device=low.device) < 0.8", *ANLIGHTEN),
]


def verdict(copy: Path, names: set[str], patience: float | None = None) -> str:
    """What the named test files say of the project in `copy`.

    `patience` is in seconds; None for endless.
    """
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        *(f"tests/{name}.py" for name in sorted(names)),
    ]
    # not a pipe, which the tests' own processes could keep open
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            command, cwd=copy, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(patience)
        except subprocess.TimeoutExpired:
            return HUNG
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        said.seek(0)
        if status not in (0, 1):  # neither passed nor failed
            sys.exit(said.read())
    return FAILED if status else PASSED


def main() -> None:
    """Try the mutants of the given numbers, or all."""
    chosen = [int(text) for text in sys.argv[1:]] or range(1, len(MUTANTS) + 1)
    alive = []
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name) / "project"
        ignored = shutil.ignore_patterns(
            ".git", ".venv", "runs", "results", "logs", "train-*", "eval-*"
        )
        shutil.copytree(ROOT, copy, ignore=ignored)
        started = time.monotonic()
        if verdict(copy, {MUTANTS[number - 1].tests for number in chosen}) != PASSED:
            sys.exit("the tests fail without any mutant: mend that first")
        patience = 60 + 2 * (time.monotonic() - started)  # of a file, when all took that long
        for number in chosen:
            started, mutant = time.monotonic(), MUTANTS[number - 1]
            file = copy / mutant.file
            source = file.read_text(encoding="utf-8")
            if source.count(mutant.before) != 1:
                sys.exit(f"not found exactly once in {mutant.file}: {mutant.before}")
            file.write_text(source.replace(mutant.before, mutant.after), encoding="utf-8")
            found = verdict(copy, {mutant.tests}, patience)
            file.write_text(source, encoding="utf-8")
            alive += [number] * (found == PASSED)
            print(
                f"{number:2} {found} in {time.monotonic() - started:.0f} s: {mutant.after[:90]}",
                flush=True,
            )
    print(f"{len(chosen) - len(alive)} of {len(chosen)} killed")
    sys.exit(1 if alive else 0)


if __name__ == "__main__":
    main()
