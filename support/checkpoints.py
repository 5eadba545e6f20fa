"""Checkpoints: reading what a stranger may have made, writing atomically, the folder of a run."""

from __future__ import annotations

import dataclasses
import os
import pickletools
import re
import time
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from support.cameras import CameraNet, build_camera_net
from support.curves import is_run_name
from support.files import atomic_path, make_folder, write_bytes
from support.processes import restarted
from support.settings import UserError, build, read_settings, shown

FORMAT_VERSION = 1
# all that the pickle of a checkpoint may name; among the further names that PyTorch trusts some
# fill the memory from 50 bytes
STORED = ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
PICKLED = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2"} | {
    f"torch {kind}Storage" for kind in STORED
}
LONGEST_PICKLE = 2**24
# keys of older checkpoints: November 2026 stored with the weights how they were used
RETIRED = {"cache_megabytes", "compile", "device", "eval_high_dir", "eval_low_dir", "eval_size"}
RETIRED |= {"exposure", "memory_megabytes", "num_workers", "on_bad_file", "overwrite", "pin_memory"}
RETIRED |= {"quality", "reference", "results_dir", "samples", "scenes", "temperature", "tile_size"}
RETIRED |= {"uncertainty"}
# what a training writes; checkpoint_epoch_mine.pth is somebody's own
WRITTEN = re.compile(r"best_model|checkpoint_epoch_\d+|checkpoint_interrupted", re.ASCII)


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


def refuse_other_system(checkpoint: dict[str, Any], path: str, ours: str) -> None:
    """Raises UserError where a checkpoint holds another system's weights than `ours`."""
    theirs = checkpoint.get("system", "ConditionalFlow")
    if theirs != ours:
        hint = "use the script that trained them"
        raise UserError(f"{path}: holds weights of {theirs}, not of {ours}; {hint}")


