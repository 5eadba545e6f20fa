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
ROOMS, CONFIG, BLIND = "test_rooms", "test_config", "test_no_reference"
ENHANCE, KNOWN = "test_enhance", ("test_known", "support/known.py")
NAMES = ("test_naming", "support/naming.py")
CLIPS = ("test_odd_clips", "tools/clip_input.py")
NO_REFERENCE = "support/no_reference.py"
SETTINGS, CHECKPOINTS, DECODING, PICTURES, TILES, SUMMARY, FOLDERS, SCENES = (
    f"support/{name}.py"
    for name in (
        *("settings", "checkpoints", "decoding", "pictures", "tiles", "metrics", "folders"),
        "scenes",
    )
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
        "return (v.sigmoid() - self.alpha) / (1 - 2 * self.alpha)",
        "return v.sigmoid() - self.alpha",
        FLOW,
    ),
    Mutant(
        "return F.pixel_shuffle(y, 2)",
        "return F.pixel_shuffle(y.flip(1), 2)",
        FLOW,
    ),
    Mutant("self.lower.tril(-1) + torch", "self.lower.tril(0) + torch", FLOW),
    Mutant(
        "log_det = self.log_diagonal.sum() * x.shape[2] * x.shape[3]",
        "log_det = self.log_diagonal.sum()",
        FLOW,
    ),
    Mutant("return SCALE_BOUND * torch.tanh(scale), shift", "return scale, shift", FLOW),
    Mutant(
        "(changed - shift) * (-scale).exp())",
        "changed * (-scale).exp() - shift)",
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
    Mutant(
        "gaussian_log_prob(latent, mean, self.log_sigma) + log_det",
        "gaussian_log_prob(latent, mean, self.log_sigma) - log_det",
        FLOW,
    ),
    # the condition: what a crop is told must be what the whole picture is told
    Mutant(
        "(pixels + 0.5) / count",
        "pixels / count",
        FLOW,
    ),
    Mutant(
        "(place * cells - 0.5).clamp(0, cells - 1)",
        "(place * (cells - 1)).clamp(0, cells - 1)",
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
        "config.ssim_weight * (1 - similarity.mean())",
        "config.ssim_weight * similarity.mean()",
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
    Mutant(".min() <= tolerance", ".max() <= tolerance", METRICS, "support/scenes.py"),
    # training and resuming
    Mutant(
        "key = (self.config.seed, epoch, index, *([turn] if turn else []))",
        "key = (self.config.seed, index, *([turn] if turn else []))",
        DATA,
    ),
    Mutant(
        "rng = np.random.default_rng((config.seed, epoch))",
        "rng = np.random.default_rng()",
        TRAINING,
        "support/plans.py",
    ),
    Mutant("torch.manual_seed(self.config.seed * 1_000_003 + self.step)", "torch.seed()", TRAINING),
    Mutant("self._plan(epoch)[self.step % self.steps_per_epoch :]", "self._plan(epoch)", TRAINING),
    Mutant('self.optimizer.load_state_dict(training["optimizer"] | own)', "pass", TRAINING),
    Mutant('self.ema.n_averaged.copy_(training["averaged"])', "pass", TRAINING),
    Mutant(
        "torch._foreach_lerp_(averages, current, 1 - now)",
        "torch._foreach_lerp_(averages, current, now)",
        TRAINING,
    ),
    Mutant("better = choice > self.best", "better = choice < self.best", TRAINING),
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
    # settings
    Mutant(
        'not key.metadata["low"] <= value <= key.metadata["high"]',
        'not key.metadata["low"] < value <= key.metadata["high"]',
        CONFIG,
        SETTINGS,
    ),
    Mutant(
        'if "int" in kind and not value.is_integer()',
        'if "int" in kind and value < 0',
        CONFIG,
        SETTINGS,
    ),
    Mutant(
        'found |= read_settings(kinds, own, "--set")',
        'found = read_settings(kinds, own, "--set") | found',
        CONFIG,
        SETTINGS,
    ),
    Mutant("if name in found:", "if name in found and found[name] == value:", CONFIG, SETTINGS),
    Mutant('build(kind, found, "--set"', 'build(kinds[0], found, "--set"', CONFIG, SETTINGS),
    Mutant("and value.bit_length() < 9999", "", ROOMS, SETTINGS),
    Mutant(
        'for k, v in given.items() if k not in ("crop_size", "image_size")}',
        "for k, v in given.items()}",
        ROOMS,
    ),
    Mutant(
        "if one in TAKES and one != mode}",
        "if False}",
        "test_scoring",
        "support/commands.py",
    ),
    Mutant(
        "row * (width + 2) + column for",
        "row * width + column for",
        "test_convolutions",
        "support/convolutions.py",
    ),
    # checkpoints
    Mutant(" if k not in RETIRED}", "}", ROOMS, CHECKPOINTS),
    Mutant(" if not k.endswith(data) or os.path.isdir(v)}", "}", ROOMS, CHECKPOINTS),
    Mutant(
        "given.get(key.name, mine) != mine:",
        "given.get(key.name, mine) is None:",
        ROOMS,
        CHECKPOINTS,
    ),
    Mutant(
        "return build(kind, here | given, path)",
        "return build(kind, given | here, path)",
        ROOMS,
        CHECKPOINTS,
    ),
    Mutant(
        "for part in [*model.parameters(), *matrices]", "for part in matrices", ROOMS, CHECKPOINTS
    ),
    Mutant('if code.name == "GLOBAL"}', 'if code.name == "STACK_GLOBAL"}', ROOMS, CHECKPOINTS),
    Mutant("path.stat().st_mtime, reverse=True)", "path.stat().st_mtime)", ROOMS, CHECKPOINTS),
    Mutant("for path in epochs[keep:]:", "for path in epochs[:keep]:", ROOMS, CHECKPOINTS),
    Mutant(
        "if found := runs_in(folder):", "if len(found := runs_in(folder)) > 1:", ROOMS, CHECKPOINTS
    ),
    Mutant(r"checkpoint_epoch_\d+", "checkpoint_epoch_.*", ROOMS, CHECKPOINTS),
    # decoding
    Mutant(
        "np.rint(grey_levels(picture) / 257)", "np.rint(grey_levels(picture) / 256)", DATA, DECODING
    ),
    Mutant("orientation = exif.get(ORIENTATION, 1)", "orientation = 1", DATA, DECODING),
    Mutant("if min(picture.size) < 16:", "if max(picture.size) < 16:", ROOMS, DECODING),
    Mutant("> DENSEST * size:", "> 99 * DENSEST * size:", ROOMS, DECODING),
    Mutant("pixels <<= 8", "pixels <<= 7", "test_properties", DECODING),
    Mutant("upper.astype(np.uint16) << 8", "upper.astype(np.uint16) << 7", ROOMS, DECODING),
    # exposure
    Mutant("* 2.0**stops, 1.0)", "* (1 + stops), 1.0)", ROOMS, PICTURES),
    Mutant("np.rint(values * (65535 if deep else 255))", "np.rint(values * 255)", ROOMS, PICTURES),
    Mutant(
        "if share @ exposed(middle) < mean else",
        "if share @ exposed(middle) > mean else",
        ROOMS,
        PICTURES,
    ),
    # tiles
    Mutant("/ max(1, count - 1) / 8) * 8", "/ max(1, count) / 8) * 8", ROOMS, TILES),
    Mutant("middles = [(before + extent + after) // 2", "middles = [before + extent", ROOMS, TILES),
    Mutant("default_rng((*seed, y, x))", "default_rng((*seed, y))", ROOMS, TILES),
    Mutant("box + grown * (box[:, 2:] - box[:, :2]).repeat(1, 2)", "box + grown", ENHANCE, TILES),
    Mutant("place * passes + number + 1", "place * passes + number", ENHANCE),
    Mutant("np.empty_like(levels), REACH + PATCH", "np.empty_like(levels), 0", ENHANCE, PICTURES),
    # pictures unlike the training
    Mutant("squared[scenes[:, None] == scenes] = np.inf", "pass", *KNOWN),
    Mutant("limit = max(limit, np.quantile(apart[-own:], SHARE))", "pass", *KNOWN),
    # folders
    Mutant(
        'any(part.startswith(".") for part in path.relative_to(root).parts)',
        'path.name.startswith(".")',
        ROOMS,
        FOLDERS,
    ),
    Mutant("and inside not in path.resolve().parents", "", ROOMS, FOLDERS),
    Mutant("[journal.NEW if again else", "[journal.NEW if not again else", ROOMS, FOLDERS),
    Mutant("return 1 if failed else 0", "return 0", ROOMS, FOLDERS),
    # clips
    Mutant("signs = (c, b) if transposed else (a, d)", "signs = (a, d)", *CLIPS),
    Mutant("EXACT = 0x4 | 0x2000 | 0x4000 | 0x40000", "EXACT = 0x4", *CLIPS),
    # scenes
    Mutant("default_rng(seed).permutation", "default_rng(0).permutation", DATA, SCENES),
    Mutant(
        "return sorted(set(range(len(thumbnails))) - set(validation)), sorted(validation)",
        "return sorted(validation), sorted(set(range(len(thumbnails))) - set(validation))",
        DATA,
        SCENES,
    ),
    # names
    Mutant("if by_scene and alone:", "if False:", *NAMES),
    Mutant("if owner != low and not shared:", "if False:", *NAMES),
    Mutant("if other != match:", "if False:", *NAMES),
    Mutant("    if equal:", "    if False:", *NAMES),
    # scores
    Mutant(
        "(enhanced >= WHITE).any(-1) & (low < FREE).all(-1)",
        "(enhanced >= WHITE).all(-1) & (low < FREE).all(-1)",
        BLIND,
        NO_REFERENCE,
    ),
    Mutant("spread, noise = spread[fair], noise[fair]", "pass", BLIND, NO_REFERENCE),
    Mutant(
        "score_levels(low, pictures.level_table(0.0, deep=False)[found.best], high)",
        "score_levels(low, (found.best >> 8).astype(np.uint8), high)",
        ROOMS,
    ),
    Mutant(
        "torch.manual_seed(model.config.seed + index)",
        "torch.manual_seed(model.config.seed)",
        ROOMS,
    ),
    Mutant(
        "if size is None or pixels.shape[:2] == tuple(size):",
        "if size is None or pixels.shape[0] == size[0]:",
        ROOMS,
        PICTURES,
    ),
    Mutant(
        'if row.get("twin_in_training") is False]',
        'if not row.get("twin_in_training")]',
        ROOMS,
        SUMMARY,
    ),
    Mutant('means["seconds"]["median"]', 'means["seconds"]["mean"]', ROOMS, SUMMARY),
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
    Mutant(
        "return (x + shift) * scale, scale.log()", "return (x + shift) * scale, -scale.log()", *UPT
    ),
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
