"""Checkpoints from anywhere.

Good weights load. Everything else costs one line and no memory, and none of its code runs.
"""

from __future__ import annotations

import dataclasses
import io
import multiprocessing
import os
import pickle
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from cli_tools import assert_one_line_error, files_under, main_with, make_data, tiny_config
from conftest import randomise
from test_odd_pictures import resident

import model_script as ms
from support.checkpoints import FORMAT_VERSION, RETIRED, load_checkpoint
from support.scenes import training_twins
from support.settings import UserError

SECONDS, MEGABYTES = 5.0, 300.0
Content = dict[str, Any]


def good_content() -> Content:
    torch.manual_seed(5)
    config = ms.Config(flow_channels=8, num_flow_blocks=1, thumbnail_size=32)
    model = randomise(ms.ConditionalFlow(config), 0.04)
    content = {
        "format_version": FORMAT_VERSION,
        "config": dataclasses.asdict(config),
        "model": model.state_dict(),
    }
    return content | {
        "run_id": "r",
        "epoch": 1,
        "training_thumbnails": torch.zeros(3, 16, 16, 3, dtype=torch.uint8),
    }


def saved(content: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


def packed(
    data: bytes, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED
) -> bytes:
    """The zip file with every entry changed."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(stream, "w", compression) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, change(entry.filename, old.read(entry)))
    return stream.getvalue()


def pickled(code: bytes) -> bytes:
    """A checkpoint whose pickle is `code`."""
    return packed(saved({}), lambda name, data: code if name.endswith("data.pkl") else data)


def changed(**changes: Any) -> bytes:
    return saved(good_content() | changes)


def configured(**changes: Any) -> bytes:
    content = good_content()
    return saved(content | {"config": content["config"] | changes})


def weighted(change: Callable[[str, torch.Tensor], Any]) -> bytes:
    content = good_content()
    return saved(
        content | {"model": {name: change(name, value) for name, value in content["model"].items()}}
    )


def overlapping(data: bytes) -> bytes:
    """A zip whose table lists its largest entry a thousand times."""
    stream = io.BytesIO(data)
    with zipfile.ZipFile(stream, "a") as archive:
        largest = max(archive.filelist, key=lambda entry: entry.file_size)
        for number in range(1000):
            again = zipfile.ZipInfo(f"archive/data/9{number}")
            for name in ("header_offset", "CRC", "compress_size", "file_size"):
                setattr(again, name, getattr(largest, name))
            archive.filelist.append(again)
        archive._didModify = True
    return stream.getvalue()


def longer_storage() -> bytes:
    """The one tensor says that it has 2^30 numbers."""
    data = saved({"format_version": FORMAT_VERSION, "config": {}, "model": {"a": torch.ones(999)}})
    return packed(data, lambda name, content: content.replace(b"M\xe7\x03", b"J\0\0\0\x40"))


class Trap:
    """Makes a folder as soon as it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def laughs() -> list[Any]:
    """Two to the sixtieth items in sixty lists."""
    found: list[Any] = ["ha"]
    for _ in range(60):
        found = [found, found]
    return found


def circle() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


def traps(path: str) -> dict[str, bytes]:
    """Ways to run code on loading: each would make the folder `path`."""
    trap, text = Trap(path), path.encode()
    call = b"cposix\nmkdir\nX" + len(text).to_bytes(4, "little") + text + b"\x85R."
    sneaky = io.BytesIO(changed())
    with zipfile.ZipFile(sneaky, "a") as archive:
        archive.writestr("other/data.pkl", b"\x80\x02" + call)
    return {
        "plain pickle": pickle.dumps({"format_version": 1, "config": {}, "model": trap}),
        "old format": saved(
            {"format_version": 1, "config": {}, "model": trap}, _use_new_zipfile_serialization=False
        ),
        "among the weights": changed(model={"log_sigma": trap}),
        "in a corner": changed(notes=[{"x": trap}]),
        "as a key": saved({"format_version": 1, "config": {}, "model": {}, ("x", trap): 1}),
        "protocol 4": saved(good_content() | {"x": trap}, pickle_protocol=4),
        "old opcode": pickled(b"(S'" + text + b"'\niposix\nmkdir\n."),
        "reduce": pickled(b"\x80\x02" + call),
        "second pickle": sneaky.getvalue(),
    }


BAD: dict[str, tuple[Callable[[], bytes], str]] = {  # its content and a word of the refusal
    "text": (lambda: b"these are not weights\n", "not a checkpoint"),
    "picture": (lambda: b"\x89PNG\r\n\x1a\n" + bytes(99), "not a checkpoint"),
    "empty zip": (lambda: b"PK\x05\x06" + bytes(18), "not a checkpoint"),
    "zip of a text": (lambda: pickled(b"hello"), "not a checkpoint"),
    "old format": (
        lambda: saved(good_content(), _use_new_zipfile_serialization=False),
        "not a checkpoint",
    ),
    "zip bomb": (
        lambda: packed(
            changed(), lambda n, d: bytes(2**29) if n.endswith("pkl") else d, zipfile.ZIP_DEFLATED
        ),
        "compressed",
    ),
    "packed weights": (
        lambda: packed(changed(), lambda n, d: d, zipfile.ZIP_DEFLATED),
        "compressed",
    ),
    "overlapping entries": (lambda: overlapping(changed()), "not a checkpoint"),
    "long table": (lambda: pickled(b"\x80\x02" + b"K\x01" * 2**23 + b"."), "too long"),
    "bytes from nowhere": (
        lambda: pickled(b"\x80\x02cbuiltins\nbytearray\nJ\x00\x00\x00\x40\x85R."),
        "bytearray",
    ),
    "doubling": (
        lambda: pickled(
            b"\x80\x02"
            + b"c_codecs\nencode\n" * 29
            + b"X\x01\x00\x00\x00a"
            + b"X\x03\x00\x00\x00hex\x86R" * 29
            + b"."
        ),
        "encode",
    ),
    "storage from nowhere": (
        lambda: pickled(b"\x80\x02ctorch\nUntypedStorage\nJ\x00\x00\x00\x40\x85R."),
        "UntypedStorage",
    ),
    "tensor from nowhere": (
        lambda: pickled(b"\x80\x02ctorch\nFloatTensor\nJ\x00\x00\x00\x40\x85R."),
        "FloatTensor",
    ),
    "longer storage": (lambda: longer_storage(), "not a checkpoint"),
    "list": (lambda: saved([1, 2]), "missing"),
    "no model": (
        lambda: saved({k: v for k, v in good_content().items() if k != "model"}),
        "missing",
    ),
    "no config": (
        lambda: saved({k: v for k, v in good_content().items() if k != "config"}),
        "missing",
    ),
    "no version": (
        lambda: saved({k: v for k, v in good_content().items() if k != "format_version"}),
        "missing",
    ),
    "version 2": (lambda: changed(format_version=FORMAT_VERSION + 1), "format version"),
    "version true": (lambda: changed(format_version=True), "format version"),
    "version text": (lambda: changed(format_version="1"), "format version"),
    "version tensor": (lambda: changed(format_version=torch.ones(5)), "format version"),
    "version list": (lambda: changed(format_version=laughs()), "format version"),
    "system list": (lambda: changed(system=["ConditionalFlow"]), "not a checkpoint"),
    "system other": (lambda: changed(system="RetinexNet"), "RetinexNet"),
    "run table": (lambda: changed(run_id={}), "not a checkpoint"),
    "config list": (lambda: changed(config=[1]), "config"),
    "config none": (lambda: changed(config=None), "config"),
    "config tensor": (lambda: changed(config=torch.ones(3)), "config"),
    "config unknown": (lambda: configured(flow_chanels=8), "flow_channels"),
    "config absurd": (lambda: configured(flow_channels=10**9), "flow_channels must be an integer"),
    "config largest": (
        lambda: configured(flow_channels=1024, num_flow_blocks=64, thumbnail_size=512),
        "do not fit",
    ),
    "config smaller": (lambda: configured(num_flow_blocks=2), "do not fit"),
    "config circle": (lambda: configured(batch_size=circle()), "batch_size"),
    "config laughs": (lambda: configured(crop_scales=laughs()), "crop_scales"),
    "config tensor value": (lambda: configured(seed=torch.ones(4)), "seed"),
    "config folder list": (lambda: configured(train_low_dir=[1]), "train_low_dir"),
    "config number null": (lambda: configured(batch_size=None), "batch_size"),
    "config table": (lambda: configured(seed={"a": 1}), "seed"),
    "config folder null": (lambda: configured(val_low_dir="a\0b"), "val_low_dir"),
    "config odd keys": (lambda: configured(flips={(1, 2): {3: 4}}), "flips"),
    "weights none": (lambda: changed(model=None), "do not fit"),
    "weights list": (lambda: changed(model=[torch.ones(3)]), "do not fit"),
    "weights empty": (lambda: changed(model={}), "do not fit"),
    "weights one more": (
        lambda: changed(model=good_content()["model"] | {"more": torch.zeros(())}),
        "do not fit",
    ),
    "weights numbers": (lambda: weighted(lambda name, value: 1.0), "do not fit"),
    "weights transposed": (
        lambda: weighted(lambda name, value: value.mT if value.dim() > 1 else value[None]),
        "do not fit",
    ),
    "weights int": (lambda: weighted(lambda name, value: value.to(torch.int8)), "do not fit"),
    "weights bool": (lambda: weighted(lambda name, value: value > 0), "do not fit"),
    "weights complex": (lambda: weighted(lambda name, value: value.to(torch.complex64)), "not"),
    "weights spread": (
        lambda: weighted(lambda name, value: torch.zeros(1).expand(10**6, 16, 16, 3)),
        "do not fit",
    ),
    "weights NaN": (lambda: weighted(lambda name, value: value * float("nan")), "not finite"),
    "weights one infinity": (
        lambda: weighted(lambda n, v: v + float("inf") if n == "log_sigma" else v),
        "not finite",
    ),
    "weights beyond fp32": (
        lambda: weighted(lambda name, value: value.double() * 1e300),
        "not finite",
    ),
    "weights enormous": (lambda: weighted(lambda name, value: value * 1e30), "finite"),
    "weights singular": (
        lambda: weighted(lambda n, v: v * 0 - 200 if "log_diagonal" in n else v),
        "inverted",
    ),
}


class Outcome(NamedTuple):
    refusal: str
    seconds: float
    megabytes: float


def try_all(paths: list[Path]) -> list[Outcome]:
    """Load each and enhance a few pixels; anything but a UserError ends it. To be run in a process
    of its own."""
    torch.set_num_threads(1)
    pixels, outcomes = np.full((16, 16, 3), 40, np.uint8), []
    for path in paths:
        if Path("/proc/self/clear_refs").exists():
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before, started, refusal = resident("VmRSS"), time.process_time(), ""
        try:
            loaded = ms.load_model(str(path), {"device": "cpu"}, ms.ConditionalFlow)
            ms.enhance_pixels(loaded.model, pixels, loaded.use, loaded.runtime)
        except UserError as error:
            refusal = str(error)
        except BaseException as error:
            raise AssertionError(f"{path.name}: {type(error).__name__} {error}") from None
        outcomes.append(Outcome(refusal, time.process_time() - started, resident("VmHWM") - before))
    return outcomes


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """Of every bad file and of three good ones, which come first and bring in what a process loads
    but once."""
    folder = tmp_path_factory.mktemp("weights")
    good = {
        "good": changed(),
        "good double": weighted(lambda n, v: v.double()),
        "good half": weighted(lambda n, v: v.half()),
    }
    for name, data in [*good.items(), *((name, make()) for name, (make, _) in BAD.items())]:
        (folder / f"{name}.pth").write_bytes(data)
    names = [*good, *BAD, "missing"]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(try_all, [folder / f"{name}.pth" for name in names]).result()
    return dict(zip(names, found, strict=True))


def test_good_weights_load_in_any_precision(outcomes: dict[str, Outcome]) -> None:
    assert [outcomes[name].refusal for name in ("good", "good double", "good half")] == ["", "", ""]


@pytest.mark.parametrize("name", [*BAD, "missing"])
def test_bad_weights_cost_one_line(outcomes: dict[str, Outcome], name: str) -> None:
    found = outcomes[name]
    word = BAD[name][1] if name != "missing" else "no such checkpoint"
    assert word in found.refusal and "\n" not in found.refusal and len(found.refusal) < 500
    assert f"{name}.pth" in found.refusal or "--checkpoint" in found.refusal
    assert found.seconds < SECONDS and found.megabytes < MEGABYTES


@pytest.mark.parametrize("name", traps(""))
def test_no_code_of_a_checkpoint_runs(tmp_path: Path, name: str) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(traps(str(tmp_path / "ran"))[name])
    assert str(tmp_path / "ran").encode() in path.read_bytes()
    with pytest.raises(UserError, match=r"w\.pth: "):
        load_checkpoint(str(path))
    assert files_under(tmp_path) == {"w.pth"}


def test_the_traps_are_real(tmp_path: Path) -> None:
    """Guards the test above: the same content, trusted, makes the folder."""
    for number, name in enumerate(("plain pickle", "among the weights", "old format")):
        folder = tmp_path / str(number)
        data = traps(str(folder))[name]
        if name == "plain pickle":
            pickle.loads(data)
        else:
            torch.load(io.BytesIO(data), weights_only=False)
        assert folder.exists()


@pytest.mark.parametrize(
    "thumbnails",
    [
        [1],
        torch.zeros(2, 16, 16, 3),
        torch.zeros(16, dtype=torch.uint8),
        torch.zeros(1).byte().expand(10**9, 16, 16, 3),
    ],
)
def test_odd_training_thumbnails_flag_no_pair(
    thumbnails: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    targets = np.zeros((2, 16, 16, 3), np.uint8)
    assert training_twins(targets, {"training_thumbnails": thumbnails}) == [None, None]
    assert "no pair is flagged" in capsys.readouterr().out
    assert training_twins(targets, good_content()) == [True, True]


# training states ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and a checkpoint of one epoch."""
    folder = make_data(tmp_path_factory.mktemp("trained"), train=3)
    assert main_with("train", tiny_config(folder, num_epochs=1)) == 0
    return folder


def spoil_moments(training: Content) -> None:
    for values in training["optimizer"]["state"].values():
        values["exp_avg"] = torch.zeros(2)


SPOILED: dict[str, Callable[[Content], Any]] = {
    "escaping run": lambda content: content.update(run_id="../../elsewhere"),
    "absolute run": lambda content: content.update(run_id="/tmp/elsewhere"),
    "run above": lambda content: content.update(run_id=".."),
    "nameless run": lambda content: content.update(run_id=""),
    "null run": lambda content: content.update(run_id="a\0b"),
    "no table": lambda content: content.update(training=[1]),
    "empty": lambda content: content.update(training={}),
    "no run": lambda content: content.pop("run_id"),
    "optimizer": lambda content: content["training"].update(optimizer=[1]),
    "moments": lambda content: spoil_moments(content["training"]),
    "NaN moments": (
        lambda content: next(iter(content["training"]["optimizer"]["state"].values()))[
            "exp_avg"
        ].fill_(float("nan"))
    ),
    "step": lambda content: content["training"].update(step=-1),
    "steps": lambda content: content["training"].update(step=torch.ones(3)),
    "minutes": lambda content: content["training"].update(minutes=float("nan")),
    "best": lambda content: content["training"].update(best=float("nan")),
    "weights": lambda content: content["training"].update(model={}),
    "averaged": lambda content: content["training"].update(averaged=torch.ones(3)),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_a_damaged_training_state_is_refused_before_anything_is_written(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    content = torch.load(trained / "ckpt" / "checkpoint_epoch_1.pth", weights_only=True)
    SPOILED[kind](content)
    path = tmp_path / "in" / "damaged.pth"
    path.parent.mkdir()
    torch.save(content, path)
    outputs = {f"{name}_dir": str(tmp_path / name) for name in ("checkpoint", "log", "results")}
    settings = tiny_config(trained, num_epochs=2) | outputs
    capsys.readouterr()
    status = main_with("train", settings, "--resume", path)
    assert_one_line_error(
        status, capsys.readouterr().err.splitlines()[-1], "damaged.pth", "training state"
    )
    assert files_under(tmp_path) == {"in", "in/damaged.pth", "settings.json"}


def test_a_checkpoint_does_not_say_what_its_use_may_cost(trained: Path, tmp_path: Path) -> None:
    content = torch.load(trained / "ckpt" / "best_model.pth", weights_only=True)
    dear = dict(
        samples=64,
        uncertainty=True,
        tile_size=65536,
        memory_megabytes=10**6,
        cache_megabytes=10**6,
        overwrite=True,
    )
    content["config"] |= dear | dict(
        num_workers=64, exposure=6.0, quality=1, reference="/dev/zero", results_dir="elsewhere"
    )
    torch.save(content, tmp_path / "dear.pth")
    given = {"device": "cpu", "quality": 7}
    loaded = ms.load_model(str(tmp_path / "dear.pth"), given, ms.ConditionalFlow)
    assert loaded.use == ms.Use(device="cpu", quality=7)
    assert not set(dataclasses.asdict(loaded.model.config)) & RETIRED


def test_a_state_far_ahead_with_no_checkpoints_ends_at_once(trained: Path, tmp_path: Path) -> None:
    content = torch.load(trained / "ckpt" / "checkpoint_epoch_1.pth", weights_only=True)
    content["training"].update(step=10**12)
    torch.save(content, tmp_path / "ahead.pth")
    outputs = {f"{name}_dir": str(tmp_path / name) for name in ("checkpoint", "log", "results")}
    assert (
        main_with(
            "train",
            tiny_config(trained, num_epochs=2) | outputs,
            "--resume",
            tmp_path / "ahead.pth",
        )
        == 0
    )


def test_the_optimizer_keeps_its_own_settings(trained: Path, tmp_path: Path) -> None:
    """They follow from the config; a checkpoint that says otherwise, or nonsense, is not asked."""
    content = torch.load(trained / "ckpt" / "checkpoint_epoch_1.pth", weights_only=True)
    content["training"]["optimizer"]["param_groups"][0] |= {
        "betas": "nonsense",
        "weight_decay": None,
        "maximize": True,
    }
    torch.save(content, tmp_path / "odd.pth")
    outputs = {f"{name}_dir": str(tmp_path / name) for name in ("checkpoint", "log", "results")}
    assert (
        main_with(
            "train", tiny_config(trained, num_epochs=2) | outputs, "--resume", tmp_path / "odd.pth"
        )
        == 0
    )
