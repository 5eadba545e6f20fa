"""Trains in a child process that is killed (signal 9) again and again, and resumed each time; run by test_kill.py.

    python tests/killer.py CONFIG KILLS SEED

Prints a JSON object a kill: the moment that was waited for, and the newest checkpoint's step before and after. The child is
forked after torch was imported, so that fifty attempts take a minute rather than ten.
"""

from __future__ import annotations

import io
import json
import os
import random
import signal
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import model_script as ms

MOMENTS = ("any", "checkpoint", "best")  # any time; while that file is being written, under its temporary name


def newest(folder: Path) -> int:
    """The step of the checkpoint that a resumed run starts from; 0 without any."""
    path = ms.newest_checkpoint(folder)
    return int(torch.load(path, weights_only=True)["training"]["step"]) if path else 0


def start(config: str, folder: Path) -> int:
    """Fork a child that trains on from the newest checkpoint; returns its process number."""
    child = os.fork()
    if child:
        return child
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as said:
        resume = ["--resume", str(folder)] if ms.newest_checkpoint(folder) else []
        status = ms.main(["--mode", "train", "--config", config, *resume])
    if status:
        os.write(2, said.getvalue().encode())
    os._exit(status)


def wait_for(moment: str, folder: Path, rng: random.Random, child: int) -> bool:
    """Wait for a moment to kill at; False where the child ended before it came."""
    ends = time.monotonic() + (rng.uniform(0.02, 1.2) if moment == "any" else 20)
    while time.monotonic() < ends:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        if moment != "any" and list(folder.glob(f".{moment}*.pth")):
            time.sleep(rng.uniform(0, 0.004))
            break
        time.sleep(0.0002)
    return True


def main() -> None:
    """Kill as often as asked, then let the run end."""
    config, kills, rng = sys.argv[1], int(sys.argv[2]), random.Random(int(sys.argv[3]))
    torch.set_num_threads(1)  # a forked child has no use for its parent's pool of threads
    folder = Path(json.loads(Path(config).read_text())["checkpoint_dir"])
    for number in range(kills):
        moment, before = MOMENTS[number % 3], newest(folder)
        child = start(config, folder)
        if not wait_for(moment, folder, rng, child):
            sys.exit("the run ended before it was killed as often as asked; give it more epochs")
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for path in folder.glob("[!.]*.pth"):  # whatever has its name is whole
            ms.load_checkpoint(str(path))
        print(json.dumps({"moment": moment, "before": before, "after": newest(folder)}), flush=True)
    _, status = os.waitpid(start(config, folder), 0)
    sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
