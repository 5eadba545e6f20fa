"""The page's addresses: what each takes, answers and refuses."""

from __future__ import annotations

import io
import secrets
import time
from typing import Any

import flask
import web_results as results
from studio import ALTERNATIVES, LONGEST_QUEUE, Job, Studio, TooBusy

from support.settings import UserError


class InMemoryRequest(flask.Request):
    """Werkzeug would put an upload above 500 kB into a temporary file."""

    def _get_file_stream(self, *_: Any, **__: Any) -> io.BytesIO:
        return io.BytesIO()


def say(status: int, message: str) -> flask.Response:
    """An error: its one line, as JSON."""
    response = flask.jsonify(error=message)
    response.status_code = status
    return response


def number(text: Any, name: str, low: float, high: float) -> float:
    """What a request calls `name`; ends the request where it is no number in [low, high]."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not low <= value <= high:
        flask.abort(say(400, f"{name} must be a number in [{low:g}, {high:g}]"))
    return value


RANGES = results.ranges()
UNLIKE = "looks like no camera that these weights were trained on; its colours may be wrong"
# no slider at all: nothing is changed
NEUTRAL = {"exposure": 0.0, "strength": 1.0}


def slider_values(given: Any) -> dict[str, float]:
    """The sliders' values in a request's arguments; what is not named changes nothing."""
    return {
        key: number(given.get(key, NEUTRAL.get(key, 0.0)), key, *limits)
        for key, limits in RANGES.items()
    }


def longest_side(given: Any) -> int:
    """How many pixels a side a view may have, by a request's arguments."""
    most = results.LARGEST_VIEW
    return int(number(given.get("side", most), "side", 16, most))


def refuse_strangers() -> None:
    """Ends a request that another site's page sends."""
    origin = flask.request.headers.get("Origin")
    if origin and origin.split("://", 1)[-1] != flask.request.host:
        flask.abort(say(403, "uploads are taken from this page alone"))


def facts(job: Job, before: int) -> dict[str, Any]:
    """What the page is told of a job; `before` are those that come first."""
    drafted = job.draft is not None  # before the state, which where it is gone tells of an end
    found: dict[str, Any] = {"state": job.state, "message": job.message, "before": before}
    found |= {"seconds": round(job.seconds, 2), "tiles": job.tiles, "model": job.model}
    picture, enhanced = job.picture, job.enhanced
    if picture is not None:
        height, width = picture.pixels.shape[:2]
        found |= {"width": width, "height": height, "draft": drafted}
    if picture is not None and enhanced is not None:
        mean = None if enhanced.deviation is None else round(float(enhanced.deviation.mean()), 5)
        found |= {"samples": len(enhanced.samples)}
        found |= {"files": {what: results.file_name(job, what) for what in results.answers(job)}}
        strange = UNLIKE if job.known is False else ""
        found |= {"notes": [note for note in (picture.note, strange) if note], "deviation": mean}
    return found


def make_app(studio: Studio, megabytes: float) -> flask.Flask:
    """The page and its few addresses; `megabytes` limits an upload."""
    app = flask.Flask(__name__, static_folder=None)
    app.request_class = InMemoryRequest
    app.config["MAX_CONTENT_LENGTH"] = int(megabytes * 2**20)
    app.config["MAX_FORM_MEMORY_SIZE"] = app.config["MAX_CONTENT_LENGTH"]
    add_results(app, studio)
    add_guards(app, megabytes)

    @app.get("/")
    def page() -> flask.Response:
        nonce = secrets.token_urlsafe(16)
        shown = {"models": list(studio.models), "sliders": results.sliders(studio.settings)}
        shown |= {"megabytes": megabytes, "alternatives": ALTERNATIVES, "most": LONGEST_QUEUE}
        options = {"samples": results.SAMPLES, "nonce": nonce, "shown": shown}
        html = flask.render_template("page.html", **options)
        response = flask.Response(html, mimetype="text/html")
        response.headers["Content-Security-Policy"] = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src"
            " 'self' blob: data:; connect-src 'self'; form-action 'none'; base-uri 'none';"
            " frame-ancestors 'none'"
        )
        return response

    @app.get("/samples/<name>")
    def sample(name: str) -> flask.Response:
        if name not in results.SAMPLES:
            return say(404, "no such sample")
        return flask.Response(results.sample_picture(name), mimetype="image/png")

    @app.post("/jobs")
    def submit() -> flask.Response:
        refuse_strangers()
        upload, form = flask.request.files.get("picture"), flask.request.form
        if upload is None:
            return say(400, "choose a picture first")
        model = form.get("model", next(iter(studio.models)))
        if model not in studio.models:
            return say(400, "no such model; reload the page")
        samples = int(number(form.get("samples", 0), "samples", 0, ALTERNATIVES))
        called = results.clean_name(upload.filename or "")
        data, uncertain = upload.stream.read(), form.get("uncertainty") == "1"
        response = flask.jsonify(job=studio.submit(data, model, samples, uncertain, called))
        response.status_code = 202
        return response

    return app


