"""A local page for trying models on your own photographs: before/after slider, two models side by
side, uncertainty.

    pip install flask waitress
    python tools/web_app.py [--checkpoint FILE ...] [--port 8000] [--set KEY=VALUE ...]

An upload lives in memory alone: it is decoded, enhanced by one worker (a queue of one, whose place
the page shows) and forgotten after KEEP_SECONDS or when newer results need its share of KEEP_BYTES.
File names of uploads are never used.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import functools
import io
import itertools
import queue
import secrets
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from repository import ROOT, load_any

import model_script as ms
from support.checkpoints import load_checkpoint
from support.commands import run
from support.decoding import Picture, opened, read_picture
from support.pictures import encode_picture, heat_map, level_table
from support.settings import OneLineParser, UserError, complain, read_all
from support.simulated import demo_photograph, simulate_infrared

try:
    import flask
    import waitress
except ImportError as missing:
    sys.exit(
        complain(
            UserError(f"the page needs the package {missing.name}; run pip install flask waitress")
        )
    )

KEEP_BYTES, KEEP_SECONDS, LONGEST_QUEUE = 2**29, 900, 32
# of the eight threads, so many make full-size pictures or wait to: one for each model, side by side
WHOLE_TOGETHER = 2
ASKED = ("samples", "uncertainty")  # by each visitor, not on the command line
SAMPLES = {"astronaut": "Astronaut", "rocket": "Rocket", "coffee": "Coffee"}


class TooBusy(Exception):
    """There is no room at the moment; its text is the answer."""


@dataclasses.dataclass
class Job:
    """An upload on its way: what was asked, then either what came of it or why nothing did."""

    data: bytes
    model: str
    samples: int
    uncertainty: bool
    created: float = dataclasses.field(default_factory=time.monotonic)
    state: str = "waiting"  # waiting, working, done, failed
    message: str = ""
    seconds: float = 0.0
    picture: Picture | None = None
    enhanced: ms.Enhanced | None = None

    @property
    def size(self) -> int:
        """Bytes it holds."""
        arrays = [self.picture.pixels, self.picture.alpha] if self.picture else []
        arrays += (
            [self.enhanced.best, *self.enhanced.samples, self.enhanced.deviation]
            if self.enhanced
            else []
        )
        return len(self.data) + sum(array.nbytes for array in arrays if array is not None)


class Studio:
    """The models, and the one worker that uses them."""

    def __init__(
        self, checkpoints: Sequence[Path], settings: dict[str, Any], megapixels: float
    ) -> None:
        self.models = {self._label(path): path for path in checkpoints}
        self.settings, self.megapixels = settings, megapixels
        self.jobs: dict[str, Job] = {}
        self.lock, self.todo = threading.Lock(), queue.Queue[str]()
        # drawing takes several times a picture's memory: one view at a time, which is soon over,
        # and one whole picture
        self.drawing, self.packing, self.places = (
            threading.Lock(),
            threading.Lock(),
            threading.Semaphore(WHOLE_TOGETHER),
        )
        # the bytes of whole pictures still open for a browser
        self.unsent = weakref.WeakKeyDictionary[io.BytesIO, int]()
        self.closing = False
        self.load = functools.lru_cache(maxsize=2)(self._load)
        self.worker = threading.Thread(target=self._work, daemon=True)
        self.worker.start()

    def close(self) -> None:
        """Let the worker finish what it does, not what waits, and end it: Python must not exit
        while it is inside a library."""
        self.closing = True
        self.todo.put("")
        self.worker.join()

    @staticmethod
    def _label(path: Path) -> str:
        resolved = path.resolve()
        return str(resolved.relative_to(ROOT)) if ROOT in resolved.parents else str(path)

    def _load(self, label: str) -> ms.Loaded:
        # not what the checkpoint holds beside the weights, which may be large
        return load_any(str(self.models[label]), self.settings)._replace(checkpoint={})

    def submit(self, data: bytes, model: str, samples: int, uncertainty: bool) -> str:
        """The new job's name. Raises UserError for what can be seen to be no fit picture, TooBusy
        when too many wait."""
        with opened(io.BytesIO(data)) as picture:
            width, height = picture.size
        if width * height > self.megapixels * 1e6:
            raise UserError(
                f"the picture has {width * height / 1e6:.1f} megapixels; this page takes"
                f" {self.megapixels:g}"
            )
        with self.lock:
            waiting = [job for job in self.jobs.values() if job.state in ("waiting", "working")]
            if (
                len(waiting) >= LONGEST_QUEUE
                or sum(job.size for job in waiting) + len(data) > KEEP_BYTES
            ):
                raise TooBusy("too many pictures are waiting; try again in a moment")
            name = secrets.token_urlsafe(16)
            self.jobs[name] = Job(data, model, samples, uncertainty)
        self.todo.put(name)
        return name

    def place(self, name: str) -> int:
        """How many jobs are before this one."""
        with self.lock:
            before = itertools.takewhile(lambda other: other != name, self.jobs)
            return sum(self.jobs[other].state in ("waiting", "working") for other in before)

    @contextlib.contextmanager
    def turn(self, whole: bool) -> Iterator[None]:
        """To draw within. Views wait for each other; a whole picture may take half a minute, so
        that only WHOLE_TOGETHER are taken on: threads stay free for everything else.

        Raises TooBusy for more, and while slow browsers have yet to fetch more than KEEP_BYTES of
        whole pictures.
        """
        if not whole:
            with self.drawing:
                yield
            return
        busy = TooBusy("too many full-size pictures are on their way; try again in a moment")
        if not self.places.acquire(blocking=False):
            raise busy
        try:
            with self.packing:
                if (
                    sum(size for stream, size in self.unsent.items() if not stream.closed)
                    > KEEP_BYTES
                ):
                    raise busy
                yield
        finally:
            self.places.release()

    def forget(self) -> None:
        """Drop finished jobs that are old, or whose room newer ones need; the newest stays, and
        those that wait."""
        with self.lock:
            finished = [name for name, job in self.jobs.items() if job.state in ("done", "failed")]
            held, now = 0, time.monotonic()
            for age, name in enumerate(reversed(finished)):
                held += self.jobs[name].size
                if (held > KEEP_BYTES and age) or now - self.jobs[name].created > KEEP_SECONDS:
                    del self.jobs[name]

    def _work(self) -> None:
        while True:
            try:
                name = self.todo.get(timeout=30)
            except queue.Empty:
                self.forget()
                continue
            if self.closing:
                return
            job = self.jobs[name]
            job.state = "working"
            try:
                self._do(job)
                job.state = "done"
            except UserError as error:
                job.state, job.message = "failed", str(error)
            except Exception as error:  # the page must answer, whatever a picture does to a library
                job.state, job.message = (
                    "failed",
                    f"this picture cannot be enhanced ({type(error).__name__})",
                )
            job.data = b""
            self.forget()

    def _do(self, job: Job) -> None:
        started = time.perf_counter()
        job.picture = read_picture(io.BytesIO(job.data))
        loaded = self.load(job.model)
        model, _ = loaded.choose(job.picture.pixels)
        wanted = dataclasses.replace(loaded.use, samples=job.samples, uncertainty=job.uncertainty)
        job.enhanced = ms.enhance_pixels(model, job.picture.pixels, wanted, loaded.runtime)
        job.seconds = time.perf_counter() - started


class InMemoryRequest(flask.Request):
    """Werkzeug would put an upload above 500 kB into a temporary file."""

    def _get_file_stream(self, *_: Any, **__: Any) -> io.BytesIO:
        return io.BytesIO()


@functools.cache
def sample_picture(name: str) -> bytes:
    """A photograph that ships with scikit-image, as the demo's simulated sensor saw it: a PNG."""
    rng = np.random.default_rng(0)
    high = np.asarray(demo_photograph(name))[:512, :512]
    return encode_picture(simulate_infrared(high, rng), ".png", Picture(high))


