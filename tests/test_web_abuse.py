"""The page's real server under load and abuse.

Every answer is intended, nobody gets another's picture, memory is bounded.
"""

from __future__ import annotations

import dataclasses
import functools
import http.client
import io
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_tools import environment, target_picture
from conftest import ROOT, randomise
from odd_pictures import bad_pictures, cut_pictures, encoded
from PIL import Image

import model_script as ms
from support.checkpoints import save_checkpoint

pytest.importorskip("flask", reason="the optional package flask is not installed")
pytest.importorskip("waitress", reason="the optional package waitress is not installed")

MEGABYTES = 300.0  # above what the server takes once it has answered one upload
# 501: a transfer encoding nobody knows
MEANT = {200, 202, 400, 403, 404, 405, 409, 413, 414, 431, 501, 503}
BOUNDARY = "line"


class Server:
    """A running `python tools/web_app.py` and how to talk to it."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(1)
        config = ms.Config(flow_channels=8, num_flow_blocks=1, thumbnail_size=32)
        model = randomise(ms.ConditionalFlow(config), 0.05, 1)
        content = {
            "config": dataclasses.asdict(config),
            "model": model.state_dict(),
            "run_id": "r",
            "epoch": 1,
        }
        save_checkpoint(folder / "w.pth", content)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        options = [
            "--checkpoint",
            str(folder / "w.pth"),
            "--port",
            str(self.port),
            "--set",
            "device=cpu",
        ]
        limits = ["--max-megabytes", "2", "--max-megapixels", "1"]
        command = [sys.executable, str(ROOT / "tools" / "web_app.py"), *options, *limits]
        self.log = open(folder / "log", "w+b")  # noqa: SIM115 - it lives as long as the server
        # a shell's background jobs would ignore it
        ctrl_c = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment(),
            stdout=self.log,
            stderr=self.log,
            preexec_fn=ctrl_c,
        )
        ends = time.monotonic() + 200
        while self.process.poll() is None and time.monotonic() < ends:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                break
            time.sleep(0.05)
        self.finish(self.upload(encoded(target_picture(0), "PNG"))[1])
        self.base = self.peak()

    def peak(self) -> float:
        """The most memory it ever had, in megabytes; 0 where the system does not tell."""
        status = Path(f"/proc/{self.process.pid}/status")
        lines = status.read_text().splitlines() if status.exists() else []
        return next(
            (int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0
        )

    def grown(self) -> float:
        return self.peak() - self.base

    def ask(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, bytes]:
        """(status, body) of one request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(
                method,
                path,
                body,
                {name.replace("_", "-"): value for name, value in headers.items()},
            )
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def fetch(self, path: str) -> tuple[int, bytes]:
        """(status, body) of a GET by one who comes back while the page is busy."""
        ends = time.monotonic() + 60
        while (answer := self.ask("GET", path))[0] == 503 and time.monotonic() < ends:
            time.sleep(0.02)
        return answer

    def upload(self, data: bytes, name: str = "p.png") -> tuple[int, Any]:
        status, answer = self.ask(
            "POST",
            "/jobs",
            form(data, name),
            Content_Type=f"multipart/form-data; boundary={BOUNDARY}",
        )
        return status, json.loads(answer)

    def finish(self, answer: dict[str, str]) -> tuple[str, dict[str, Any]]:
        """(its name, what is said of it) once a job is done or has failed."""
        ends = time.monotonic() + 60
        while time.monotonic() < ends:
            info = json.loads(self.ask("GET", f"/jobs/{answer['job']}")[1])
            if info["state"] in ("done", "failed"):
                return answer["job"], info
            time.sleep(0.02)
        raise AssertionError("no answer")

    def raw(self, *parts: bytes, wait: float = 20) -> int:
        """The status that bytes sent as they are get; 0 for a hang-up without a word. Raises
        TimeoutError for neither."""
        with socket.create_connection(("127.0.0.1", self.port), wait) as line:
            with may_hang_up():
                for part in parts:
                    line.sendall(part)
            return read_status(line)


def form(data: bytes, name: str = "p.png") -> bytes:
    head = (
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="picture"; filename="{name}"\r\n\r\n'
    )
    return head.encode() + data + f"\r\n--{BOUNDARY}--\r\n".encode()


@contextmanager
def may_hang_up() -> Iterator[None]:
    """The other side may close the connection within; that it neither reads nor answers is still an
    error."""
    try:
        yield
    except TimeoutError:
        raise
    except OSError:
        pass