def load_checkpoint(path: str, system: str = "") -> dict[str, Any]:
    """The content of a checkpoint, tensors on the CPU; nothing pickled is ever executed. Raises
    UserError, also for another `system` than that, where one is named."""
    try:
        refuse_hostile(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a foreign file may warn on its way to being refused
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except FileNotFoundError:
        written = WRITTEN.fullmatch(Path(path).stem)
        hint = "--mode train writes it" if written else "check the name"
        if system in ("", "ConditionalFlow") and Path(path).name != "released.pth":
            hint += ", or use the released weights, checkpoints/released.pth"
        raise UserError(f"{path}: no such checkpoint; {hint}") from None
    except OSError as error:
        reason = error.strerror or "damaged file"
        raise UserError(f"{path}: cannot read the checkpoint ({reason})") from None
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
    if system:  # before its config is read: another system has other keys
        refuse_other_system(content, path, system)
    return content


def stored_config(checkpoint: dict[str, Any], path: str, given: dict[str, Any], kind: type) -> Any:
    """The checkpoint's own config under the settings `given`.

    Data folders recorded in the checkpoint count only where they exist: weights travel, data sets
    do not. RETIRED keys are dropped. Raises UserError where `given` names another architecture.
    """
    known = {k: v for k, v in checkpoint["config"].items() if k not in RETIRED}
    stored = read_settings([kind], known, path)
    data = ("_low_dir", "_high_dir")
    here = {k: v for k, v in stored.items() if not k.endswith(data) or os.path.isdir(v)}
    for key in dataclasses.fields(kind):
        mine = stored.get(key.name, getattr(kind(), key.name))
        if key.metadata["architecture"] and given.get(key.name, mine) != mine:
            clash = f"{path} was trained with {mine}, the config says {given[key.name]}"
            raise UserError(f"{key.name}: {clash}; drop one")
    return build(kind, here | given, path)


@torch.no_grad()
def load_weights(model: Any, checkpoint: dict[str, Any], path: str) -> None:
    """Put a checkpoint's weights into `model`, which may be on the meta device.

    Raises UserError when they are another system's, do not fit, are not finite or not invertible.
    """
    refuse_other_system(checkpoint, path, model.name())
    try:
        weights = dict(checkpoint["model"])
        for name, wanted in model.state_dict().items():
            found = weights[name]
            if (found.shape, found.is_floating_point()) != (
                wanted.shape,
                wanted.is_floating_point(),
            ):
                raise TypeError
            weights[name] = found.to(wanted.dtype)  # released ones may be stored in 16 bits
        model.load_state_dict(weights, assign=any(p.is_meta for p in model.parameters()))
    except (RuntimeError, AttributeError, TypeError, ValueError, KeyError):
        hint = "the weights do not fit the architecture that its config describes"
        raise UserError(f"{path}: {hint}") from None
    matrices = [
        layer.weight() for layer in model.modules() if callable(getattr(layer, "weight", None))
    ]
    if not all(bool(part.isfinite().all()) for part in [*model.parameters(), *matrices]):
        raise UserError(f"{path}: holds weights that are not finite; go back to an earlier one")
    if any(bool(torch.linalg.inv_ex(matrix).info) for matrix in matrices):
        raise UserError(f"{path}: holds weights that cannot be inverted; go back to an earlier one")


def build_model(system: type[Any], config: Any, checkpoint: dict[str, Any], path: str) -> Any:
    """A model of the checkpoint's weights, built without memory of its own until they fit.

    Raises UserError, see `load_weights`.
    """
    try:
        with torch.device("meta"):
            model = system(config)
    except RuntimeError:  # a class that computes with its weights as it is built
        model = system(config)
    load_weights(model, checkpoint, path)
    if any(buffer.is_meta for buffer in model.buffers()):  # those that are not stored
        model = system(config)
        load_weights(model, checkpoint, path)
    return model


def camera_parts(checkpoint: dict[str, Any], path: str) -> tuple[dict[str, Any], CameraNet]:
    """(the second network of released weights, for infrared pictures, as a checkpoint of its own;
    the small one that tells the cameras apart).

    Raises UserError where either is damaged.
    """
    found = checkpoint["cameras"]
    if type(found) is not dict or "infrared" not in found:
        raise UserError(f"{path}: its table of cameras is damaged; use another checkpoint")
    net = build_camera_net(found.get("camera_net"), path)
    return checkpoint | {"model": found["infrared"]}, net


def starting_weights(path: str, camera: str, teacher: str = "") -> dict[str, Any]:
    """The checkpoint that a new training starts from; of two networks that of `camera`, where auto
    means the ordinary one. Raises UserError for a `camera` of one, unless a `teacher` has it."""
    checkpoint = load_checkpoint(path)
    if "cameras" not in checkpoint:
        if camera == "auto" or teacher:
            return checkpoint
        raise UserError(f"camera: {path} holds one network; leave it out")
    return camera_parts(checkpoint, path)[0] if camera == "infrared" else checkpoint


def load_teacher(config: Any, camera: str, system: type[Any]) -> Any:
    """The model that a training learns from; of two networks as `starting_weights`.

    Raises UserError where its thumbnails have another size than `config` says.
    """
    path = config.teacher
    weights = starting_weights(path, camera)
    own = stored_config(weights, path, {}, system.config_class)
    if own.thumbnail_size != config.thumbnail_size:
        sizes = f"{path} has {own.thumbnail_size}, the pupil {config.thumbnail_size}"
        raise UserError(f"thumbnail_size: {sizes}; a teacher's must be its pupil's")
    return build_model(system, own, weights, path).eval().requires_grad_(False)


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


def runs_in(folder: Path) -> list[Path]:
    """The checkpoints that trainings left in `folder`, the one that was written last first."""
    found = [path for path in folder.glob("*.pth") if WRITTEN.fullmatch(path.stem)]
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def newest_checkpoint(folder: Path) -> str | None:
    """The checkpoint in `folder` to resume from: the one that was written last."""
    found = [path for path in runs_in(folder) if path.name != "best_model.pth"]
    return str(found[0]) if found else None


def remove_old(folder: Path, keep: int) -> None:
    """Remove all but the `keep` newest checkpoint_epoch_N.pth of `folder`."""
    epochs = [path for path in runs_in(folder) if path.name.startswith("checkpoint_epoch_")]
    for path in epochs[keep:]:
        path.unlink(missing_ok=True)


def refuse_other_run(folder: Path) -> None:
    """Raises UserError where a new training would meet another run's checkpoints."""
    if found := runs_in(folder):
        way = f"go on with it by --resume {folder}" if newest_checkpoint(folder) else "remove it"
        hint = f"{way}, or name another checkpoint_dir"
        raise UserError(f"{folder}: holds another run ({found[0].name}); {hint}")


def claim_folder(folder: Path) -> None:
    """Make `folder`, try to write there, and remove what a killed training left half-written.

    Raises UserError where nothing can be written: better before the first step than after an epoch.
    """
    make_folder(folder)
    write_bytes(folder / ".writable", b"")
    (folder / ".writable").unlink()
    for path in [*folder.glob(".checkpoint_*.pth"), *folder.glob(".best_model.*.pth")]:
        if time.time() - path.stat().st_mtime > 60:  # a younger one may be another process's work
            path.unlink(missing_ok=True)


@contextmanager
def damage_is_one_line(path: str) -> Iterator[None]:
    """Whatever goes wrong with a training state inside the block is a UserError that names it."""
    try:
        yield
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        hint = f"its training state is damaged ({type(error).__name__})"
        raise UserError(f"{path}: {hint}; resume from another") from None


def check_training_state(
    optimizer: torch.optim.Optimizer, step: int, minutes: float, best: float, run_id: str
) -> None:
    """Raises ValueError for what no training could have written."""
    if step < 0 or not 0 <= minutes < float("inf") or best != best:
        raise ValueError
    if not is_run_name(run_id):
        raise ValueError
    if isinstance(optimizer, torch.optim.Adam):  # another may keep what it likes
        for parameter, values in optimizer.state.items():
            for value in values.values():
                fits = value.shape in (parameter.shape, torch.Size())
                if not fits or not bool(value.isfinite().all()):
                    raise ValueError


def folder_of(given: str | None) -> str | None:
    """The folder of what --resume names, a checkpoint or a folder: that is where the run writes."""
    return given if not given or os.path.isdir(given) else str(Path(given).parent)


def resume_from(given: str | None, folder: Path) -> str | None:
    """The checkpoint to go on from: what --resume names, the newest where that is a folder, or the
    newest of the run that torchrun starts again. Raises UserError for a folder without one."""
    if restarted() and (own := newest_checkpoint(folder)):
        return own
    if not given or not os.path.isdir(given):
        return given
    newest = newest_checkpoint(Path(given))
    if newest is None:
        raise UserError(f"--resume {given}: no checkpoint_epoch_N.pth in this folder; name another")
    return newest
