"""The page's server: what it answers, what it refuses, and that no upload is left behind."""

from __future__ import annotations

import dataclasses
import http.client
import io
import json
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cli_tools import assert_one_line_error, dark_picture, target_picture
from conftest import randomise
from PIL import Image

import model_script as ms
from support.checkpoints import save_checkpoint
from support.decoding import ORIENTATION, Picture, read_picture
from support.pictures import blend, encode_png16, level_table, reduce_levels

pytest.importorskip("flask", reason="the optional package flask is not installed")
pytest.importorskip("waitress", reason="the optional package waitress is not installed")

import studio as rooms
import web_app
import web_page
import web_results


def write_checkpoint(path: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    config = ms.Config(flow_channels=8, num_flow_blocks=1, thumbnail_size=32)
    model = randomise(ms.ConditionalFlow(config), 0.05, seed)
    save_checkpoint(
        path,
        {
            "config": dataclasses.asdict(config),
            "model": model.state_dict(),
            "run_id": "r",
            "epoch": 1,
        },
    )
    return path


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[rooms.Studio]:
    folder = tmp_path_factory.mktemp("weights")
    paths = [write_checkpoint(folder / f"{seed}.pth", seed) for seed in (1, 2)]
    opened = rooms.Studio(paths, {"device": "cpu"}, megapixels=1)
    yield opened
    opened.close()


@pytest.fixture
def client(studio: rooms.Studio) -> Any:
    return web_page.make_app(studio, megabytes=2).test_client()


def encoded(pixels: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


LOW = dark_picture(target_picture(2))


def upload(client: Any, data: bytes, name: str = "x.png", **fields: str) -> Any:
    return client.post(
        "/jobs",
        data={"picture": (io.BytesIO(data), name), **fields},
        content_type="multipart/form-data",
    )


def wait(client: Any, answer: Any) -> tuple[str, dict[str, Any]]:
    assert answer.status_code == 202, answer.get_data(as_text=True)
    job = answer.get_json()["job"]
    ends = time.monotonic() + 60
    while time.monotonic() < ends:
        info = client.get(f"/jobs/{job}").get_json()
        if info["state"] in ("done", "failed"):
            return job, info
        time.sleep(0.01)
    raise AssertionError("no answer")


def pixels_of(answer: Any) -> np.ndarray:
    assert answer.status_code == 200
    return np.asarray(Image.open(io.BytesIO(answer.data)))


def test_an_upload_is_what_the_command_line_gives(client: Any, studio: rooms.Studio) -> None:
    job, info = wait(client, upload(client, encoded(LOW), samples="2", uncertainty="1"))
    assert info["state"] == "done" and (info["width"], info["height"], info["samples"]) == (
        48,
        40,
        2,
    )
    assert info["deviation"] > 0
    loaded = studio.load(next(iter(studio.models)))
    expected = ms.enhance_pixels(loaded.model, LOW, loaded.use, loaded.runtime).best
    full = pixels_of(client.get(f"/jobs/{job}/enhanced?full=1"))
    assert np.abs(full - expected / 257).max() <= 0.51
    # a JPEG of the same: noise is lost, colour is not
    view = pixels_of(client.get(f"/jobs/{job}/enhanced")).astype(float)
    assert np.abs((view - full).mean((0, 1))).max() < 2 and np.abs(view - full).mean() < 10
    assert np.abs(pixels_of(client.get(f"/jobs/{job}/low")).astype(float) - LOW).mean() < 4
    samples = [pixels_of(client.get(f"/jobs/{job}/sample{n}?full=1")) for n in (1, 2)]
    assert (samples[0] != samples[1]).any()
    assert pixels_of(client.get(f"/jobs/{job}/uncertainty")).shape == (40, 48, 3)
    assert client.get(f"/jobs/{job}/sample3").status_code == 404


def test_exposure_is_applied_without_another_run(client: Any) -> None:
    job, _ = wait(client, upload(client, encoded(LOW)))
    means = [
        pixels_of(client.get(f"/jobs/{job}/enhanced?full=1&exposure={stops}")).mean()
        for stops in (-1, 0, 1)
    ]
    assert means == sorted(set(means))
    for wrong in ("nan", "much", "7"):
        assert client.get(f"/jobs/{job}/enhanced?exposure={wrong}").status_code == 400


def test_two_models_give_two_results(client: Any, studio: rooms.Studio) -> None:
    found = []
    for model in studio.models:
        job, _ = wait(client, upload(client, encoded(LOW), model=model))
        found.append(pixels_of(client.get(f"/jobs/{job}/enhanced?full=1")))
    assert (found[0] != found[1]).any()
    assert upload(client, encoded(LOW), model="../../secret").status_code == 400


def test_16_bits_and_orientation_survive(client: Any) -> None:
    deep = np.random.default_rng(0).integers(0, 9000, (20, 30, 3)).astype(np.uint16)
    job, _ = wait(client, upload(client, encode_png16(deep, Picture(deep))))
    answer = client.get(f"/jobs/{job}/enhanced?full=1")
    assert read_picture(io.BytesIO(answer.data)).pixels.dtype == np.uint16
    assert "filename=x_enhanced.png" in answer.headers["Content-Disposition"]
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    _, info = wait(client, upload(client, encoded(LOW, "JPEG", exif=exif)))
    assert (info["width"], info["height"]) == (40, 48)


@pytest.mark.parametrize(
    "kind", ["text", "empty", "truncated", "large", "megapixels", "small", "none", "samples"]
)
def test_bad_uploads_get_one_clear_line(client: Any, kind: str) -> None:
    data, words, fields = {
        "text": (b"this is no picture", "not a readable picture", {}),
        "empty": (b"", "empty", {}),
        "truncated": (encoded(LOW)[:700], "truncated", {}),
        "large": (b"x" * (2**21 + 1), "2 MB", {}),
        "megapixels": (encoded(np.zeros((1001, 1000, 3), np.uint8)), "megapixels", {}),
        "small": (encoded(np.zeros((15, 40, 3), np.uint8)), "too small", {}),
        "none": (None, "choose a picture", {}),
        "samples": (encoded(LOW), "samples", {"samples": "99"}),
    }[kind]
    answer = client.post("/jobs", data=fields) if data is None else upload(client, data, **fields)
    if answer.status_code == 202:
        job, info = wait(client, answer)
        assert (
            info["state"] == "failed" and words in info["message"] and "\n" not in info["message"]
        )
        assert client.get(f"/jobs/{job}/enhanced").status_code == 409
    else:
        assert answer.status_code == (413 if kind == "large" else 400)
        assert words in answer.get_json()["error"]


@pytest.mark.parametrize(
    "name", ["../../evil.png", "/etc/passwd", "C:\\a.png", "a\x00b.png", "\N{SNOWMAN}" * 300]
)
def test_upload_names_never_touch_the_file_system(
    client: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """And nothing of a large upload goes through a temporary file either."""

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("a file was made")

    for maker in ("TemporaryFile", "NamedTemporaryFile", "SpooledTemporaryFile", "mkstemp"):
        monkeypatch.setattr(tempfile, maker, refuse)
    noise = np.random.default_rng(0).integers(0, 60, (500, 500, 3)).astype(np.uint8)
    data = encoded(noise)
    assert len(data) > 500_000  # werkzeug's own threshold
    assert wait(client, upload(client, data, name))[1]["state"] == "done"


@pytest.mark.parametrize(
    ("given", "format_", "name"),
    [
        ("night.png", "PNG", "night_enhanced.png"),
        ("Straße 1.JPG", "JPEG", "Straße 1_enhanced.JPG"),
        ("a.png", "JPEG", "a_enhanced.jpg"),  # the content decides
        ("scan.tiff", "TIFF", "scan_enhanced.tiff"),
        ("x.webp", "WEBP", "x_enhanced.webp"),
        ("x.bmp", "BMP", "x_enhanced.bmp"),
        ("../../etc/evil.png", "PNG", "evil_enhanced.png"),
        ("C:\\\\a\\\\b.png", "PNG", "b_enhanced.png"),
        ('a"b<c>\r\nX: y.png', "PNG", "abcX y_enhanced.png"),
        ("gnp.\u202eexe.png", "PNG", "gnp.exe_enhanced.png"),
        ("\N{SNOWMAN}" * 300 + ".png", "PNG", "\N{SNOWMAN}" * 80 + "_enhanced.png"),
        (" .. ", "PNG", "picture_enhanced.png"),
    ],
)
def test_a_name_goes_back_to_its_owner_clean(given: str, format_: str, name: str) -> None:
    called = web_results.clean_name(given) or "picture.png"
    job = rooms.Job(b"", "", 0, False, called, format=format_)
    assert web_results.file_name(job, "enhanced") == name


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "TIFF", "WEBP"])
def test_a_download_has_the_uploads_format_and_metadata(client: Any, kind: str) -> None:
    exif = Image.Exif()
    exif[0x010F] = "A camera"
    options: dict[str, Any] = {} if kind == "BMP" else {"exif": exif}
    job, info = wait(client, upload(client, encoded(LOW, kind, **options), "shot"))
    answer = client.get(f"/jobs/{job}/enhanced?full=1")
    with Image.open(io.BytesIO(answer.data)) as picture:
        assert picture.format == kind and answer.mimetype == f"image/{kind.lower()}"
        assert kind == "BMP" or picture.getexif()[0x010F] == "A camera"
    said = answer.headers["Content-Disposition"]
    assert said.endswith(info["files"]["enhanced"]) and "shot_enhanced" in said


def test_sliders_are_the_command_lines_arithmetic(client: Any, studio: rooms.Studio) -> None:
    job, _ = wait(client, upload(client, encoded(LOW)))
    loaded = studio.load(next(iter(studio.models)))
    levels = ms.enhance_pixels(loaded.model, LOW, loaded.use, loaded.runtime).best
    expected = blend(LOW, level_table(0.7, False)[levels], 0.4)
    full = pixels_of(client.get(f"/jobs/{job}/enhanced?full=1&exposure=0.7&strength=0.4"))
    assert (full == expected).all()
    assert client.get(f"/jobs/{job}/enhanced?strength=1.1").status_code == 400
    start = {one["key"]: one["start"] for one in web_results.sliders({"strength": 0.5})}
    assert start == {"exposure": 0.0, "strength": 0.5, "denoise": 0.0}
    far = web_results.sliders({"exposure": 3.0})[0]
    assert (far["low"], far["high"], far["start"]) == (-2, 3.0, 3.0)


def test_denoise_is_the_command_lines_and_what_was_asked_last_is_kept(
    client: Any, studio: rooms.Studio
) -> None:
    job, _ = wait(client, upload(client, encoded(LOW)))
    loaded = studio.load(next(iter(studio.models)))
    for denoise in (1.0, 0.4):
        use = dataclasses.replace(loaded.use, denoise=denoise)
        levels = ms.enhance_pixels(loaded.model, LOW, use, loaded.runtime).best
        expected = level_table(0.0, False)[levels]
        for how in ("full=1", "lossless=1"):
            found = pixels_of(client.get(f"/jobs/{job}/enhanced?{how}&denoise={denoise}"))
            assert (found == expected).all()
    assert [kept for kept, _ in studio.jobs[job].calm.values()] == [0.4]
    plain = pixels_of(client.get(f"/jobs/{job}/enhanced?full=1"))
    assert (plain != expected).any()


@pytest.mark.parametrize("known", [True, False, None])
def test_a_picture_of_no_known_camera_has_a_note(
    known: bool | None, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ms.Loaded, "knows", lambda *_: known)
    _, info = wait(client, upload(client, encoded(LOW)))
    said = ["looks like no camera that these weights were trained on; its colours may be wrong"]
    assert info["notes"] == (said if known is False else [])


def test_views_are_reduced_and_full_views_are_not(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web_results, "LARGEST_VIEW", 24)
    job, _ = wait(client, upload(client, encoded(LOW)))  # 48 x 40
    for path, width in (("", 24), ("side=16&", 12), ("size=full&", 48), ("lossless=1&", 24)):
        shown = pixels_of(client.get(f"/jobs/{job}/enhanced?{path}"))
        assert shown.shape[1] == width, path
        assert pixels_of(client.get(f"/jobs/{job}/low?{path}")).shape == shown.shape
    for side in ("15", "25", "many"):
        assert client.get(f"/jobs/{job}/enhanced?side={side}").status_code == 400


def test_the_empty_pages_example(client: Any) -> None:
    ends = time.monotonic() + 60
    while client.get("/jobs/example").get_json()["state"] != "done":
        assert time.monotonic() < ends
        time.sleep(0.02)
    before, after = (
        pixels_of(client.get(f"/jobs/example/{what}")).astype(float) for what in ("low", "enhanced")
    )
    assert before.shape == after.shape and np.abs(after - before).mean() > 3
    assert client.post("/jobs/example/cancel").status_code == 404


def test_a_zip_holds_each_picture_with_its_own_values(client: Any) -> None:
    jobs = [wait(client, upload(client, encoded(LOW), "a.png"))[0] for _ in range(3)]
    entries = [f"{jobs[0]},enhanced,0,1", f"{jobs[1]},enhanced,1,0.5", f"{jobs[2]},enhanced"]
    answer = client.get("/zip", query_string={"job": entries})
    assert answer.status_code == 200 and answer.mimetype == "application/zip"
    with zipfile.ZipFile(io.BytesIO(answer.data)) as archive:
        names = ["a_enhanced.png", "a_enhanced_2.png", "a_enhanced_3.png"]
        assert archive.namelist() == names and archive.testzip() is None
        single = client.get(f"/jobs/{jobs[1]}/enhanced?full=1&exposure=1&strength=0.5").data
        assert archive.read(names[1]) == single
        assert archive.read(names[0]) == archive.read(names[2]) != single


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("get", "/jobs/nothing", 404),
        ("get", "/jobs/nothing/enhanced", 404),
        ("get", "/samples/../../README.md", 404),
        ("get", "/samples/chelsea", 404),
        ("get", "/../model_script.py", 404),
        ("get", "/static/x", 404),
        ("post", "/", 405),
        ("delete", "/jobs", 405),
        ("put", "/jobs", 405),
    ],
)
def test_wrong_addresses_and_methods(client: Any, method: str, path: str, status: int) -> None:
    answer = getattr(client, method)(path)
    assert answer.status_code == status and answer.get_json()["error"]


