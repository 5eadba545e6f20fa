"""Commands: the command line, and how every mistake of the user becomes one line."""

from __future__ import annotations

import argparse
import ctypes
import io
import json
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch.distributed as dist

from support.settings import (
    OneLineParser,
    RunError,
    UserError,
    assignments,
    complain,
    key_parser,
    read_all,
)

EXAMPLES = """\
examples
  enhance    python {program} --mode enhance  --input low.jpg --output enhanced.jpg
  folder     python {program} --mode enhance  --input photos --output enhanced
  demo       python {program} --mode demo     --config {recipe}
  train      python {program} --mode train    --config {recipe}
  resume     python {program} --mode train    --resume {folder}
  evaluate   python {program} --mode evaluate --checkpoint {folder}/best_model.pth --config {recipe}
  outputs    python {program} --mode evaluate --outputs_dir FOLDER_OF_ANOTHER_METHOD
  curves     tensorboard --logdir logs

settings: in the JSON file of --config, as --set KEY=VALUE, or as --KEY VALUE
"""
# the options that a mode takes beside --config and --set
TAKES: dict[str, tuple[str, ...]] = {"train": ("resume",), "evaluate": ("checkpoint",)}
TAKES |= {"enhance": ("checkpoint", "input", "output")}
SHIPPED = Path(__file__).resolve().parent.parent / "checkpoints"
WEIGHTS = ("released", "fast")  # of it, by name; fast: a small copy, for clips and previews
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h, glibc
AS_TRAINED = ("crop_size", "image_size")  # weights know theirs


def shipped(name: str) -> str:
    """The path of the shipped weights called `name`; of all else, and where a file is called so,
    `name` as it is."""
    return str(SHIPPED / f"{name}.pth") if name in WEIGHTS and not Path(name).exists() else name


def parser_of(
    modes: Iterable[str], kinds: Sequence[type], system: Any, weights: str
) -> OneLineParser:
    """The parser of the command line, whose help describes every mode and every key of `kinds`."""
    folder = kinds[0]().checkpoint_dir
    examples = EXAMPLES.format(program=system.program, recipe=system.recipe, folder=folder)
    parser = OneLineParser(
        parents=[key_parser(kinds, system.unused)],
        usage="%(prog)s --mode MODE [options] [--set KEY=VALUE ...]",
        description=f"Enhance dark photographs with {system.method}.\n\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--mode", required=True, choices=list(modes))
    add("--config", metavar="FILE", help="JSON file with any of the keys below")
    add("--set", metavar="KEY=VALUE", action="append", default=[], help="one key; repeatable")
    names = f"weights to use: a file, or {' or '.join(WEIGHTS)}; default: {weights}"
    add("--checkpoint", metavar="FILE", type=shipped, help=names)
    add("--resume", metavar="FILE", help="train: the checkpoint, or its folder, to go on from")
    add("--input", metavar="FILE", help="enhance: a picture, a folder, or a pattern in quotes")
    add("--output", metavar="FILE", help="enhance: the picture (its suffix counts) or a folder")
    return parser


