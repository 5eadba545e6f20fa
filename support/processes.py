"""Processes: torchrun starts several; each does its share, the first one speaks and writes."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn  # imported later, inside a process group, its functions would keep it
from torch import Tensor
from tqdm import tqdm

from support.settings import UserError


def world_size() -> int:
    """How many processes do this job together; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's place among them, from 0; the first one prints and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def shard(items: Sequence[Any]) -> Sequence[Any]:
    """Every n-th item, from this process's rank on."""
    return items[rank() :: world_size()]


def broadcast(value: Any) -> Any:
    """The first process's `value`, in every process."""
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box)
    return box[0]


def all_gather(value: Any) -> list[Any]:
    """Every process's `value`, by rank, in every process. None goes on before all have come."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def all_reduce(values: Tensor) -> Tensor:
    """The sum of every process's `values`, in place."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


@contextmanager
def process_group(mode: str, device: str) -> Iterator[None]:
    """Under torchrun, join the other processes: by nccl on CUDA, else by gloo.

    All but the first fall silent. Raises UserError.
    """
    if not dist.is_torchelastic_launched():
        yield
        return
    if mode not in ("train", "evaluate", "enhance") and os.environ["WORLD_SIZE"] != "1":
        raise UserError(f"--mode {mode} is the work of one process; start it without torchrun")
    here, place = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])
    cuda = device in ("auto", "cuda") and torch.cuda.is_available()
    if cuda:
        count = torch.cuda.device_count()
        if here > count:
            hint = f"there are {count} GPUs here; start one process each"
            raise UserError(f"--nproc_per_node={here}: {hint}")
        torch.cuda.set_device(place)
    elif here > 1 and os.environ.get("OMP_NUM_THREADS") == "1":  # torchrun's default idles cores
        affinity = getattr(os, "sched_getaffinity", None)
        cores = len(affinity(0)) if affinity else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // here))
    dist.init_process_group("nccl" if cuda else "gloo", **rendezvous())
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if rank() else sys.stdout):
            yield
            all_gather(True)  # leave together: who leaves a group that is at work may crash
    finally:
        # The group's threads must end before the interpreter does: one that then asks for the GIL
        # aborts the process. DistributedDataParallel holds the group and lies in a cycle.
        gc.collect()
        dist.destroy_process_group()


def rendezvous() -> dict[str, Any]:
    """Where the processes meet. torchrun's own store outlives a restart, and with it the addresses
    of the dead (pytorch issue 135712): each attempt gets a prefix of its own."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    several_hosts = os.environ.get("GROUP_WORLD_SIZE", "1") != "1"
    if several_hosts and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        switch = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
        raise UserError(f"--max_restarts on several hosts needs {switch} on each; set it there")
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False)
    attempt = f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}"
    return dict(
        store=dist.PrefixStore(attempt, store),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )


def restarted() -> bool:
    """Whether torchrun started this job again. Each host counts its own failures alone, so any
    process that was restarted speaks for all."""
    return any(all_gather(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"))


def progress_style() -> dict[str, Any]:
    """tqdm settings: lively on a terminal, a line every half minute in a log, one process only."""
    interval = 0.2 if sys.stderr.isatty() else 30.0
    return dict(dynamic_ncols=True, mininterval=interval, maxinterval=interval, disable=rank() > 0)


@contextmanager
def steps_shown(what: str, unit: str, least: int) -> Iterator[Callable[[int, int], None]]:
    """A function of steps done and steps in total that moves a bar with the time left; there is no
    bar for fewer than `least` steps."""
    bar: Any = None

    def show(done: int, total: int) -> None:
        nonlocal bar
        if bar is None and total >= least:
            bar = tqdm(total=total, desc=what, unit=unit, leave=False, **progress_style())
        if bar is not None:
            bar.update(done - bar.n)

    try:
        yield show
    finally:
        if bar is not None:
            bar.close()


@contextmanager
def polite_signals() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM append to the yielded list instead of breaking a step in two.

    A second Ctrl-C breaks.
    """
    caught: list[int] = []

    def note(number: int, frame: Any) -> None:
        caught.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: no signals to catch
        before = {}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_interrupts(worker: int) -> None:
    """Loader processes leave Ctrl-C to the main one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def divide(batch: Sequence[Any], place: int, of: int, parts: int) -> list[tuple[list[Any], float]]:
    """What the process at `place` of `of` does of a batch, in up to `parts` parts, each with its
    share of the batch.

    A process for which nothing is left does the first item at weight 0: it is needed when gradients
    are exchanged.
    """
    mine = np.array_split(np.arange(len(batch)), of)[place]
    chunks = [chunk for chunk in np.array_split(mine, parts) if len(chunk)]
    shares = [([batch[i] for i in chunk], len(chunk) / len(batch)) for chunk in chunks]
    return shares or [([batch[0]], 0.0)]


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A hidden folder that becomes `folder` when the block succeeds in all processes, and vanishes
    when it does not."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        yield broadcast(temporary)
        all_gather(True)
        if rank() == 0:
            temporary.rename(folder)
    except OSError as error:
        reason = error.strerror or error
        hint = "check the folder and the free space"
        raise UserError(f"{folder}: cannot write ({reason}); {hint}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