def test_another_site_cannot_upload(client: Any) -> None:
    data = {"picture": (io.BytesIO(encoded(LOW)), "x.png")}
    assert (
        client.post("/jobs", data=data, headers={"Origin": "http://evil.example"}).status_code
        == 403
    )
    data = {"picture": (io.BytesIO(encoded(LOW)), "x.png")}
    assert (
        client.post("/jobs", data=data, headers={"Origin": "http://localhost"}).status_code == 202
    )


def test_the_page_loads_nothing_from_elsewhere_and_is_guarded(
    client: Any, studio: rooms.Studio
) -> None:
    answer = client.get("/")
    page = answer.get_data(as_text=True)
    assert (
        answer.status_code == 200
        and "http://" not in page
        and "https://" not in page
        and "//cdn" not in page
    )
    policy = answer.headers["Content-Security-Policy"]
    nonce = policy.split("script-src 'nonce-")[1].split("'")[0]
    assert page.count(f'nonce="{nonce}"') == 2 and "unsafe" not in policy
    assert nonce not in client.get("/").headers["Content-Security-Policy"]
    for label in studio.models:
        assert label in page
    for path in ("/", "/jobs/none", "/samples/rocket"):
        headers = client.get(path).headers
        assert (
            headers["X-Content-Type-Options"] == "nosniff" and headers["X-Frame-Options"] == "DENY"
        )
        assert (
            headers["Referrer-Policy"] == "no-referrer" and headers["Cache-Control"] == "no-store"
        )


