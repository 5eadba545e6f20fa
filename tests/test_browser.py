"""The page in a real headless browser: Debian's Chromium, driven by Playwright.

Skipped where either is missing.
"""

from __future__ import annotations

import io
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_tools import dark_picture, environment, save_picture, target_picture
from conftest import ROOT
from PIL import Image

for package in ("flask", "waitress", "playwright"):
    pytest.importorskip(package, reason=f"the optional package {package} is not installed")
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium on this machine (Debian: apt-get install chromium)"
)

from test_web import write_checkpoint  # noqa: E402

QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A running tools/web_app.py with two models and a limit of 1 MB."""
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    models = [
        str(part)
        for seed in (1, 2)
        for part in ("--checkpoint", write_checkpoint(folder / f"{seed}.pth", seed))
    ]
    script = str(ROOT / "tools" / "web_app.py")
    command = [
        sys.executable,
        script,
        *models,
        "--port",
        str(port),
        "--max-megabytes",
        "1",
        "--set",
        "device=cpu",
    ]
    process = subprocess.Popen(
        command, cwd=folder, env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline().startswith("open http")
    ends = time.monotonic() + 30
    while socket.socket().connect_ex(("127.0.0.1", port)):
        assert time.monotonic() < ends
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}/"
    process.terminate()
    process.wait(10)
    # nothing of an upload is left
    assert {path.name for path in folder.iterdir()} == {"1.pth", "2.pth"}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=BROWSER, args=QUIET)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """The open page at desktop width; whatever it complains of on its console fails the test."""
    opened = browser.new_page(viewport={"width": 1280, "height": 900})
    complaints: list[str] = []
    opened.on(
        "console",
        lambda message: complaints.append(message.text) if message.type == "error" else None,
    )
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.goto(address)
    yield opened
    opened.close()
    assert [text for text in complaints if "status of 4" not in text] == []


@pytest.fixture
def low(tmp_path: Path) -> Path:
    return save_picture(tmp_path / "night.png", dark_picture(target_picture(2, 300, 400)))


def choose(page: Any, path: Path) -> None:
    page.set_input_files("#picked", str(path))


def says(page: Any, words: str) -> None:
    """Wait until the status line holds `words`."""
    from playwright.sync_api import expect

    expect(page.locator("#status")).to_contain_text(words, timeout=30_000)


def finished(page: Any, figures: int = 1) -> None:
    says(page, "done")
    assert page.locator("figure").count() == figures
    # not Playwright's own waiting for a function: the page's policy forbids eval
    ends = time.monotonic() + 30
    while not page.evaluate(
        "[...document.querySelectorAll('figure .after')].every((i) => i.complete && i.naturalWidth"
        " > 0)"
    ):
        assert time.monotonic() < ends
        time.sleep(0.05)


def screenshot(page: Any, name: str) -> None:
    """Kept where SCREENSHOTS names a folder, for a look at them."""
    if os.environ.get("SCREENSHOTS"):
        page.screenshot(path=str(Path(os.environ["SCREENSHOTS"]) / name), full_page=True)


def test_upload_and_slider(page: Any, low: Path) -> None:
    choose(page, low)
    finished(page)
    assert page.eval_on_selector(
        ".after", "image => [image.naturalWidth, image.naturalHeight]"
    ) == [400, 300]
    box = page.locator(".compare").bounding_box()
    clips = []
    for share in (0.2, 0.8):
        page.mouse.click(box["x"] + share * box["width"], box["y"] + box["height"] / 2)
        clips.append(page.eval_on_selector(".before", "image => image.style.clipPath"))
        bar = page.locator(".bar").bounding_box()
        assert bar["x"] == pytest.approx(box["x"] + share * box["width"], abs=12)
    assert clips[0] != clips[1]
    shown = np.asarray(
        Image.open(io.BytesIO(page.locator(".compare").screenshot())).convert("RGB")
    ).astype(float)
    left, right = shown[:, : int(shown.shape[1] * 0.7)], shown[:, int(shown.shape[1] * 0.85) :]
    assert abs(left.mean() - right.mean()) > 5  # input on one side, result on the other
    screenshot(page, "desktop.png")


def test_download_is_the_full_result(page: Any, low: Path) -> None:
    choose(page, low)
    finished(page)
    with page.expect_download() as download:
        page.click(".download")
    assert download.value.suggested_filename == "enhanced.png"
    with Image.open(download.value.path()) as picture:
        assert picture.size == (400, 300) and picture.format == "PNG"


def test_exposure_alternatives_and_uncertainty(page: Any, low: Path) -> None:
    page.select_option("#samples", "2")
    page.check("#uncertainty")
    choose(page, low)
    finished(page)
    assert page.locator(".which option").all_text_contents() == [
        "best",
        "alternative 1",
        "alternative 2",
    ]
    page.check(".heat-on")
    assert page.locator(".heat").is_visible()
    before = page.get_attribute(".after", "src")
    page.eval_on_selector(
        "#exposure",
        "range => { range.value = 1; range.dispatchEvent(new Event('input'));"
        " range.dispatchEvent(new Event('change')); }",
    )
    assert page.get_attribute(".after", "src") != before and "1 stops" in page.inner_text("#stops")
    page.select_option(".which", "sample2")
    assert "sample2" in page.get_attribute(".after", "src")


def test_two_models_side_by_side(page: Any, low: Path) -> None:
    page.select_option("#second", index=2)
    choose(page, low)
    finished(page, figures=2)
    boxes = [figure.bounding_box() for figure in page.locator("figure").all()]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] < boxes[1]["x"]


def test_a_sample_needs_no_file(page: Any) -> None:
    page.click("[data-sample=rocket]")
    finished(page)


def test_bad_and_large_files_get_one_clear_line(page: Any, low: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.png"
    text.write_text("this is no picture")
    choose(page, text)
    says(page, "not a readable picture")
    assert page.get_attribute("#status", "class") == "bad"
    large = tmp_path / "large.png"
    large.write_bytes(b"x" * (2**20 + 1))
    choose(page, large)
    says(page, "1 MB")
    choose(page, low)  # and the page still works
    finished(page)


def test_two_uploads_at_once(browser: Any, address: str, low: Path) -> None:
    pages = [browser.new_page() for _ in range(2)]
    for page in pages:
        page.goto(address)
    for page in pages:
        choose(page, low)
    for page in pages:
        finished(page)
        page.close()


def test_on_a_phone_nothing_sticks_out(browser: Any, address: str, low: Path) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    page.goto(address)
    choose(page, low)
    finished(page)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    box = page.locator(".compare").bounding_box()
    assert box["width"] > 330
    page.touchscreen.tap(box["x"] + 0.25 * box["width"], box["y"] + 0.5 * box["height"])
    assert 5 < float(page.eval_on_selector(".compare input", "range => range.value")) < 45
    screenshot(page, "phone.png")
    page.close()