def read_status(line: socket.socket) -> int:
    """The status of the answer; 0 where the server hangs up without a word. Raises TimeoutError
    where it does neither."""
    received = b""
    with may_hang_up():
        while b"\r\n" not in received and (more := line.recv(4096)):
            received += more
    return int(received.split()[1]) if received.startswith(b"HTTP/") else 0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    running = Server(folder)
    yield running
    running.process.send_signal(signal.SIGINT)
    assert running.process.wait(30) == 0
    running.log.seek(0)
    said = running.log.read().decode()
    running.log.close()
    assert "Traceback" not in said, said
    # no upload ever touched the disk
    assert {path.name for path in folder.iterdir()} == {"w.pth", "log"}


@pytest.fixture(autouse=True)
def bounded(server: Server) -> Iterator[None]:
    """Whatever a test does, the server is there afterwards and has not grown."""
    yield
    assert server.process.poll() is None
    assert server.ask("GET", "/")[0] == 200
    assert server.grown() < MEGABYTES


def test_200_requests_from_20_clients_are_all_answered_with_the_clients_own_picture(
    server: Server,
) -> None:
    def client(number: int) -> list[int]:
        pixels = target_picture(number, 32 + number, 60 - number)
        statuses = []
        for _ in range(2):
            status, answer = server.upload(encoded(pixels, "PNG"), f"{number}.png")
            statuses.append(status)
            name, info = server.finish(answer)
            assert info["state"] == "done" and (info["width"], info["height"]) == (
                60 - number,
                32 + number,
            )
            for path, size in (
                ("enhanced?full=1", pixels),
                ("low", pixels),
                ("enhanced?exposure=1", pixels),
            ):
                status, picture = server.fetch(f"/jobs/{name}/{path}")
                statuses.append(status)
                assert np.asarray(Image.open(io.BytesIO(picture))).shape == size.shape
        statuses += [server.ask("GET", path)[0] for path in ("/", "/jobs/none", "/nothing")]
        return statuses

    with ThreadPoolExecutor(20) as pool:
        found = list(pool.map(client, range(20)))
    statuses = [status for each in found for status in each]
    assert {status: statuses.count(status) for status in set(statuses)} == {
        200: 140,
        202: 40,
        404: 40,
    }


def test_slow_uploads_keep_nobody_waiting(server: Server) -> None:
    """More of them than the server has threads; each is answered when it comes to its end."""
    body = form(encoded(target_picture(1), "PNG"))
    head = (
        "POST /jobs HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data;"
        f" boundary={BOUNDARY}\r\n"
    )
    head += f"Content-Length: {len(body)}\r\n\r\n"
    with ExitStack() as stack:
        lines = [
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 60))
            for _ in range(25)
        ]
        for line in lines:
            line.sendall(head.encode() + body[:200])
        started = time.monotonic()
        info = server.finish(server.upload(encoded(target_picture(2), "PNG"))[1])[1]
        assert info["state"] == "done" and time.monotonic() - started < 20
        for place in range(200, len(body), 1000):
            for line in lines:
                line.sendall(body[place : place + 1000])
        assert {read_status(line) for line in lines} <= {202, 503}


def test_uploads_that_break_off_leave_nothing(server: Server) -> None:
    body = form(bytes(2_000_000))
    for _ in range(60):
        with socket.create_connection(("127.0.0.1", server.port), 60) as line:
            line.sendall(
                f"POST /jobs HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
                + body[:1_000_000]
            )


@pytest.mark.parametrize("size", [2 * 2**20, 4 * 2**20, 10**10, 10**30])
def test_a_body_that_is_said_to_be_too_large_is_refused(server: Server, size: int) -> None:
    """Within the limit of one megabyte more than an upload may have the page itself answers;
    beyond, nothing is read."""
    kind = (
        f"Content-Type: multipart/form-data; boundary={BOUNDARY}\r\nContent-Length: {size}\r\n\r\n"
    )
    rest = b"x" * size if size < 3 * 2**20 else b"x" * 100_000
    assert server.raw(b"POST /jobs HTTP/1.1\r\nHost: x\r\n" + kind.encode() + rest) == 413


def test_a_body_without_end_is_cut_off(server: Server) -> None:
    head = b"POST /jobs HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert server.raw(head, *[b"10000\r\n" + b"x" * 2**16 + b"\r\n"] * 1500) in (413, 0)