def test_samples_are_dark_photographs(client: Any) -> None:
    for name in web_results.SAMPLES:
        assert 2 < pixels_of(client.get(f"/samples/{name}")).mean() < 60


class Slow:
    """Stands in for the worker's work, and lets one job through at a time."""

    def __init__(self) -> None:
        self.gate = threading.Semaphore(0)

    def __call__(self, job: rooms.Job) -> None:
        self.gate.acquire(timeout=30)
        job.picture = Picture(LOW)
        job.enhanced = ms.Enhanced(np.zeros((40, 48, 3), np.uint16), [], None)


@pytest.fixture
def slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Any, Slow, rooms.Studio]]:
    work = Slow()
    studio = rooms.Studio(
        [write_checkpoint(tmp_path / "w.pth", 3)], {"device": "cpu"}, megapixels=1
    )
    monkeypatch.setattr(studio, "_do", work)
    yield web_page.make_app(studio, megabytes=2).test_client(), work, studio
    work.gate.release(1000)
    studio.close()


def test_the_queue_shows_its_place_and_refuses_when_full(
    slow: tuple[Any, Slow, rooms.Studio],
) -> None:
    client, work, _ = slow
    jobs = [upload(client, encoded(LOW)).get_json()["job"] for _ in range(rooms.LONGEST_QUEUE)]
    full = upload(client, encoded(LOW))
    assert full.status_code == 503 and "try again" in full.get_json()["error"]
    assert int(full.headers["Retry-After"]) > 0
    assert client.get(f"/jobs/{jobs[5]}").get_json()["before"] == 5
    work.gate.release()
    ends = time.monotonic() + 10
    while client.get(f"/jobs/{jobs[5]}").get_json()["before"] != 4:
        assert time.monotonic() < ends
        time.sleep(0.01)


