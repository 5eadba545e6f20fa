"""Coverage-guided fuzzing of what reads files from strangers: pictures, configs and checkpoints.

    pip install atheris
    python tests/fuzz/fuzz_loaders.py --target pictures --minutes 10

Every exception but UserError is a finding, and so is an answer that breaks a promise. The input is
written to --findings with the traceback, once for each place in the code, and the search goes on. A
library's crash, 20 s for one input or 2 GB of memory end it, with the input in the same folder. The
exit status is 1 when something was found.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE.parent)]
try:
    import atheris
except ImportError:
    sys.exit("error: the fuzzer needs the package atheris; run pip install atheris")
import torch  # noqa: E402
from torch import _weights_only_unpickler as unpickler  # noqa: E402

with atheris.instrument_imports(include=["model_script", "support", "PIL"]):
    import odd_pictures
    from PIL import Image

    import model_script as ms
    from support.checkpoints import FORMAT_VERSION
    from support.commands import parse
    from support.decoding import SUFFIXES, read_image, read_picture
    from support.runtime import Runtime
    from support.settings import UserError, build, read_config_file, read_settings

    Image.init()  # loads the formats, so that they are watched too
unpickler.Unpickler.load = atheris.instrument_func(unpickler.Unpickler.load)

CPU = Runtime(torch.device("cpu"), torch.float32)
SMALL = {"flow_channels": 8, "num_flow_blocks": 1, "thumbnail_size": 32}
KINDS, SYSTEM = (ms.Config, ms.Use), ms.ConditionalFlow


class Echo(ms.System):
    """Gives back what it gets."""

    def enhance(self, low: torch.Tensor, temperature: float = 0.0) -> torch.Tensor:
        return low


def pictures(data: bytes, path: Path) -> None:
    """A picture is refused, or has the promised form and can be written in every format."""
    path.write_bytes(data)
    picture = read_picture(path)
    height, width = picture.pixels.shape[:2]
    assert picture.pixels.shape == (height, width, 3) and min(height, width) >= 16
    assert picture.pixels.dtype in ("uint8", "uint16")
    assert picture.alpha is None or (picture.alpha.shape, picture.alpha.dtype) == (
        (height, width),
        picture.pixels.dtype,
    )
    assert read_image(path).shape == picture.pixels.shape
    if height * width < 10_000:
        suffix = SUFFIXES[len(data) % len(SUFFIXES)]
        target = path.with_name(f"out{suffix}")
        loaded = ms.Loaded(Echo(ms.Config()), ms.Use(device="cpu"), CPU, {})
        ms.enhance_file(path, target, loaded, None)
        assert read_picture(target).pixels.shape == picture.pixels.shape


def config(data: bytes, path: Path) -> None:
    """Settings are refused, or are those of Config and Use; a line of the text does for --set."""
    path.write_bytes(data)
    line = data.split(b"\n")[0].decode("utf-8", "surrogateescape").replace("\0", "")
    for read in (
        lambda: parse(["--mode", "train", f"--set={line}"], ms.MODES, KINDS, SYSTEM, None).settings,
        lambda: read_config_file(str(path)),
    ):
        try:
            found = read_settings(KINDS, read(), "here")
            made = [build(kind, found, "here") for kind in KINDS]
        except UserError as error:
            assert len(str(error)) < 2000 + len(line)
        else:
            text = json.dumps({k: v for one in made for k, v in dataclasses.asdict(one).items()})
            again = read_settings(KINDS, json.loads(text), "again")
            assert [build(kind, again, "again") for kind in KINDS] == made


def checkpoint_of(pickle: bytes = b"") -> bytes:
    """A small good checkpoint; with another pickle, where one is given."""
    torch.manual_seed(0)
    made = ms.Config(**SMALL)
    content = {
        "format_version": FORMAT_VERSION,
        "config": dataclasses.asdict(made),
        "run_id": "r",
    }
    good, stream = io.BytesIO(), io.BytesIO()
    torch.save(content | {"model": ms.ConditionalFlow(made).state_dict()}, good)
    with zipfile.ZipFile(good) as old, zipfile.ZipFile(stream, "w") as new:
        for entry in old.infolist():
            new.writestr(
                entry.filename, (entry.filename.endswith("data.pkl") and pickle) or old.read(entry)
            )
    return stream.getvalue()


def checkpoint(data: bytes, path: Path) -> None:
    """The input after its first byte: a whole file where that byte is even.

    Else it is the pickle of a file that is good otherwise.
    """
    path.write_bytes(checkpoint_of(data[1:]) if data[:1] and data[0] % 2 else data[1:])
    ms.load_model(str(path), {"device": "cpu"}, ms.ConditionalFlow)


def seeds(target: str, folder: Path) -> None:
    """Good and odd files to start from."""
    if target == "pictures":
        odd = odd_pictures.make_corpus(folder / "made")
        found = [one.data for one in odd.values() if 0 < len(one.data) < 10_000]
    elif target == "config":
        values: dict[str, Any] = dataclasses.asdict(ms.Config()) | dataclasses.asdict(ms.Use())
        found = [
            json.dumps(values).encode(),
            *(f"{name}={json.dumps(value)}".encode() for name, value in values.items()),
        ]
        found += [json.dumps({name: value}).encode() for name, value in values.items()]
    else:
        with zipfile.ZipFile(io.BytesIO(checkpoint_of())) as archive:
            pickle = next(
                archive.read(name) for name in archive.namelist() if name.endswith("data.pkl")
            )
        found = [b"\0" + checkpoint_of(), b"\1" + pickle, b"\1\x80\x02}."]
    (folder / "seeds").mkdir()
    for number, data in enumerate(found):
        (folder / "seeds" / str(number)).write_bytes(data)


TARGETS: dict[str, Callable[[bytes, Path], None]] = {
    "pictures": pictures,
    "config": config,
    "checkpoint": checkpoint,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--target", choices=TARGETS, required=True)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument(
        "--findings",
        type=Path,
        default=Path("fuzz_findings"),
        help="where inputs that broke something go",
    )
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    arguments.findings.mkdir(parents=True, exist_ok=True)
    seeds(arguments.target, folder)
    ends, runs, found = time.monotonic() + 60 * arguments.minutes, 0, set()

    def one(data: bytes) -> None:
        nonlocal runs
        # libFuzzer itself would end the process without a word of what was found
        if time.monotonic() > ends:
            print(f"{arguments.target}: {runs} inputs, {len(found)} findings", flush=True)
            shutil.rmtree(folder)
            os._exit(1 if found else 0)
        runs += 1
        try:
            TARGETS[arguments.target](data, folder / "input")
        except UserError:
            pass
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            if (type(error), place.filename, place.lineno) not in found:
                found.add((type(error), place.filename, place.lineno))
                name = (
                    arguments.findings
                    / f"{arguments.target}_{hashlib.sha256(data).hexdigest()[:12]}"
                )
                name.write_bytes(data)
                name.with_suffix(".txt").write_text(
                    traceback.format_exc(), encoding="utf-8", errors="backslashreplace"
                )
                print(
                    f"found: {type(error).__name__} at {place.filename}:{place.lineno}, see {name}",
                    flush=True,
                )

    limits = [
        "-verbosity=0",
        "-max_len=65536",
        "-timeout=20",
        "-rss_limit_mb=2048",
        f"-artifact_prefix={arguments.findings}/",
    ]
    atheris.Setup([sys.argv[0], str(folder / "seeds"), *limits], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
