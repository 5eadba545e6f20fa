"""What the page works with: uploads on their way, the models, and the one worker that uses them.

An upload lives in memory alone: it is decoded, enhanced in its turn and forgotten when it was not
looked at for KEEP_SECONDS or when newer results need its share of KEEP_BYTES.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import itertools
import queue
import secrets
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from repository import ROOT, load_any

import model_script as ms
from support.commands import SHIPPED
from support.decoding import Picture, opened, read_picture
from support.pictures import reduce_levels
from support.settings import UserError

KEEP_BYTES, KEEP_SECONDS, LONGEST_QUEUE = 2**29, 900, 32
# of the eight threads, so many make full-size pictures or wait to: one for each model, side by side
WHOLE_TOGETHER = 2
FAST = SHIPPED / "fast.pth"  # what drafts are made with
# the longest side of a draft; of fewer pixels the result itself is soon there
DRAFT_SIDE, DRAFT_FROM = 800, 150_000
ALTERNATIVES = 4  # the most that one upload may ask for
PENDING, OVER = ("waiting", "working"), ("done", "failed", "cancelled")
EXAMPLE = "example"  # no secret's length: no upload has this name


class TooBusy(Exception):
    """There is no room at the moment; its text is the answer."""


class Cancelled(Exception):
    """Its owner wants this picture no longer."""


@dataclasses.dataclass
class Job:
    """An upload on its way: what was asked, then either what came of it or why nothing did."""

    data: bytes
    model: str
    samples: int
    uncertainty: bool
    name: str = "picture.png"  # what its owner calls it; for the owner's download alone
    used: float = dataclasses.field(default_factory=time.monotonic)
    state: str = "waiting"  # then working, and at last done, failed or cancelled
    message: str = ""
    seconds: float = 0.0
    tiles: tuple[int, int] = (0, 0)  # done, of so many
    cancelled: bool = False
    format: str = "PNG"  # of the upload
    quality: int = 95  # of a JPEG or WebP
    picture: Picture | None = None
    draft: tuple[np.ndarray, np.ndarray] | None = None  # while at work: input and answer, reduced
    enhanced: ms.Enhanced | None = None
    reduced: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # for small views
    calm: dict[str, tuple[float, np.ndarray]] = dataclasses.field(
        default_factory=dict
    )  # by denoise
    known: bool | None = None  # whether it looks like what the weights were trained on

    @property
    def size(self) -> int:
        """Bytes it holds."""
        # each is read once: other threads change them meanwhile
        picture, enhanced, calm = self.picture, self.enhanced, list(self.calm.values())
        arrays = [picture.pixels, picture.alpha] if picture else []
        arrays += [enhanced.best, *enhanced.samples, enhanced.deviation] if enhanced else []
        arrays += [*(self.draft or ()), *self.reduced.values()]
        arrays += [levels for _, levels in calm]
        return len(self.data) + sum(array.nbytes for array in arrays if array is not None)

    def progress(self, done: int, total: int) -> None:
        """What the enhancement calls after each tile. Raises Cancelled."""
        self.tiles = (done, total)
        if self.cancelled:
            raise Cancelled


class Studio:
    """The models, and the one worker that uses them."""

    def __init__(
        self, checkpoints: Sequence[Path], settings: dict[str, Any], megapixels: float
    ) -> None:
        self.models = {self._label(path): path for path in checkpoints}
        self.settings, self.megapixels = settings, megapixels
        self.jobs: dict[str, Job] = {}
        self.example: Job | None = None
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

    @functools.cached_property
    def fast(self) -> ms.Loaded:
        """The weights that drafts are made with. Raises UserError where they are not there."""
        return load_any(str(FAST), self.settings)._replace(checkpoint={})

    def submit(
        self, data: bytes, model: str, samples: int, uncertainty: bool, called: str = ""
    ) -> str:
        """The new job's name. Raises UserError for what can be seen to be no fit picture, TooBusy
        when too many wait."""
        with opened(io.BytesIO(data)) as picture:
            (width, height), kind = picture.size, str(picture.format)
        if width * height > self.megapixels * 1e6:
            raise UserError(
                f"the picture has {width * height / 1e6:.1f} megapixels; this page takes"
                f" {self.megapixels:g}; make it smaller"
            )
        with self.lock:
            waiting = [job for job in self.jobs.values() if job.state in PENDING]
            if (
                len(waiting) >= LONGEST_QUEUE
                or sum(job.size for job in waiting) + len(data) > KEEP_BYTES
            ):
                raise TooBusy("too many pictures are waiting; try again in a moment")
            name = secrets.token_urlsafe(16)
            job = Job(data, model, samples, uncertainty, called or "picture.png", format=kind)
            self.jobs[name] = job
        self.todo.put(name)
        return name

    def show_example(self, data: bytes) -> Job:
        """The one job that belongs to nobody and is kept: the empty page's picture, made once."""
        with self.lock:
            if self.example is None:
                self.example = Job(data, next(iter(self.models)), 0, False)
                self.todo.put(EXAMPLE)
            return self.example

    def cancel(self, job: Job) -> None:
        """Give it up: at once where it waits, after the current tile where it is worked at."""
        with self.lock:
            job.cancelled = True
            if job.state == "waiting":
                job.state, job.data = "cancelled", b""

    def place(self, name: str) -> int:
        """How many jobs are before this one."""
        with self.lock:
            before = itertools.takewhile(lambda other: other != name, self.jobs)
            return sum(self.jobs[other].state in PENDING for other in before)

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
            finished = [name for name, job in self.jobs.items() if job.state in OVER]
            held, now = 0, time.monotonic()
            for age, name in enumerate(reversed(finished)):
                held += self.jobs[name].size
                if (held > KEEP_BYTES and age) or now - self.jobs[name].used > KEEP_SECONDS:
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
            job = self.example if name == EXAMPLE else self.jobs.get(name)
            if job is not None and self._begin(job):
                self._finish(job)
            self.forget()

    def _begin(self, job: Job) -> bool:
        """Whether it is still wanted; then it is being worked at."""
        with self.lock:
            if job.cancelled:
                return False
            job.state = "working"
            return True

    def _finish(self, job: Job) -> None:
        """Work at it; whatever a picture does to a library, the page must answer."""
        try:
            self._do(job)
            state = "done"
        except Cancelled:
            job.picture, state = None, "cancelled"
        except UserError as error:
            job.message, state = str(error), "failed"
        except Exception as error:
            kind = type(error).__name__
            job.message, state = f"this picture cannot be enhanced ({kind}); try another", "failed"
        job.data, job.used, job.state = b"", time.monotonic(), state
        job.draft = None  # at last: until the state tells of an end, the page shows it

    def _do(self, job: Job) -> None:
        started = time.perf_counter()
        job.picture = read_picture(io.BytesIO(job.data))
        with contextlib.suppress(Exception):  # the result does not depend on it
            job.draft = self._draft(job.model, job.picture.pixels)
        job.progress(0, 0)  # whether it is still wanted
        loaded = self.load(job.model)
        model, _ = loaded.choose(job.picture.pixels)
        # the page's slider denoises what is shown
        wanted = dataclasses.replace(
            loaded.use, samples=job.samples, uncertainty=job.uncertainty, denoise=0.0
        )
        job.known = loaded.knows(job.picture.pixels)
        pixels, runtime, job.quality = job.picture.pixels, loaded.runtime, wanted.quality
        job.enhanced = ms.enhance_pixels(model, pixels, wanted, runtime, progress=job.progress)
        job.seconds = time.perf_counter() - started

    def _draft(self, model: str, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """(the pixels reduced, the fast weights' answer to them); None where `model` is not the
        released weights, whose copy these are, or where it is quick itself."""
        if self.models[model].resolve() != ms.RELEASED or pixels[..., 0].size < DRAFT_FROM:
            return None
        low, fast = reduce_levels(pixels, DRAFT_SIDE), self.fast
        use, (network, _) = dataclasses.replace(fast.use, denoise=0.0), fast.choose(low)
        return low, ms.enhance_pixels(network, low, use, fast.runtime).best