def parse(
    argv: Sequence[str] | None,
    modes: Iterable[str],
    kinds: Sequence[type],
    system: Any,
    released: Path | None,
) -> argparse.Namespace:
    """The arguments, with `settings` added: the config file's and --set's, checked.

    `kinds` are the dataclasses of the settings; `released` weights are the default of evaluate and
    enhance, without them the last training's. `outputs_dir` takes the place of weights. Raises
    UserError.
    """
    weights = str(released or "best_model.pth in checkpoint_dir")
    arguments = parser_of(modes, kinds, system, weights).parse_args(argv)
    takes = TAKES.get(arguments.mode, ())
    for name in ("checkpoint", "resume", "input", "output"):
        given = getattr(arguments, name) is not None
        if given and name not in takes:
            raise UserError(f"--{name} does nothing in --mode {arguments.mode}; leave it out")
        if not given and name in takes and name in ("input", "output"):
            raise UserError(f"--mode {arguments.mode} needs --{name} FILE")
    keys = {key.name for kind in kinds for key in fields(kind)}
    direct = {name: value for name, value in vars(arguments).items() if name in keys}
    words = [(name, v if isinstance(v, str) else json.dumps(v)) for name, v in direct.items()]
    arguments.set += [f"{name}={word}" for name, word in words]
    found = read_all(kinds, arguments.config, arguments.set, system.unused)
    arguments.settings = found
    idle = idle_keys(arguments.mode, kinds)
    for name in assignments(arguments.set):  # a config file may serve several modes
        if name in idle:
            sized = name == "image_size" and arguments.mode == "evaluate"
            hint = "use eval_size" if sized else "leave it out"
            raise UserError(f"{name} does nothing in --mode {arguments.mode}; {hint}")
    if arguments.mode == "evaluate" and found.get("outputs_dir"):
        if arguments.checkpoint is not None:
            hint = "outputs_dir scores pictures that are there; leave one of the two out"
            raise UserError(f"--checkpoint does nothing beside outputs_dir: {hint}")
    elif arguments.checkpoint is None and "checkpoint" in takes:
        folder = found.get("checkpoint_dir", kinds[0]().checkpoint_dir)
        arguments.checkpoint = str(released or Path(folder) / "best_model.pth")
    return arguments


def idle_keys(mode: str, kinds: Iterable[type]) -> set[str]:
    """Keys that do nothing in `mode`: those whose meaning begins with another mode's name, and
    where weights are used, those that they decide. None in demo, which trains and evaluates."""
    if mode not in TAKES:
        return set()
    meanings = {key.name: key.metadata["meaning"] for kind in kinds for key in fields(kind)}
    served = {name: re.split("[:,]", meaning)[0] for name, meaning in meanings.items()}
    others = {name for name, one in served.items() if one in TAKES and one != mode}
    return others if mode == "train" else others | set(AS_TRAINED)


def at_work(use: Any, mode: str) -> dict[str, Any]:
    """The settings `use` without those that do nothing in `mode`."""
    idle = idle_keys(mode, [type(use)])
    return {name: value for name, value in vars(use).items() if name not in idle}


def sources_of(arguments: argparse.Namespace) -> str:
    """The files that a command starts from, in words."""
    outputs = arguments.settings.get("outputs_dir") if arguments.mode == "evaluate" else None
    given = (arguments.config, arguments.resume, arguments.checkpoint, arguments.input)
    names = (*given, outputs)
    return ", ".join(name for name in names if name) or "default settings"


@contextmanager
def scarce_memory(source: Path, hint: str) -> Iterator[None]:
    """Where the memory does not do for the file `source` the block raises UserError with `hint`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # PyTorch's allocators raise the latter
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        raise UserError(f"{source}: not enough memory; {hint}") from None


def keep_memory() -> None:
    """Have the C library keep freed memory for the next layer, where it is glibc: the kernel need
    not clear it again, which took a quarter of a large picture's time."""
    with suppress(OSError, AttributeError):  # another C library has no such setting
        mallopt = ctypes.CDLL(None).mallopt
        for setting, value in ((M_MMAP_THRESHOLD, 2**30), (M_TRIM_THRESHOLD, 2**31 - 1)):
            mallopt(setting, value)


def run(work: Callable[[], int]) -> int:
    """Do `work`, which returns the exit status; every mistake of the user is one line."""
    keep_memory()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file's name need not be text
    with suppress(ValueError):  # SIGTERM as Ctrl-C, so that temporary files go; main thread only
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return work()
    except UserError as mistake:
        return complain(mistake)
    except OSError as error:  # what has no better message of its own
        where, reason = error.filename or "the output", error.strerror or error
        hint = "check the folder and the free space"
        return complain(UserError(f"{where}: {reason}; {hint}"))
    except RuntimeError as error:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            problem = f"{str(error).splitlines()[0]}; use --set compile=false"
            return complain(RunError(f"compile: {problem}"))
        if "gloo" not in str(error) and not isinstance(error, dist.DistError):
            raise
        return complain(RunError("another process of this job stopped; see its message"))
    except KeyboardInterrupt:  # training catches its own; elsewhere nothing half-written is left
        print("interrupted", file=sys.stderr)
        return 130
