"""What the server's address answers before the first model is loaded: 503, and how far it is.

As llama-server does, whose clients wait for `/health`; the application takes the same socket over afterwards.
"""

from __future__ import annotations

import json
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil

from qwen_runtime.load_progress import LoadProgress, artifact_bytes

_SECONDS = 2  # after which to ask again
_LOOK = 0.05  # seconds until it is noticed that the model is there
_PATIENCE = 5.0  # seconds for a client to send its request


@contextmanager
def answering(listener: socket.socket, artifact: Path, name: str) -> Iterator[None]:
    """Answer on `listener`, in a thread, while this process's children load `artifact`.

    Args:
        name: the model's.
    """
    progress = LoadProgress(psutil.Process().children, artifact_bytes(artifact))
    server = _Server(listener, progress.share, name)
    thread = threading.Thread(target=server.serve_forever, args=(_LOOK,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()


class _Server(ThreadingHTTPServer):
    """On a socket that somebody else opened and goes on with."""

    daemon_threads = True

    def __init__(self, listener: socket.socket, share: Callable[[], float], name: str) -> None:
        socketserver.BaseServer.__init__(self, listener.getsockname(), _Handler)
        self.socket = listener
        self.share, self.name = share, name


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = _PATIENCE
    protocol_version = "HTTP/1.0"  # a connection is closed with its answer

    def do_GET(self) -> None:
        body = json.dumps(
            {
                "status": "loading",
                "loaded": round(self.server.share(), 3),
                "model": self.server.name,
                "error": {"code": 503, "message": "Loading model", "type": "unavailable_error"},
            }
        ).encode()
        self.send_response(HTTPStatus.SERVICE_UNAVAILABLE)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Retry-After", str(_SECONDS))
        if self.path.partition("?")[0] == "/":
            self.send_header("Refresh", str(_SECONDS))  # browsers show the page when it is there
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_POST = do_HEAD = do_OPTIONS = do_PUT = do_DELETE = do_GET

    def version_string(self) -> str:
        return "qwen-run"

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing: the server's access log is off too."""
