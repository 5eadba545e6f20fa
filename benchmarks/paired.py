"""Whether this tree is faster than another one of this repository, by turns in one run.

    git worktree add ../before COMMIT
    python benchmarks/paired.py --before ../before [--turns 7] [--threads 2] [--checkpoint FILE]

Two processes hold the two trees' scripts, with the same weights, and take turns: one enhances while
the other waits, so that a busy hour meets both. Times are of a 600x400 picture in memory, and of a
training step of two 256-pixel crops with every loss. Prints the medians, the median of the ratios,
and how far the two pictures differ, in [0, 1]: anywhere, and 120 pixels from the border.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
JOBS = ("enhance", "train")
BORDER = 120  # pixels, beyond the receptive field: what lies around the picture is not seen inside


def work(tree: Path, checkpoint: str, threads: int, picture: str) -> None:
    """Do what each line of stdin names and print its seconds. The first picture is kept."""
    sys.path.insert(0, str(tree))
    import torch  # after the path: the tree's own script

    import model_script as ms

    assert Path(ms.__file__).resolve().parent == tree
    with suppress(ImportError):  # older trees do not have it
        from support.commands import keep_memory

        keep_memory()
    torch.set_num_threads(threads)
    content = torch.load(checkpoint, weights_only=True)
    shape = ("flow_channels", "global_channels", "num_flow_blocks", "thumbnail_size", "crop_size")
    stored = content["config"]
    config = ms.Config(**{key: stored[key] for key in shape if key in stored})
    model = ms.ConditionalFlow(config).to(memory_format=torch.channels_last)
    model.load_state_dict({key: value.float() for key, value in content["model"].items()})
    optimizer = model.make_optimizer()
    torch.manual_seed(0)
    photograph = torch.nn.functional.interpolate(torch.rand(1, 3, 13, 19), (400, 600)) / 8
    dark, high = torch.rand(2, 3, 256, 256) / 8, torch.rand(2, 3, 256, 256)
    thumbnail = torch.rand(2, 3, config.thumbnail_size, config.thumbnail_size) / 8
    batch = ms.Sample(dark, high, thumbnail, torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 2))
    for line in sys.stdin:
        started = time.perf_counter()
        if line.strip() == "enhance":
            with torch.inference_mode():
                found = model.eval().enhance(photograph)
        else:
            optimizer.zero_grad(set_to_none=True)
            torch.stack(list(model.train().losses(batch).values())).sum().backward()
            optimizer.step()
        seconds = time.perf_counter() - started
        if line.strip() == "enhance" and not Path(picture).exists():
            torch.save(found, picture)
        print(json.dumps(seconds), flush=True)


class Tree:
    """One of the two processes."""

    def __init__(self, tree: Path, arguments: argparse.Namespace, picture: Path) -> None:
        own = [sys.executable, str(Path(__file__).resolve()), "--tree", str(tree)]
        own += ["--threads", str(arguments.threads), "--checkpoint", arguments.checkpoint]
        pipes: dict[str, Any] = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process = subprocess.Popen([*own, "--picture", str(picture)], **pipes)

    def seconds(self, job: str) -> float:
        assert self.process.stdin and self.process.stdout
        print(job, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit("paired: one of the trees failed; see its message above")
        return float(json.loads(answer))


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", help="the other tree")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    released = str(ROOT / "checkpoints" / "released.pth")
    parser.add_argument("--checkpoint", default=released, help="of what both trees can load")
    parser.add_argument("--tree", help=argparse.SUPPRESS)
    parser.add_argument("--picture", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.tree:
        work(Path(arguments.tree), arguments.checkpoint, arguments.threads, arguments.picture)
        return 0
    for name in ("turns", "threads"):
        if getattr(arguments, name) < 1:
            print(f"error: --{name} must be at least 1", file=sys.stderr)
            return 2
    before = Path(arguments.before or "").resolve()
    if not arguments.before or not (before / "model_script.py").is_file():
        print(f"error: --before {arguments.before}: no model_script.py there", file=sys.stderr)
        return 2
    if not Path(arguments.checkpoint).is_file():
        print(f"error: --checkpoint {arguments.checkpoint}: no such file", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        pictures = [Path(folder) / name for name in ("before.pt", "now.pt")]
        trees = [Tree(*one) for one in zip((before, ROOT), [arguments] * 2, pictures, strict=True)]
        for job in JOBS:
            turns = [[tree.seconds(job) for tree in trees] for _ in range(arguments.turns + 1)][1:]
            medians = [statistics.median(times) for times in zip(*turns, strict=True)]
            ratio = statistics.median(now / then for then, now in turns)
            print(f"{job}: {medians[0]:.3f} s before, {medians[1]:.3f} s now, ratio {ratio:.3f}")
        import torch

        one, other = (torch.load(path, weights_only=True) for path in pictures)
        apart = (one - other).abs()
        inner = float(apart[..., BORDER:-BORDER, BORDER:-BORDER].max())
        print(f"pictures differ by at most {float(apart.max()):.1e}, by {inner:.1e} inside")
        for tree in trees:
            assert tree.process.stdin
            tree.process.stdin.close()
            tree.process.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
