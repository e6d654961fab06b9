"""The address before the first model is loaded."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from qwen_runtime.serve.while_loading import answering


def test_everything_is_503_until_the_socket_is_handed_on(cpu_artifact: Path) -> None:
    size = sum(path.stat().st_size for path in cpu_artifact.iterdir())
    holding = subprocess.Popen(
        [sys.executable, "-c", f"held = b'x' * {size // 2}; print(flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with socket.create_server(("127.0.0.1", 0)) as listener, holding:
        assert holding.stdout and holding.stdout.readline()
        port = listener.getsockname()[1]
        with answering(listener, cpu_artifact, "tiny"):
            silent = socket.create_connection(("127.0.0.1", port))  # and stays silent
            garbage = socket.create_connection(("127.0.0.1", port))
            garbage.sendall(os.urandom(100) + b"\r\n\r\n")
            for method, path in (("GET", "/health"), ("POST", "/v1/chat/completions"), ("GET", "/?kiosk")):
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
                connection.request(method, path, body=b"{}" if method == "POST" else None)
                answer = connection.getresponse()
                said = json.loads(answer.read())
                assert answer.status == 503 and answer.headers["Retry-After"] == "2"
                assert said["status"] == "loading" and said["error"]["message"] == "Loading model"
                assert 0.5 <= said["loaded"] <= 0.99
                assert (answer.headers["Refresh"] is not None) == (path == "/?kiosk")
        holding.communicate(b"\n")
        garbage.close()
        silent.close()
        waiting = socket.create_connection(("127.0.0.1", port))
        accepted, _ = listener.accept()  # by who has the socket now
        accepted.close()
        waiting.close()