def make_app(studio: Studio, megabytes: float) -> flask.Flask:
    """The page and its few addresses; `megabytes` limits an upload."""
    app = flask.Flask(__name__, static_folder=None)
    app.request_class = InMemoryRequest
    app.config["MAX_CONTENT_LENGTH"] = int(megabytes * 2**20)
    app.config["MAX_FORM_MEMORY_SIZE"] = app.config["MAX_CONTENT_LENGTH"]

    def say(status: int, message: str) -> flask.Response:
        response = flask.jsonify(error=message)
        response.status_code = status
        return response

    def find(name: str) -> Job:
        job = studio.jobs.get(name)
        if job is None:
            flask.abort(say(404, "this result is no longer kept; upload the picture again"))
        return job

    def finished(name: str) -> tuple[Picture, ms.Enhanced]:
        job = find(name)
        if job.picture is None or job.enhanced is None:
            flask.abort(say(409, job.message or "not ready yet"))
        return job.picture, job.enhanced

    def number(name: str, default: float, low: float, high: float) -> float:
        try:
            value = float(flask.request.values.get(name, default))
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            flask.abort(say(400, f"{name} must be a number in [{low:g}, {high:g}]"))
        return value

    @app.get("/")
    def page() -> flask.Response:
        nonce = secrets.token_urlsafe(16)
        options = {
            "models": list(studio.models),
            "samples": SAMPLES,
            "megabytes": megabytes,
            "nonce": nonce,
        }
        response = flask.Response(
            flask.render_template("page.html", **options), mimetype="text/html"
        )
        response.headers["Content-Security-Policy"] = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src"
            " 'self' blob: data:; connect-src 'self'; form-action 'none'; base-uri 'none';"
            " frame-ancestors 'none'"
        )
        return response

    @app.get("/samples/<name>")
    def sample(name: str) -> flask.Response:
        if name not in SAMPLES:
            return say(404, "no such sample")
        return flask.Response(sample_picture(name), mimetype="image/png")

    @app.post("/jobs")
    def submit() -> flask.Response:
        origin = flask.request.headers.get("Origin")
        if origin and origin.split("://", 1)[-1] != flask.request.host:
            return say(403, "uploads are taken from this page alone")
        upload = flask.request.files.get("picture")
        if upload is None:
            return say(400, "choose a picture first")
        model = flask.request.form.get("model", next(iter(studio.models)))
        if model not in studio.models:
            return say(400, "no such model")
        samples, uncertainty = (
            int(number("samples", 0, 0, 4)),
            flask.request.form.get("uncertainty") == "1",
        )
        try:
            name = studio.submit(upload.stream.read(), model, samples, uncertainty)
        except UserError as error:
            return say(400, str(error))
        response = flask.jsonify(job=name)
        response.status_code = 202
        return response

    @app.get("/jobs/<name>")
    def status(name: str) -> flask.Response:
        job = find(name)
        answer: dict[str, Any] = {
            "state": job.state,
            "message": job.message,
            "seconds": round(job.seconds, 2),
        }
        if job.state == "waiting":
            answer["before"] = studio.place(name)
        if job.enhanced is not None and job.picture is not None:
            height, width = job.picture.pixels.shape[:2]
            deviation = job.enhanced.deviation
            answer |= {
                "width": width,
                "height": height,
                "samples": len(job.enhanced.samples),
                "note": job.picture.note,
            }
            answer |= {
                "deviation": None if deviation is None else round(float(deviation.mean()), 5)
            }
        return flask.jsonify(answer)

    def view_response(pixels: np.ndarray) -> flask.Response:
        return flask.Response(encode_view(pixels, False), mimetype="image/jpeg")

    def whole_response(data: bytes, name: str = "") -> flask.Response:
        stream = io.BytesIO(data)
        studio.unsent[stream] = len(data)
        # the server closes the stream when it is sent
        response = flask.send_file(stream, "image/png", conditional=False)
        if name:
            response.headers["Content-Disposition"] = f'attachment; filename="{name}.png"'
        return response

    @app.get("/jobs/<name>/<what>")
    def picture(name: str, what: str) -> flask.Response:
        given, found = finished(name)
        whole = flask.request.args.get("full") == "1"
        with studio.turn(whole):
            return drawn(given, found, what, whole)

    def drawn(given: Picture, found: ms.Enhanced, what: str, whole: bool) -> flask.Response:
        if what == "uncertainty" and found.deviation is not None:
            heat = heat_map(found.deviation)
            return whole_response(encode_view(heat, True)) if whole else view_response(heat)
        if what == "low":
            pixels = given.pixels
            shallow = pixels if pixels.dtype == np.uint8 else (pixels >> 8).astype(np.uint8)
            return view_response(shallow)
        choices = {
            "enhanced": found.best,
            **{f"sample{n}": s for n, s in enumerate(found.samples, 1)},
        }
        if what not in choices:
            return say(404, "no such picture")
        deep = whole and given.pixels.dtype == np.uint16
        pixels = level_table(number("exposure", 0, -6, 6), deep)[choices[what]]
        if whole:
            return whole_response(encode_picture(pixels, ".png", given), what)
        return view_response(pixels)

    @app.errorhandler(413)
    def too_large(_: Exception) -> flask.Response:
        return say(413, f"the file is larger than {megabytes:g} MB, the limit of this page")

    @app.errorhandler(TooBusy)
    def busy(error: TooBusy) -> flask.Response:
        response = say(503, str(error))
        response.headers["Retry-After"] = "5"
        return response

    @app.errorhandler(404)
    @app.errorhandler(405)
    @app.errorhandler(400)
    def wrong(error: Any) -> flask.Response:
        return error.response or say(error.code, error.name.lower())

    @app.after_request
    def guard(response: flask.Response) -> flask.Response:
        response.headers.setdefault(
            "Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'"
        )
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["X-Frame-Options"] = "DENY"
        response.headers["Referrer-Policy"] = "no-referrer"
        response.headers["Cross-Origin-Resource-Policy"] = "same-origin"
        response.headers["Cross-Origin-Opener-Policy"] = "same-origin"
        response.headers["Cache-Control"] = "no-store"
        return response

    return app