def test_a_form_of_many_parts_or_fields_is_refused(server: Server) -> None:
    part = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="f"\r\n\r\nx\r\n'.encode()
    wide = (
        f"--{BOUNDARY}\r\nContent-Disposition: form-data;"
        f' name="{"f" * 10**6}"\r\n\r\nx\r\n--{BOUNDARY}--\r\n'.encode()
    )
    unnamed = form(encoded(target_picture(1), "PNG")).replace(b'; filename="p.png"', b"")
    for body in (
        part * 20_000 + f"--{BOUNDARY}--\r\n".encode(),
        wide,
        unnamed,
        b"",
        b"--" * 99,
        form(b"")[:-9],
        b"\0" * 9999,
    ):
        for kind in (
            f"multipart/form-data; boundary={BOUNDARY}",
            "multipart/form-data",
            "application/json",
            "multipart/é",
            "",
        ):
            status, answer = server.ask("POST", "/jobs", body, Content_Type=kind)
            assert status in (400, 413) and json.loads(answer)["error"], (kind, body[:50])


@pytest.mark.parametrize(
    "method", ["PUT", "DELETE", "PATCH", "POST", "TRACE", "CONNECT", "PROPFIND", "BREW", "get"]
)
def test_wrong_methods_are_refused(server: Server, method: str) -> None:
    for path in ("/", "/jobs", "/jobs/x", "/jobs/x/enhanced", "/samples/rocket", "/zip"):
        if (method, path) != ("POST", "/jobs"):
            assert server.raw(
                f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n".encode()
            ) in (400, 405, 501)


@pytest.mark.parametrize("count", [0, 33, 500])
def test_a_zip_of_none_or_too_many_is_refused(server: Server, count: int) -> None:
    job = server.finish(server.upload(encoded(target_picture(1), "PNG"))[1])[0]
    path = "/zip?" + "&".join([f"job={job},enhanced,0,1"] * count)
    status, answer = server.ask("GET", path)
    assert status == 400 and "1 to 32" in json.loads(answer)["error"]


def test_zips_of_strange_entries_are_refused(server: Server) -> None:
    job = server.finish(server.upload(encoded(target_picture(1), "PNG"))[1])[0]
    for entry, meant in (
        *(("nobodys,enhanced,0,1", 404), (f"{job},low", 404), (f"{job},uncertainty", 404)),
        *((f"{job},../../README.md,0,1", 404), (f"{job},enhanced,99", 400), (",,,", 404)),
        *((f"{job},enhanced,nan", 400), (f"{job},enhanced,0,2", 400), ("%00,%ff", 404)),
        *((f"{job}", 404), (f"{job},enhanced,,", 400)),
    ):
        status, answer = server.ask("GET", f"/zip?job={job},enhanced&job={entry}")
        assert status == meant and json.loads(answer)["error"], entry


def test_many_zips_at_once_are_bounded(server: Server) -> None:
    """Each of the most pictures; what is refused is told so, and memory stays (see `bounded`)."""
    noise = np.random.default_rng(0).integers(0, 60, (400, 500, 3)).astype(np.uint8)
    job = server.finish(server.upload(encoded(noise, "PNG"))[1])[0]
    path = "/zip?" + "&".join([f"job={job},enhanced,0,1"] * 32)
    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(lambda _: server.ask("GET", path)[0], range(8)))
    assert set(statuses) <= {200, 503} and 200 in statuses


def test_nobody_cancels_anothers_picture(server: Server) -> None:
    """A job's name is 128 random bits; what is like it is no name, and another site may not try."""
    job = server.finish(server.upload(encoded(target_picture(1), "PNG"))[1])[0]
    assert len(job) == 22
    for name in ("0", "example", job[:-1], job.swapcase(), job + "A", "*", "%2e%2e", "../" + job):
        assert server.ask("POST", f"/jobs/{name}/cancel")[0] in (404, 405), name
    path = f"/jobs/{job}/cancel"
    assert server.ask("POST", path, Origin="http://evil.example")[0] == 403
    assert server.ask("GET", path)[0] == 404
    assert json.loads(server.ask("POST", path)[1]) == {"state": "done"}  # too late: it stays
    assert server.fetch(f"/jobs/{job}/enhanced")[0] == 200


