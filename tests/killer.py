"""Trains in a child process that is killed again and again, and resumed; run by test_kill.py.

    python tests/killer.py CONFIG KILLS SEED

The child writes to a pipe whenever a step, a validation, the saving of an epoch or the write of a
file of weights begins and ends. What it said survives its death, and is a record independent of the
checkpoints. The signal is 9. Prints a JSON object for each kill:

moment    what was waited for: one of MOMENTS, of which the kill falls into a random part
within    what the child had begun and not ended when it died, the innermost last: a best file is
          written in a validation
torn      whether it left the half of a file of weights behind
began     the step that it went on from, as it said itself; null where it died before any
finished  the step of the last epoch whose saving it said to be done; 0 without any
found     the step of the newest checkpoint after its death; 0 without any

The child is forked after all imports, so that fifty attempts take a minute or two, and few kills
fall into a start.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple, TextIO

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

import model_script as ms
from support import checkpoints
from support.checkpoints import load_checkpoint, newest_checkpoint
from support.metrics import ssim_of

# the last two are the writes of those files
MOMENTS = ("any", "step", "validation", "checkpoint", "best")
# words of the child, about twelve epochs: by then the averaged weights may have stopped to improve
LONGEST_WAIT = 200


class Word(NamedTuple):
    """What the child says: `kind` begins or ends at `seconds` of the machine's clock, at `step`.

    The step is 0 for a write.
    """

    kind: str
    step: int
    begins: bool
    seconds: float


def import_late_parts() -> None:
    """What a training imports later, for its optimizer, curves and scores; it takes seconds."""
    for name in ("torch._dynamo", "torch.utils.tensorboard", "tensorboard.compat.tensorflow_stub"):
        importlib.import_module(name)
    black = np.zeros((16, 16, 3))
    ssim_of(black, black)


def newest(folder: Path) -> int:
    """The step of the checkpoint that a resumed run starts from; 0 without any."""
    path = newest_checkpoint(folder)
    return int(torch.load(path, weights_only=True)["training"]["step"]) if path else 0


def announce(owner: Any, name: str, pipe: int, describe: Callable[..., tuple[str, int]]) -> None:
    """Make a function of `owner` say its kind and step as it begins and as it ends.

    One short write is never torn.
    """
    work = getattr(owner, name)

    def announced(*arguments: Any) -> Any:
        kind, step = describe(*arguments)
        os.write(pipe, f"{json.dumps(Word(kind, step, True, time.monotonic()))}\n".encode())
        result = work(*arguments)
        os.write(pipe, f"{json.dumps(Word(kind, step, False, time.monotonic()))}\n".encode())
        return result

    setattr(owner, name, announced)


def start(config: str, folder: Path) -> tuple[int, TextIO]:
    """Fork a child that trains on from the newest checkpoint.

    Returns its process number and what it says.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        return child, os.fdopen(reader)
    announce(ms.Trainer, "_train_step", writer, lambda trainer, *_: ("step", trainer.step))
    announce(ms.Trainer, "_validate", writer, lambda trainer, *_: ("validation", trainer.step))
    announce(ms.Trainer, "save", writer, lambda trainer, *_: ("epoch", trainer.step))
    # the script calls it by its module, so this is where it is looked up
    announce(
        checkpoints, "save_checkpoint", writer, lambda path, content: (path.stem.split("_")[0], 0)
    )
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as said:
        resume = ["--resume", str(folder)] if newest_checkpoint(folder) else []
        if not resume:  # it died before its first checkpoint: begin anew, as its message says
            (folder / "best_model.pth").unlink(missing_ok=True)
        status = ms.main(["--mode", "train", "--config", config, *resume])
    if status:
        os.write(2, said.getvalue().encode())
    os._exit(status)


def heard(stream: TextIO) -> Iterator[Word]:
    """The child's words as they come, until it ends."""
    for line in stream:
        yield Word(*json.loads(line))


def wait_for(moment: str, stream: TextIO, rng: random.Random) -> list[Word]:
    """Wait until the child is in the midst of one of its next such works.

    Returns what it said meanwhile.
    """
    if moment == "any":
        time.sleep(rng.uniform(0.02, 0.6))
        return []
    words: list[Word] = []
    place, begun, since, duration = rng.randint(1, 3), 0, 0.0, 0.01
    for word in heard(stream):
        words.append(word)
        if word.kind == moment and word.begins:
            begun, since = begun + 1, word.seconds
        elif word.kind == moment:
            duration = word.seconds - since
        if begun == place or len(words) >= LONGEST_WAIT:
            break
    time.sleep(rng.uniform(0, duration))  # the last one's is a guess at this one's
    return words


def cut_short(words: list[Word]) -> list[str]:
    """The works that were begun and not ended, the innermost last."""
    under_way: list[str] = []
    for word in words:
        if word.begins:
            under_way.append(word.kind)
        else:
            under_way.remove(word.kind)
    return under_way


def kill_once(moment: str, config: str, folder: Path, rng: random.Random) -> dict[str, Any]:
    """One life of the run, from its start to its violent end."""
    child, stream = start(config, folder)
    with stream:
        words = wait_for(moment, stream, rng)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        words += heard(stream)
    if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
        sys.exit("the run ended before it was killed as often as asked; give it more epochs")
    return {
        "moment": moment,
        "within": cut_short(words),
        "torn": any(folder.glob(f".*.{child}.pth")),
        "began": next((word.step for word in words if word.kind == "step"), None),
        "finished": max(
            (word.step for word in words if word.kind == "epoch" and not word.begins), default=0
        ),
    }


def main() -> None:
    """Kill as often as asked, then let the run end."""
    config, kills, rng = sys.argv[1], int(sys.argv[2]), random.Random(int(sys.argv[3]))
    torch.set_num_threads(1)  # a forked child has no use for its parent's pool of threads
    import_late_parts()
    folder = Path(json.loads(Path(config).read_text())["checkpoint_dir"])
    for number in range(kills):
        told = kill_once(MOMENTS[number % len(MOMENTS)], config, folder, rng)
        for path in folder.glob("[!.]*.pth"):  # whatever has its name is whole
            load_checkpoint(str(path))
        print(json.dumps(told | {"found": newest(folder)}), flush=True)
    child, stream = start(config, folder)
    with stream:
        stream.read()  # a pipe that nobody empties would stop the child
    _, status = os.waitpid(child, 0)
    sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
