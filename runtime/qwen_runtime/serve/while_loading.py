"""What the server's address answers before the first model is loaded: 503, and how far it is.

As llama-server does, whose clients wait for `/health`; the application takes the same socket over afterwards.
"""

from __future__ import annotations

import html
import json
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil

from qwen_runtime.load_progress import LoadProgress, artifact_bytes
from qwen_runtime.serve.errors import ApiError

_SECONDS = 2  # after which to ask again
_LOOK = 0.05  # seconds until it is noticed that the model is there
_PATIENCE = 5.0  # seconds for a client to send its request, and as many for what is left of it
_PIECE = 65536  # bytes
_MESSAGE = "Loading model"
# A public screen may show it.
_PAGE = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><meta name="color-scheme" content="light dark"><title>{name}</title>
<body style="font: 1.2em system-ui, sans-serif; text-align: center; margin-top: 30vh">
<p>{name}</p><p>Starting: <progress value="{share:.3f}"></progress></p>
"""


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


def _json(path: str, share: float, name: str) -> str:
    """As llama-server's, or in the shape of the other protocol that is spoken at `path`."""
    error: dict[str, object] = {
        "error": {"code": 503, "message": _MESSAGE, "type": "unavailable_error"},
    }
    if path.startswith(("/v1/messages", "/api/")):
        error = ApiError(503, _MESSAGE).body_at(path)
    return json.dumps({"status": "loading", "loaded": round(share, 3), "model": name, **error})


class _Server(ThreadingHTTPServer):
    """On a socket that somebody else opened and goes on with."""

    daemon_threads = True

    def __init__(self, listener: socket.socket, share: Callable[[], float], name: str) -> None:
        socketserver.BaseServer.__init__(self, listener.getsockname(), _Handler)
        self.socket = listener
        self.share, self.name = share, name

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients may leave at any time."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = _PATIENCE
    protocol_version = "HTTP/1.0"  # a connection is closed with its answer

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        share, name = self.server.share(), self.server.name
        body, kind = _json(path, share, name), "application/json"
        if path == "/" and "text/html" in self.headers.get("Accept", ""):
            body, kind = _PAGE.format(name=html.escape(name), share=share), "text/html; charset=utf-8"
        self.send_response(HTTPStatus.SERVICE_UNAVAILABLE)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body.encode())))
        self.send_header("Retry-After", str(_SECONDS))
        if path == "/":
            self.send_header("Refresh", str(_SECONDS))  # browsers show the page when it is there
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body.encode())
        if not {"Content-Length", "Transfer-Encoding"}.isdisjoint(self.headers.keys()):
            self._drain()

    def _drain(self) -> None:
        """Take the body, for a while: where one is left the system resets the connection, and a client never
        sees the answer."""
        end = time.monotonic() + _PATIENCE
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            while time.monotonic() < end and self.rfile.read1(_PIECE):
                pass

    do_POST = do_HEAD = do_OPTIONS = do_PUT = do_DELETE = do_GET

    def version_string(self) -> str:
        return "qwen-run"

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing: the server's access log is off too."""