def add_results(app: flask.Flask, studio: Studio) -> None:
    """The addresses of what becomes of uploads."""

    def find(name: str) -> Job:
        first = next(iter(results.SAMPLES))
        if name == "example":
            return studio.show_example(results.sample_picture(first))
        job = studio.jobs.get(name)
        if job is None:
            flask.abort(say(404, "this result is no longer kept; upload the picture again"))
        job.used = time.monotonic()
        return job

    def done(name: str) -> Job:
        job = find(name)
        if job.picture is None or job.enhanced is None:
            flask.abort(say(409, job.message or "not ready yet"))
        return job

    def send(data: bytes, kind: str, name: str) -> flask.Response:
        stream = io.BytesIO(data)
        studio.unsent[stream] = len(data)
        # the server closes the stream when it is sent
        return flask.send_file(stream, kind, bool(name), name or None, conditional=False)

    @app.get("/jobs/<name>")
    def status(name: str) -> flask.Response:
        job = find(name)
        return flask.jsonify(facts(job, studio.place(name) if job.state == "waiting" else 0))

    @app.post("/jobs/<name>/cancel")
    def cancel(name: str) -> flask.Response:
        refuse_strangers()
        if name not in studio.jobs:
            return say(404, "there is no such picture")
        job = find(name)
        studio.cancel(job)
        return flask.jsonify(state=job.state)

    @app.get("/jobs/<name>/draft")
    def draft(name: str) -> flask.Response:
        """What the fast weights make of the picture, while there is no result."""
        made, asked = find(name).draft, flask.request.args
        if made is None:
            return say(404, "there is no draft")
        values, side = slider_values(asked), longest_side(asked)
        with studio.turn(False):
            return image(results.encode_view(results.finished(*made, values, False), side=side))

    @app.get("/jobs/<name>/<what>")
    def picture(name: str, what: str) -> flask.Response:
        """A view of at most `side` pixels; `size=full`: of all of them; `full=1`: the file.
        `lossless=1`: a PNG, for the preview to compute with."""
        job, asked = done(name), flask.request.args
        values, side = slider_values(asked), longest_side(asked)
        assert job.picture is not None and job.enhanced is not None
        known = {"low", *results.answers(job)}
        known |= set() if job.enhanced.deviation is None else {"uncertainty"}
        if what not in known:
            return say(404, "no such picture")
        file, large = asked.get("full") == "1", asked.get("size") == "full"
        with studio.turn(file or large):
            if file and what != "low":
                return whole_file(job, what, values)
            if what == "uncertainty":
                return image(results.encode_view(results.heat(job), side=side))
            side = max(job.picture.pixels.shape) if large else side
            shown = results.view(job, what, values, side)
            if asked.get("lossless") == "1" and not large:
                return flask.Response(results.encode_view(shown, True), mimetype="image/png")
            encoded = results.encode_view(shown)
        return send(encoded, "image/jpeg", "") if large else image(encoded)

    def image(encoded: bytes) -> flask.Response:
        return flask.Response(encoded, mimetype="image/jpeg")

    def whole_file(job: Job, what: str, values: dict[str, float]) -> flask.Response:
        name = results.file_name(job, what)
        if what == "uncertainty":
            return send(results.encode_view(results.heat(job), True), "image/png", name)
        kind = f"image/{results.KINDS[job.format]}"
        return send(results.whole(job, what, values), kind, name)

    @app.get("/zip")
    def together() -> flask.Response:
        """One zip of `job=NAME,WHAT,VALUES...`, the values in the sliders' order, each repeated for
        every picture."""
        asked = flask.request.args.getlist("job")
        if not 0 < len(asked) <= LONGEST_QUEUE:
            return say(400, f"a zip holds 1 to {LONGEST_QUEUE} pictures; choose fewer")
        files = [one_of_zip(entry) for entry in asked]
        with studio.turn(True):
            return send(results.packed(files), "application/zip", "enhanced.zip")

    def one_of_zip(entry: str) -> Any:
        name, _, rest = entry.partition(",")
        what, *texts = rest.split(",")
        job, values = done(name), slider_values(dict(zip(RANGES, texts, strict=False)))
        if what not in results.answers(job):
            flask.abort(say(404, "no such picture"))
        return results.file_name(job, what), lambda: results.whole(job, what, values)


def add_guards(app: flask.Flask, megabytes: float) -> None:
    """What is said of errors, and the headers that every answer has."""

    @app.errorhandler(413)
    def too_large(_: Exception) -> flask.Response:
        return say(413, f"the file is larger than {megabytes:g} MB, the limit of this page")

    @app.errorhandler(UserError)
    def mistake(error: UserError) -> flask.Response:
        return say(400, str(error))

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
