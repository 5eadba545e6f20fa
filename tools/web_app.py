"""A page in the browser for your own photographs: drop them, compare, adjust, download.

    pip install flask waitress
    python tools/web_app.py [--checkpoint FILE ...] [--port 8000] [--set KEY=VALUE ...]

Uploads live in memory alone and are forgotten. A file's name goes back to its owner, in the name
of the download, and is used for nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from repository import ROOT

import model_script as ms
from support.checkpoints import load_checkpoint
from support.commands import WEIGHTS, run, shipped
from support.settings import OneLineParser, UserError, complain, read_all

try:
    import waitress
    from web_page import make_app
except ImportError as missing:
    sys.exit(
        complain(
            UserError(f"the page needs the package {missing.name}; run pip install flask waitress")
        )
    )

from studio import KEEP_BYTES, Studio
from web_results import SAMPLES, sample_picture

ASKED = ("samples", "uncertainty")  # by each visitor, not on the command line


def find_checkpoints(given: Sequence[str]) -> list[Path]:
    """Those given, or every *.pth under checkpoints/ that holds a model, the shipped weights and
    best_model.pth first. Raises UserError for none."""
    if given:
        for name in given:
            load_checkpoint(name)
        return [Path(name) for name in given]
    first = [ROOT / "checkpoints" / f"{name}.pth" for name in (*WEIGHTS, "best_model")]
    there = sorted((ROOT / "checkpoints").rglob("*.pth"))
    found: list[Path] = []
    for path in sorted(there, key=lambda path: first.index(path) if path in first else len(first)):
        try:
            load_checkpoint(str(path))
        except UserError:
            continue
        found.append(path)
    if not found:
        hint = "train a model, or name one with --checkpoint FILE"
        raise UserError(f"checkpoints: no weights found; {hint}")
    return found


def bounded(kind: Callable[[str], float], low: float, high: float) -> Callable[[str], float]:
    """The parser of an option's number in [low, high]; nan and infinities are in no range."""

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            if low <= (value := kind(text)) <= high:
                return value
        name = "whole number" if kind is int else "number"
        raise argparse.ArgumentTypeError(
            f"give a {name} in [{low:g}, {high:g}] instead of {text!r}"
        )

    return parse


def listen(studio: Studio, arguments: argparse.Namespace, create: Callable[..., Any]) -> Any:
    """The server, which has its port already. Raises UserError where there is no listening at the
    address asked for."""
    host, port = arguments.host, arguments.port
    # bodies up to the limit stay in memory: waitress, too, would put larger ones into temporary
    # files
    room = int(arguments.max_megabytes * 2**20) + 2**20
    limits = dict(max_request_body_size=room, inbuf_overflow=room, channel_timeout=60)
    # so many uploads may be on their way, and in memory, together
    limits |= dict(connection_limit=40)
    # no view is that large; full-size pictures pass it by, and `turn` bounds them
    limits |= dict(outbuf_overflow=2**24)
    app = make_app(studio, arguments.max_megabytes)
    try:
        return create(app, host=host, port=port, threads=8, ident=None, **limits)
    # waitress's word for a host that has no address; the numbers are checked before
    except ValueError as error:
        raise UserError(
            f"--host {host}: no such address; name one of this machine, such as 127.0.0.1"
        ) from error
    except OSError as error:
        option = f"--host {host}" if error.errno == errno.EADDRNOTAVAIL else f"--port {port}"
        raise UserError(f"{option}: cannot listen ({error.strerror}); choose another") from error


def main(
    argv: Sequence[str] | None = None, create: Callable[..., Any] = waitress.create_server
) -> int:
    """Serve the page until Ctrl-C; returns the exit status."""
    most = KEEP_BYTES / 2**20  # megabytes; the queue takes no more
    parser = OneLineParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add, many = parser.add_argument, functools.partial(parser.add_argument, action="append")
    weights = "weights to offer, a file, or released or fast; repeatable"
    many("--checkpoint", metavar="FILE", type=shipped, default=[], help=weights)
    here = "address to listen at; the default is this machine alone"
    add("--host", default="127.0.0.1", help=here)
    add("--port", type=bounded(int, 1, 65535), default=8000)
    size, area = bounded(float, 0.1, most), bounded(float, 0.1, 1000)
    add("--max-megabytes", type=size, default=40, help=f"largest upload, 0.1 to {most:g}")
    add("--max-megapixels", type=area, default=50, help="largest picture, 0.1 to 1000")
    many("--set", metavar="KEY=VALUE", default=[], help="a key, as in model_script.py; repeatable")

    def work() -> int:
        arguments = parser.parse_args(argv)
        settings = read_all((ms.Config, ms.Use), None, arguments.set, ASKED)
        studio = Studio(find_checkpoints(arguments.checkpoint), settings, arguments.max_megapixels)
        with contextlib.ExitStack() as stack:
            stack.callback(studio.close)
            server = listen(studio, arguments, create)  # a taken port is told before all else
            stack.callback(server.close)
            studio.load(next(iter(studio.models)))
            studio.show_example(sample_picture(next(iter(SAMPLES))))
            at = f"http://{arguments.host}:{arguments.port}/"
            print(f"open {at} in a browser; Ctrl-C ends", flush=True)
            server.run()
        return 0

    return run(work)


if __name__ == "__main__":
    sys.exit(main())