def test_views_beyond_their_limits_are_refused(server: Server) -> None:
    job = server.finish(server.upload(encoded(target_picture(1), "PNG"))[1])[0]
    for words in ("side=1e9", "side=0", "side=nan", "strength=-1", "exposure=inf", "strength=x"):
        assert server.ask("GET", f"/jobs/{job}/enhanced?{words}")[0] == 400, words


TRICKS = [
    *(
        "/../web_app.py",
        "/%2e%2e/web_app.py",
        "/%2e%2e/tools/web_app.py",
        "/samples/..%2f..%2fREADME.md",
        "/samples/%2e%2e/%2e%2e/README.md",
    ),
    *(
        "/static/page.html",
        "/templates/page.html",
        "//etc/passwd",
        "/etc/passwd",
        "/jobs/../../etc/passwd",
        "/jobs/%00",
    ),
    *(
        "/jobs/%ff%fe",
        "/jobs/x/..%5c..%5cREADME.md",
        "/jobs/" + "a" * 9000,
        "http://elsewhere/",
        "*",
        "/%",
        "/\\..\\README.md",
    ),
    *(
        "/samples/rocket/",
        "/samples/ROCKET",
        "/jobs/x/enhanced?full=1&exposure=1e400",
        "/?model=../../x",
        "/samples/rocket%0d%0aX:y",
    ),
]


@pytest.mark.parametrize("path", TRICKS)
def test_tricky_paths_lead_nowhere(server: Server, path: str) -> None:
    with socket.create_connection(("127.0.0.1", server.port), 20) as line:
        line.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        answer = b""
        while more := line.recv(65536):
            answer += more
    status = int(answer.split()[1])
    assert status in MEANT - {202}
    if status == 200:
        assert path in ("/?model=../../x", "http://elsewhere/") and b"<title>" in answer
    assert b"root:" not in answer and b"import " not in answer and b"low-light-flow" not in answer


GARBAGE = [
    *(
        b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc",
        b"\0" * 5000,
    ),
    b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 50_000 + b"\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nCookie: " + b"c" * 300_000 + b"\r\n\r\n",
    b"GET /" + b"a" * 300_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    *(
        b"GET / HTTP/1.1\r\nHost: " + host + b"\r\n\r\n"
        for host in (b"", b"\xff", b"a b", b"[::", b"x:99999999", b"../..")
    ),
    *(
        b"POST /jobs HTTP/1.1\r\nHost: x\r\nContent-Length: " + n + b"\r\n\r\n"
        for n in (b"-1", b"x", b"1e3", b"0x10")
    ),
    b"POST /jobs HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    b"POST /jobs HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\nabcd",
    b"POST /jobs HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\nabcd\r\n0\r\n\r\n",
    b"POST /jobs HTTP/1.1\r\nHost: x\r\nOrigin: null\r\nContent-Length: 0\r\n\r\n",
    b"POST /jobs HTTP/1.1\r\nHost: x\r\nExpect: 200-maybe\r\nContent-Length: 0\r\n\r\n",
]


@pytest.mark.parametrize("number", range(len(GARBAGE)))
def test_requests_that_are_none_are_no_servers_error(server: Server, number: int) -> None:
    with socket.create_connection(("127.0.0.1", server.port), 20) as line:
        with may_hang_up():
            line.sendall(GARBAGE[number])
            line.shutdown(socket.SHUT_WR)
        assert read_status(line) in MEANT | {0}


def test_silence_is_told_from_a_closed_connection() -> None:
    """Or a server that hangs would pass for one that hangs up."""
    for closes in (True, False):
        here, there = socket.socketpair()
        with here, there:
            here.settimeout(0.1)
            if closes:
                there.close()
                assert read_status(here) == 0
            else:
                with pytest.raises(TimeoutError):
                    read_status(here)


def test_hostile_pictures_are_refused_by_the_page_too(server: Server) -> None:
    scene = target_picture(3)
    odd = {**bad_pictures(scene), **dict(list(cut_pictures(scene).items())[::9])}
    refused = 0
    for name, one in odd.items():
        status, answer = server.upload(one.data)
        while status == 503:
            time.sleep(0.1)
            status, answer = server.upload(one.data)
        if status == 202:
            info = server.finish(answer)[1]
            assert info["state"] == "failed" or one.may_refuse or one.pixels is not None, name
            said = info["message"]
        else:
            assert status == 400, name
            said = answer["error"]
        assert "\n" not in said and "/" not in said.replace("width/height", ""), name
        refused += bool(said)
    assert refused > 40
