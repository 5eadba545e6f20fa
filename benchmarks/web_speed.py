"""How fast the page answers: one 600x400 upload, and twenty at once.

    python benchmarks/web_speed.py [--checkpoint FILE] [--together 20] [--repeats 5]

Starts the real page on a free port, uploads generated pictures as a browser does and waits for each
result. Seconds run from the start of the upload to the last byte of the enhanced view.
"""

from __future__ import annotations

import argparse
import http.client
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from enhance_speed import write_picture
from footprint import HEIGHT, ROOT, WIDTH


def request(
    port: int, method: str, path: str, body: bytes = b"", kind: str = ""
) -> tuple[int, bytes]:
    """(status, body) of one request over a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    connection.request(method, path, body or None, {"Content-Type": kind} if kind else {})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, content


def enhance(port: int, picture: bytes) -> float:
    """Seconds until an upload's enhanced view is here. Raises RuntimeError when it is refused."""
    started = time.perf_counter()
    line = b'--line\r\nContent-Disposition: form-data; name="picture"; filename="p.png"\r\n\r\n'
    status, answer = request(
        port,
        "POST",
        "/jobs",
        line + picture + b"\r\n--line--\r\n",
        "multipart/form-data; boundary=line",
    )
    if status != 202:
        raise RuntimeError(answer.decode())
    job = json.loads(answer)["job"]
    while (info := json.loads(request(port, "GET", f"/jobs/{job}")[1]))["state"] not in (
        "done",
        "failed",
    ):
        time.sleep(0.05)
    status, _ = request(port, "GET", f"/jobs/{job}/enhanced")
    if status != 200:
        raise RuntimeError(info["message"])
    return time.perf_counter() - started


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", default=str(ROOT / "checkpoints" / "released.pth"))
    parser.add_argument("--together", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        str(ROOT / "tools" / "web_app.py"),
        "--checkpoint",
        arguments.checkpoint,
        "--port",
        str(port),
    ]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        server.stdout.readline()
        while socket.socket().connect_ex(("127.0.0.1", port)):
            time.sleep(0.05)
        with tempfile.TemporaryDirectory() as name:
            pictures = [
                write_picture(Path(name) / f"{n}.png", WIDTH, HEIGHT, n).read_bytes()
                for n in range(arguments.together)
            ]
        enhance(port, pictures[0])
        alone = [enhance(port, picture) for picture in pictures[: arguments.repeats]]
        print(
            f"one {WIDTH}x{HEIGHT} upload: median {statistics.median(alone):.2f} s, slowest"
            f" {max(alone):.2f} s"
        )
        with ThreadPoolExecutor(arguments.together) as pool:
            together = list(pool.map(lambda picture: enhance(port, picture), pictures))
        print(
            f"{len(together)} at once: all answered, median {statistics.median(together):.2f} s,"
            f" last {max(together):.2f} s"
        )
    finally:
        server.terminate()
        server.wait(20)


if __name__ == "__main__":
    main()