def encode_view(pixels: np.ndarray, whole: bool) -> bytes:
    """uint8 pixels for the page: a JPEG of at most 2048 pixels a side, or a PNG of the whole."""
    encoded, image = io.BytesIO(), Image.fromarray(pixels)
    if whole:
        image.save(encoded, "PNG")
    else:
        image.thumbnail((2048, 2048))
        image.save(encoded, "JPEG", quality=92)
    return encoded.getvalue()


def find_checkpoints(given: Sequence[str]) -> list[Path]:
    """Those given, or every *.pth under checkpoints/ that holds a model, the released weights and
    best_model.pth first. Raises UserError for none."""
    if given:
        for name in given:
            load_checkpoint(name)
        return [Path(name) for name in given]
    first = [ROOT / "checkpoints" / ms.RELEASED.name, ROOT / "checkpoints" / "best_model.pth"]
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


def listen(studio: Studio, arguments: argparse.Namespace, serve: Callable[..., None]) -> None:
    """Serve the page until Ctrl-C. Raises UserError where that cannot be done at the address asked
    for."""
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
    print(f"open http://{host}:{port}/ in a browser; Ctrl-C ends", flush=True)
    try:
        serve(app, host=host, port=port, threads=8, ident=None, **limits)
    # waitress's word for a host that has no address; the numbers are checked before
    except ValueError as error:
        raise UserError(
            f"--host {host}: no such address; name one of this machine, such as 127.0.0.1"
        ) from error
    except OSError as error:
        option = f"--host {host}" if error.errno == errno.EADDRNOTAVAIL else f"--port {port}"
        raise UserError(f"{option}: cannot listen ({error.strerror}); choose another") from error


def main(argv: Sequence[str] | None = None, serve: Callable[..., None] = waitress.serve) -> int:
    """Serve the page until Ctrl-C; returns the exit status."""
    most = KEEP_BYTES / 2**20  # megabytes; the queue takes no more
    parser = OneLineParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add, many = parser.add_argument, functools.partial(parser.add_argument, action="append")
    many("--checkpoint", metavar="FILE", default=[], help="weights to offer; repeatable")
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
        try:
            studio.load(next(iter(studio.models)))
            listen(studio, arguments, serve)
        finally:
            studio.close()
        return 0

    return run(work)


if __name__ == "__main__":
    sys.exit(main())