def test_what_waits_is_cancelled_at_once(slow: tuple[Any, Slow, rooms.Studio]) -> None:
    client, work, studio = slow
    jobs = [upload(client, encoded(LOW)).get_json()["job"] for _ in range(3)]
    assert client.post(f"/jobs/{jobs[1]}/cancel").get_json() == {"state": "cancelled"}
    assert studio.jobs[jobs[1]].data == b""
    assert client.get(f"/jobs/{jobs[2]}").get_json()["before"] == 1
    work.gate.release(9)
    ends = time.monotonic() + 20
    while client.get(f"/jobs/{jobs[2]}").get_json()["state"] != "done":
        assert time.monotonic() < ends
        time.sleep(0.01)
    assert [studio.jobs[name].state for name in jobs] == ["done", "cancelled", "done"]
    assert client.get(f"/jobs/{jobs[1]}/enhanced").status_code == 409


def test_old_results_are_forgotten(
    slow: tuple[Any, Slow, rooms.Studio], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, work, studio = slow
    size = LOW.nbytes + 40 * 48 * 3 * 2  # a result and its input
    monkeypatch.setattr(rooms, "KEEP_BYTES", 3 * size + 100)
    names = []
    for _ in range(6):
        work.gate.release()
        names.append(wait(client, upload(client, encoded(LOW)))[0])
    time.sleep(0.1)
    assert [client.get(f"/jobs/{name}").status_code for name in names] == [404] * 3 + [200] * 3
    assert all(job.data == b"" for job in studio.jobs.values())
    monkeypatch.setattr(rooms, "KEEP_SECONDS", -1)
    studio.forget()
    assert studio.jobs == {}


def test_waiting_uploads_are_bounded_by_their_bytes(
    slow: tuple[Any, Slow, rooms.Studio], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, _, studio = slow
    data = encoded(LOW)
    monkeypatch.setattr(rooms, "KEEP_BYTES", 2 * len(data) + 100)
    assert [upload(client, data).status_code for _ in range(4)] == [202, 202, 503, 503]
    assert len(studio.jobs) == 2


def test_closing_drops_what_waits(slow: tuple[Any, Slow, rooms.Studio]) -> None:
    client, work, studio = slow
    jobs = [upload(client, encoded(LOW)).get_json()["job"] for _ in range(5)]
    ends = time.monotonic() + 10
    while studio.jobs[jobs[0]].state != "working":
        assert time.monotonic() < ends
        time.sleep(0.01)
    closing = threading.Thread(target=studio.close, daemon=True)
    closing.start()
    time.sleep(0.2)
    assert closing.is_alive()  # what the worker has begun is finished
    work.gate.release()
    closing.join(10)
    assert not closing.is_alive()
    assert [studio.jobs[name].state for name in jobs] == ["done", *["waiting"] * 4]


def test_whole_pictures_leave_threads_for_everything_else(
    slow: tuple[Any, Slow, rooms.Studio], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While they are made, so many wait for them and no more; views and everything else are
    answered."""
    client, work, _ = slow
    work.gate.release()
    job, _ = wait(client, upload(client, encoded(LOW)))
    gate, encode = threading.Event(), web_results.encode_or_explain
    monkeypatch.setattr(
        web_results,
        "encode_or_explain",
        lambda *given: encode(*given) if gate.wait(30) else b"",
    )

    def whole() -> Any:
        return client.application.test_client().get(f"/jobs/{job}/enhanced?full=1")

    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(whole) for _ in range(6)]
        refused = [
            one.result()
            for one in islice(as_completed(asked, timeout=20), 6 - rooms.WHOLE_TOGETHER)
        ]
        meanwhile = [
            client.get(f"/jobs/{job}{path}").status_code for path in ("", "/enhanced", "/low")
        ]
        gate.set()
        statuses = sorted(one.result().status_code for one in asked)
    for answer in refused:
        assert answer.status_code == 503 and "try again" in answer.get_json()["error"]
        assert int(answer.headers["Retry-After"]) > 0
    assert meanwhile == [200] * 3
    assert statuses == [200] * rooms.WHOLE_TOGETHER + [503] * len(refused)
    assert whole().status_code == 200  # every place was given back


def test_a_crash_of_a_library_is_an_answer(
    slow: tuple[Any, Slow, rooms.Studio], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, _, studio = slow

    def crash(job: rooms.Job) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(studio, "_do", crash)
    info = wait(client, upload(client, encoded(LOW)))[1]
    assert info["state"] == "failed" and "cannot be enhanced" in info["message"]


def test_work_is_cancelled_after_a_tile_and_told_by_tiles(
    studio: rooms.Studio, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dict(studio.settings) | {"tile_size": 64}
    monkeypatch.setattr(studio, "settings", settings)
    studio.load.cache_clear()
    large = dark_picture(target_picture(1, 900, 1100))
    job = upload(client, encoded(large)).get_json()["job"]
    ends = time.monotonic() + 60
    while (tiles := client.get(f"/jobs/{job}").get_json()["tiles"])[0] < 1:
        assert time.monotonic() < ends
        time.sleep(0.01)
    assert tiles[1] > 20
    client.post(f"/jobs/{job}/cancel")
    while (info := client.get(f"/jobs/{job}").get_json())["state"] == "working":
        assert time.monotonic() < ends
        time.sleep(0.01)
    assert info["state"] == "cancelled" and info["tiles"][0] < info["tiles"][1]
    studio.load.cache_clear()


# drafts -------------------------------------------------------------------------------------------


class Held:
    """Stands in for the enhancement: drafts are made, and results when the gate is open."""

    def __init__(self) -> None:
        self.gate, self.sizes, self.enhance = threading.Event(), list[Any](), ms.enhance_pixels

    def __call__(self, model: Any, pixels: np.ndarray, *given: Any, **more: Any) -> ms.Enhanced:
        self.sizes.append(pixels.shape[:2])
        if "progress" in more:  # not of a draft
            assert self.gate.wait(60)
        return self.enhance(model, pixels, *given, **more)


@contextmanager
def drafting(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[rooms.Studio, Held]]:
    """A studio of released weights and others, where fast ones are there, too."""
    paths = [write_checkpoint(folder.resolve() / f"{seed}.pth", seed) for seed in (1, 2, 3)]
    held = Held()
    monkeypatch.setattr(ms, "RELEASED", paths[0])
    monkeypatch.setattr(rooms, "FAST", paths[2])
    monkeypatch.setattr(ms, "enhance_pixels", held)
    studio = rooms.Studio(paths[:2], {"device": "cpu"}, megapixels=1)
    try:
        yield studio, held
    finally:
        held.gate.set()
        studio.close()


@pytest.fixture
def drafts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Any, rooms.Studio, Held]]:
    monkeypatch.setattr(rooms, "DRAFT_SIDE", 24)
    monkeypatch.setattr(rooms, "DRAFT_FROM", LOW[..., 0].size)
    with drafting(tmp_path, monkeypatch) as (studio, held):
        yield web_page.make_app(studio, megabytes=2).test_client(), studio, held


def test_a_draft_comes_before_the_result_and_goes_with_it(
    drafts: tuple[Any, rooms.Studio, Held],
) -> None:
    client, studio, held = drafts
    answer = upload(client, encoded(LOW))
    job = studio.jobs[name := answer.get_json()["job"]]
    ends = time.monotonic() + 60
    while not (info := client.get(f"/jobs/{name}").get_json()).get("draft"):
        assert time.monotonic() < ends
        time.sleep(0.01)
    assert (info["state"], info["width"], info["height"]) == ("working", 48, 40)
    assert client.get(f"/jobs/{name}/enhanced").status_code == 409
    low, fast = reduce_levels(LOW, 24), studio.fast
    levels = held.enhance(fast.model, low, fast.use, fast.runtime).best
    assert low.shape == (20, 24, 3) and job.size == len(job.data) + sum(
        array.nbytes for array in (LOW, low, levels)
    )
    for values in ({}, {"exposure": 1.0, "strength": 0.5}, {"strength": 0.0}):
        shown = web_results.finished(low, levels, web_page.NEUTRAL | values, False)
        found = client.get(f"/jobs/{name}/draft", query_string=values)
        assert found.mimetype == "image/jpeg" and found.data == web_results.encode_view(shown)
    assert pixels_of(client.get(f"/jobs/{name}/draft?side=16&denoise=1")).shape[1] == 16
    assert client.get(f"/jobs/{name}/draft?exposure=much").status_code == 400
    held.gate.set()
    info = wait(client, answer)[1]
    assert info["state"] == "done" and not info["draft"] and held.sizes == [(20, 24), (40, 48)]
    assert client.get(f"/jobs/{name}/draft").status_code == 404 and job.draft is None
    assert pixels_of(client.get(f"/jobs/{name}/enhanced")).shape == LOW.shape


@pytest.mark.parametrize("why", ["other weights", "small", "no fast weights", "broken ones"])
def test_where_there_is_no_draft(why: str, drafts: tuple[Any, rooms.Studio, Held]) -> None:
    client, studio, held = drafts
    if why == "no fast weights":
        rooms.FAST.unlink()
    elif why == "broken ones":
        rooms.FAST.write_text("no weights")
    held.gate.set()
    data = encoded(LOW[:-1] if why == "small" else LOW)
    info = wait(client, upload(client, data, model=list(studio.models)[why == "other weights"]))[1]
    assert info["state"] == "done" and len(held.sizes) == 1


@pytest.mark.parametrize("broken", ["the network", "the reduction"])
def test_a_draft_that_fails_harms_nothing(
    broken: str, drafts: tuple[Any, rooms.Studio, Held], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, _, held = drafts

    def fail(*given: Any, **more: Any) -> Any:
        if "progress" in more:
            return held(*given, **more)
        raise MemoryError

    place, name = (ms, "enhance_pixels") if broken == "the network" else (rooms, "reduce_levels")
    monkeypatch.setattr(place, name, fail)
    held.gate.set()
    job, info = wait(client, upload(client, encoded(LOW)))
    assert info["state"] == "done" and held.sizes == [(40, 48)]
    assert pixels_of(client.get(f"/jobs/{job}/enhanced")).shape == LOW.shape


def test_what_is_cancelled_while_its_draft_is_made_ends_with_it(
    drafts: tuple[Any, rooms.Studio, Held], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, studio, held = drafts

    def cancel(*given: Any, **more: Any) -> ms.Enhanced:
        for job in studio.jobs.values():
            studio.cancel(job)
        return held(*given, **more)

    monkeypatch.setattr(ms, "enhance_pixels", cancel)
    job = studio.jobs[upload(client, encoded(LOW)).get_json()["job"]]
    ends = time.monotonic() + 60
    while job.state not in rooms.OVER or job.draft:
        assert time.monotonic() < ends
        time.sleep(0.01)
    assert job.state == "cancelled" and job.size == 0 and held.sizes == [(20, 24)]


# the command line ---------------------------------------------------------------------------------


def test_mistakes_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = str(write_checkpoint(tmp_path / "good.pth", 1))
    for arguments, words in (
        (["--checkpoint", str(tmp_path / "none.pth")], "none.pth"),
        (["--checkpoint", good, "--set", "tempreature=1"], "temperature"),
        *((["--port", port], "--port") for port in ("many", "80.5", "0", "65536", "99999")),
        *(
            (["--max-megabytes", size], "--max-megabytes")
            for size in ("nan", "inf", "0", "-1", "1e9", "much")
        ),
        *(
            (["--max-megapixels", size], "--max-megapixels")
            for size in ("nan", "inf", "0", "-1", "1e9", "much")
        ),
        (["--checkpoint", good, "--set", "flow_channels=16"], "flow_channels"),
        (["--checkpoint", good, "--set", "samples=2"], "samples"),
    ):
        assert_one_line_error(web_app.main(arguments), capsys.readouterr().err, words)
    monkeypatch.setattr(web_app, "ROOT", tmp_path)
    assert_one_line_error(web_app.main([]), capsys.readouterr().err, "no weights found")


@pytest.mark.parametrize("name", ["flask", "waitress"])
def test_a_missing_package_is_one_line(name: str) -> None:
    code = f"import sys; sys.modules[{name!r}] = None; import web_app"
    folder = Path(web_app.__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=60
    )
    assert_one_line_error(done.returncode, done.stderr, name, "pip install flask waitress")


def test_it_listens_to_this_machine_alone_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "checkpoints" / "old").mkdir(parents=True)
    write_checkpoint(tmp_path / "checkpoints" / "best_model.pth", 1)
    write_checkpoint(tmp_path / "checkpoints" / "released.pth", 3)
    write_checkpoint(tmp_path / "checkpoints" / "fast.pth", 4)
    write_checkpoint(tmp_path / "checkpoints" / "old" / "a.pth", 2)
    (tmp_path / "checkpoints" / "broken.pth").write_text("no weights")
    monkeypatch.setattr(web_app, "ROOT", tmp_path)
    seen: dict[str, Any] = {}

    def create(app: Any, **options: Any) -> Any:
        seen.update(options, app=app)
        return SimpleNamespace(run=lambda: None, close=lambda: None)

    assert web_app.main([], create) == 0
    assert seen["host"] == "127.0.0.1" and seen["inbuf_overflow"] >= 40 * 2**20
    # what slow readers of small answers can hold
    assert seen["outbuf_overflow"] * seen["connection_limit"] < 2**30
    page = seen["app"].test_client().get("/").get_data(as_text=True)
    names = ("released", "fast", "best_model", "old/a")
    order = [page.index(f"checkpoints/{name}.pth") for name in names]
    assert order == sorted(order) and "broken.pth" not in page


def test_a_taken_port_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        status = web_app.main(
            ["--checkpoint", str(write_checkpoint(tmp_path / "w.pth", 1)), "--port", port]
        )
    said = capsys.readouterr()
    assert_one_line_error(status, said.err, "--port", port)
    assert "http" not in said.out  # no address before it is known to work


# unknown, malformed, not this machine's
@pytest.mark.parametrize("host", ["no.such.host.invalid", "two..dots", "192.0.2.1"])
def test_a_wrong_host_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], host: str
) -> None:
    known = socket.getaddrinfo

    # a name server may take long to say no
    def look_up(name: str, *given: Any, **options: Any) -> Any:
        if name.endswith(".invalid"):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return known(name, *given, **options)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    status = web_app.main(
        ["--checkpoint", str(write_checkpoint(tmp_path / "w.pth", 1)), "--host", host]
    )
    assert_one_line_error(status, capsys.readouterr().err, f"--host {host}")


# the real server ----------------------------------------------------------------------------------


@contextmanager
def served(studio: rooms.Studio) -> Iterator[int]:
    """The port at which waitress serves the page, with as many threads as the command line gives
    it."""
    server = web_app.waitress.create_server(
        web_page.make_app(studio, megabytes=2), host="127.0.0.1", port=0, threads=8
    )
    threading.Thread(target=server.run, daemon=True).start()
    try:
        yield int(server.effective_port)
    finally:
        server.close()


def ask(port: int, path: str) -> tuple[int, bytes]:
    """(status, body) of a GET."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def ask_patiently(port: int, path: str) -> bytes:
    """The body for one who comes back while the page is busy."""
    ends = time.monotonic() + 60
    while (answer := ask(port, path))[0] == 503 and time.monotonic() < ends:
        time.sleep(0.05)
    assert answer[0] == 200, answer
    return answer[1]


def test_twenty_uploads_at_once_are_all_answered(studio: rooms.Studio) -> None:
    """Through waitress, as the command line serves it."""
    import urllib.request

    head = b'--line\r\nContent-Disposition: form-data; name="picture"; filename="p.png"\r\n\r\n'
    body = head + encoded(LOW) + b"\r\n--line--\r\n"

    def one(_: int) -> bytes:
        kind = {"Content-Type": "multipart/form-data; boundary=line"}
        with urllib.request.urlopen(
            urllib.request.Request(f"http://127.0.0.1:{port}/jobs", body, kind), timeout=60
        ) as answer:
            job = json.load(answer)["job"]
        ends = time.monotonic() + 60
        while (
            time.monotonic() < ends and json.loads(ask(port, f"/jobs/{job}")[1])["state"] != "done"
        ):
            time.sleep(0.05)
        return ask_patiently(port, f"/jobs/{job}/enhanced?full=1")

    with served(studio) as port, ThreadPoolExecutor(20) as pool:
        found = list(pool.map(one, range(20)))
    assert len(found) == 20 and len(set(found)) == 1


def test_slow_readers_hold_a_bounded_share(
    slow: tuple[Any, Slow, rooms.Studio], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole pictures that are on their way count until they are fetched or the line breaks."""
    # more than the system's buffers take
    noise = np.random.default_rng(0).integers(0, 65536, (1500, 1500, 3), np.uint16)
    studio, path = slow[2], "/jobs/noise/enhanced?full=1"
    result = {"picture": Picture(noise), "enhanced": ms.Enhanced(noise, [], None)}
    studio.jobs["noise"] = rooms.Job(b"", "", 0, False, state="done", **result)
    monkeypatch.setattr(rooms, "KEEP_BYTES", 10**7)
    with served(studio) as port:
        with socket.socket() as line:
            line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
            line.settimeout(60)
            line.connect(("127.0.0.1", port))
            line.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            assert line.recv(12).startswith(b"HTTP/1.1 200")
            assert ask(port, path)[0] == 503
            assert ask(port, "/jobs/noise")[0] == 200
        body = ask_patiently(port, path)
        assert (read_picture(io.BytesIO(body)).pixels == noise).all()
        assert ask_patiently(port, path) == body


def test_baselines_checkpoints_are_offered_too(tmp_path: Path) -> None:
    from baselines.retinexnet import RetinexConfig, RetinexNet

    torch.manual_seed(0)
    config = RetinexConfig(channels=4)
    content = {
        "config": dataclasses.asdict(config),
        "model": RetinexNet(config).state_dict(),
        "run_id": "r",
        "epoch": 1,
    }
    save_checkpoint(tmp_path / "r.pth", {**content, "system": "RetinexNet"})
    save_checkpoint(tmp_path / "x.pth", {**content, "system": "Unheard"})
    studio = rooms.Studio([tmp_path / "r.pth", tmp_path / "x.pth"], {"device": "cpu"}, megapixels=1)
    client = web_page.make_app(studio, megabytes=2).test_client()
    labels = list(studio.models)
    job, info = wait(client, upload(client, encoded(LOW), model=labels[0]))
    assert info["state"] == "done" and pixels_of(
        client.get(f"/jobs/{job}/enhanced?full=1")
    ).shape == (40, 48, 3)
    info = wait(client, upload(client, encoded(LOW), model=labels[1]))[1]
    assert info["state"] == "failed" and "Unheard" in info["message"]
    studio.close()
