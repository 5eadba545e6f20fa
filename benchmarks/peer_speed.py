"""Other people's networks beside ours: size, and seconds for one picture in memory.

    python benchmarks/peer_speed.py --peer IAT=iat.pt2 --peer Zero-DCE=zero_dce.pt2 [--rounds 9] \\
        [--set KEY=VALUE ...]

A peer is a file of `torch.export.save`, made where its own code and weights are, for an input of
(1, 3, 400, 600) in [0, 1]:

    torch.export.save(torch.export.export(network.eval(), (torch.rand(1, 3, 400, 600),)), FILE)

Such a file is a program: take it from nobody but yourself. Each system runs once a turn, in one
process, in fp32; ours, and the fast weights beside them, a second time in mixed precision, where
this processor is good at it. Only the networks are timed, not reading and writing. Prints a table
of medians.
"""

from __future__ import annotations

import argparse
import sys
import zipfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np
import torch
from bench import by_turns, waiter
from footprint import HEIGHT, ROOT, WIDTH

sys.path.insert(0, str(ROOT))

import model_script as ms
from support.commands import run, shipped
from support.pictures import to_tensor
from support.runtime import choose_runtime
from support.settings import UserError, read_all


def load_peer(text: str) -> tuple[str, int, torch.nn.Module]:
    """NAME=FILE -> name, number of weights, and the network. Raises UserError."""
    name, _, file = text.partition("=")
    if not name or not zipfile.is_zipfile(file):
        raise UserError(f"--peer {text}: give NAME=FILE, a file of torch.export.save")
    try:
        program = torch.export.load(file)
    except Exception as error:  # a zip of another kind, another version's file, anything
        raise UserError(f"--peer {text}: torch cannot load it; export it again, here") from error
    shapes = [tuple(value.shape) for value in program.example_inputs[0]]
    if shapes != [(1, 3, HEIGHT, WIDTH)]:
        raise UserError(f"--peer {text}: its input is {shapes}, not (1, 3, {HEIGHT}, {WIDTH})")
    return name, count(program.parameters()), program.module()


def count(parameters: Iterable[torch.Tensor]) -> int:
    """Number of weights; those that layers share count once."""
    return sum({p.data_ptr(): p.numel() for p in parameters}.values())


def main(argv: Sequence[str] | None = None) -> int:
    """Time all and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--checkpoint", type=shipped, default=str(ms.RELEASED))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args(argv)

    def work() -> int:
        settings = read_all((ms.Config, ms.Use), None, arguments.set, ()) | {"device": "cpu"}
        if arguments.rounds < 1:
            raise UserError("--rounds must be at least 1")
        peers = [load_peer(text) for text in arguments.peer]
        pixels = np.random.default_rng(0).integers(0, 40, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        low = to_tensor(pixels)[None]
        sizes: dict[str, int] = {}
        works: dict[str, Callable[[], object]] = {}
        for ours, path in (("ours", arguments.checkpoint), ("ours, fast", shipped("fast"))):
            loaded = ms.load_model(path, settings, ms.ConditionalFlow)
            for mixed in (False, True):
                runtime = choose_runtime("cpu", mixed)
                name = f"{ours}, {str(runtime.dtype).removeprefix('torch.')}"
                sizes[name] = count(loaded.model.parameters())
                works[name] = partial(ms.enhance_pixels, loaded.model, pixels, loaded.use, runtime)
        for name, sizes[name], network in peers:
            works[name] = partial(torch.no_grad()(network), low)
        found = by_turns(works, arguments.rounds, 0, waiter("cpu"))
        first = next(iter(found.values()))
        print(f"{WIDTH}x{HEIGHT}, {torch.get_num_threads()} threads, {arguments.rounds} rounds")
        print("| system | parameters | seconds | over ours in float32 |\n|---|---|---|---|")
        for name, seconds in found.items():
            print(f"| {name} | {sizes[name]:,} | {seconds:.3f} | {seconds / first:.2f} |")
        return 0

    return run(work)


if __name__ == "__main__":
    sys.exit(main())
