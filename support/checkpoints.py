"""Checkpoints: reading what a stranger may have made, writing atomically, the folder of a run."""

from __future__ import annotations

import os
import pickletools
import warnings
import zipfile
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed.nn  # imported later, inside a process group, its functions would keep it

from support.files import atomic_path
from support.settings import UserError, shown

FORMAT_VERSION = 1


RUN_FILE = ".run_id"  # in checkpoint_dir: the run that trains there


# all that the pickle of a checkpoint may name; among the further names that PyTorch trusts some
# fill the memory from 50 bytes
PICKLED = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2"} | {
    f"torch {kind}Storage"
    for kind in (
        "Float",
        "Double",
        "Half",
        "BFloat16",
        "Long",
        "Int",
        "Short",
        "Char",
        "Byte",
        "Bool",
    )
}


LONGEST_PICKLE = 2**24


def refuse_hostile(path: str) -> None:
    """Raises UserError, before PyTorch reads a checkpoint, where it is packed, grows when it is
    read or names a function."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
        if packed or sum(entry.file_size for entry in entries) > os.path.getsize(path):
            raise UserError(f"{path}: not a checkpoint of this script (its content is compressed)")
        for entry in entries:
            if entry.filename.endswith("data.pkl"):
                if entry.file_size > LONGEST_PICKLE:
                    raise UserError(
                        f"{path}: not a checkpoint of this script (its table is too long)"
                    )
                codes = pickletools.genops(archive.read(entry))
                foreign = {str(name) for code, name, _ in codes if code.name == "GLOBAL"} - PICKLED
                if foreign:
                    name = shown(min(foreign))
                    raise UserError(
                        f"{path}: not a checkpoint of this script (it names {name}, which was not"
                        " run)"
                    )


def load_checkpoint(path: str) -> dict[str, Any]:
    """The content of a checkpoint, tensors on the CPU; nothing pickled is ever executed. Raises
    UserError."""
    try:
        refuse_hostile(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a foreign file may warn on its way to being refused
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except OSError as error:
        raise UserError(
            f"{path}: cannot read the checkpoint ({error.strerror or 'damaged file'})"
        ) from None
    # torch.load raises many kinds for hostile or damaged files; each is the same to the user
    except Exception as error:
        raise UserError(
            f"{path}: not a checkpoint of this script, or a damaged one ({type(error).__name__})"
        ) from None
    if type(content) is not dict or not {"format_version", "config", "model"} <= content.keys():
        raise UserError(
            f"{path}: not a checkpoint of this script (format_version, config or model is missing)"
        )
    config, version = content["config"], content["format_version"]
    if type(config) is not dict or not all(isinstance(key, str) for key in config):
        raise UserError(
            f"{path}: not a checkpoint of this script (its config is no table of settings)"
        )
    if type(version) is not int or version != FORMAT_VERSION:
        raise UserError(
            f"{path}: format version {shown(version)}, this script reads version {FORMAT_VERSION}"
        )
    if not all(isinstance(content.get(key, ""), str) for key in ("system", "run_id")):
        raise UserError(
            f"{path}: not a checkpoint of this script (its system and run_id are no texts)"
        )
    return content


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Tensors and plain data under a format version, atomically."""
    with atomic_path(path) as temporary:
        try:
            with open(temporary, "wb") as stream:
                torch.save({"format_version": FORMAT_VERSION, **content}, stream)
                stream.flush()
                os.fsync(stream.fileno())  # a power cut must not leave the name without the content
        except RuntimeError as error:  # torch reports a full disk so
            raise UserError(
                f"{path}: cannot write ({error}); check the folder and the free space"
            ) from None


def written_by(path: Path, run_id: str) -> bool:
    """Whether the run `run_id` wrote the checkpoint `path`; an unreadable one counts as
    another's."""
    try:
        return load_checkpoint(str(path)).get("run_id") == run_id
    except UserError:
        return False


def newest_checkpoint(folder: Path, run_id: str = "") -> str | None:
    """The checkpoint to resume from that was written last in `folder`, by the run `run_id` if one
    is named."""
    found = [*folder.glob("checkpoint_epoch_*.pth"), *folder.glob("checkpoint_interrupted.pth")]
    own = [path for path in found if path.stem.count("_") <= 2]  # those set aside carry a date
    latest = sorted(own, key=lambda path: path.stat().st_mtime, reverse=True)
    return next((str(path) for path in latest if not run_id or written_by(path, run_id)), None)


def set_aside(path: Path, run_id: str, log: Callable[[str], None] = print) -> None:
    """Rename `path`, with its date, when another run wrote it: no run destroys another's
    weights."""
    if not path.exists() or written_by(path, run_id):
        return
    stamp = datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y%m%d_%H%M%S")
    aside = path.with_name(f"{path.stem}_{stamp}{path.suffix}")
    for count in range(2, 1000):
        if not aside.exists():
            break
        aside = path.with_name(f"{path.stem}_{stamp}_{count}{path.suffix}")
    path.rename(aside)
    log(f"{path} is another run's; it is now {aside}")
