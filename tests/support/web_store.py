"""A folder behind a web server that does what web servers on the way may do."""

from __future__ import annotations

import http.server
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class WebStore(http.server.ThreadingHTTPServer):
    """Attributes that change what it does:

    cuts: answers that still break off in the middle.
    fails: answers of 503 that still come.
    budget: bytes that it still sends; then it breaks off and answers 503.
    ranges: whether it knows them.
    moved: where it sends every request on to.
    asked: path and range of each request.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.folder = folder
        self.cuts = self.fails = 0
        self.budget = 1 << 40
        self.ranges = True
        self.moved = ""
        self.asked: list[tuple[str, str]] = []
        self.sent = 0
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Answer(http.server.BaseHTTPRequestHandler):
    server: WebStore
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        wanted = self.headers.get("Range", "")
        self.server.asked.append((self.path, wanted))
        path = self.server.folder / self.path.lstrip("/")
        if self.server.moved:
            self.send_response(302)
            self.send_header("Location", self.server.moved + self.path)
            self._end(b"")
        elif self.server.fails or not self.server.budget:
            self.server.fails = max(0, self.server.fails - 1)
            self.send_response(503)
            self._end(b"")
        elif not path.is_file():
            self.send_response(404)
            self._end(b"no")
        else:
            data = path.read_bytes()
            found = re.fullmatch(r"bytes=(\d+)-", wanted)
            if found and self.server.ranges:
                if int(found[1]) >= len(data):
                    self.send_response(416)
                    return self._end(b"")
                data = data[int(found[1]) :]
                self.send_response(206)
            else:
                self.send_response(200)
            self._end(data)
        return None

    def _end(self, data: bytes) -> None:
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.server.cuts and len(data) > 1000:
            self.server.cuts -= 1
            data = data[: len(data) // 2]
            self.close_connection = True
        if len(data) > self.server.budget:
            data = data[: self.server.budget]
            self.close_connection = True
        self.server.budget -= len(data)
        self.server.sent += len(data)
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@contextmanager
def web_store(folder: Path) -> Iterator[WebStore]:
    with WebStore(folder) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
