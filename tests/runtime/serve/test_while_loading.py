"""The address before the first model is loaded."""

from __future__ import annotations

import http.client
import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import anthropic
import ollama
import openai
import pytest
from qwen_runtime.serve.while_loading import answering

from tests.support.waiting import PATIENCE


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
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
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


@pytest.fixture
def loading(cpu_artifact: Path) -> Iterator[str]:
    """The address of one whose model never comes."""
    with socket.create_server(("127.0.0.1", 0)) as listener, answering(listener, cpu_artifact, "a <name>"):
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_clients_are_told_in_their_own_words(loading: str) -> None:
    """Also where the question is long, and is not read."""
    asked: Any = {"model": "tiny", "messages": [{"role": "user", "content": "What is assert? " * 500_000}]}
    with pytest.raises(openai.InternalServerError, match="Loading model") as of_openai:
        openai.OpenAI(base_url=f"{loading}/v1", api_key="unused", max_retries=0).chat.completions.create(
            **asked
        )
    of_anthropic = anthropic.Anthropic(base_url=loading, api_key="unused", max_retries=0)
    with pytest.raises(anthropic.APIStatusError) as told:
        of_anthropic.messages.create(max_tokens=5, **asked)
    assert of_openai.value.status_code == told.value.status_code == 503
    assert isinstance(told.value.body, dict) and told.value.body["type"] == "error"
    with pytest.raises(ollama.ResponseError) as of_ollama:
        ollama.Client(loading).chat(**asked)
    assert (of_ollama.value.status_code, of_ollama.value.error) == (503, "Loading model")


def test_a_browser_shows_no_json(loading: str) -> None:
    connection = http.client.HTTPConnection(urlsplit(loading).netloc, timeout=PATIENCE)
    connection.request("GET", "/?kiosk", headers={"Accept": "text/html,*/*;q=0.8"})
    answer = connection.getresponse()
    assert answer.status == 503 and answer.headers["Content-Type"].startswith("text/html")
    page = answer.read().decode()
    assert "a &lt;name&gt;" in page and "<progress" in page


def test_clients_that_leave_are_no_errors(loading: str, capfd: pytest.CaptureFixture[str]) -> None:
    host, port = urlsplit(loading).hostname, urlsplit(loading).port
    for begun in (b"", b"GET /health HT", b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\n"):
        with socket.create_connection((host, port)) as leaving:
            leaving.sendall(begun)
            time.sleep(0.05)
            leaving.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    time.sleep(0.2)
    assert capfd.readouterr().err == ""
