"""Bodies, connections, and clients that leave or say nothing."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import psutil
import pytest
from openai import OpenAI
from qwen_runtime import Model

from tests.support.servers import Server, endless, request, serving, wait_until_idle
from tests.support.waiting import PATIENCE, until

QUESTION = [{"role": "user", "content": "What is assert?"}]


def test_bodies_that_are_refused(server: Server) -> None:
    path = "/v1/chat/completions"
    for body, status in [
        (b"{", 400),
        (b"", 400),
        (b"\xff\xfe", 400),
        (b"[" * 100_000, 400),
        (b'{"messages": 5}', 400),
        (b" " * (33 * 1024 * 1024), 413),
    ]:
        found = request(server, "POST", path, body)
        assert found[0] == status, body[:20]
        assert json.loads(found[2])["error"]["message"]
    assert request(server, "POST", path, b"{}", **{"Content-Type": "text/plain"})[0] == 415
    assert request(server, "GET", path)[0] == 405
    assert request(server, "GET", "/v1/nothing")[0] == 404


def test_request_that_is_nested_too_deeply(server: Server, ask: Callable[..., Any]) -> None:
    """It harms no other, wherever on its way to the model it becomes too much."""
    for depth in (100, 300, 400, 500, 700, 900):
        arguments = '{"a":' * depth + "1" + "}" * depth
        call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
        messages = [
            *QUESTION,
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": "x"},
        ]
        body = json.dumps({"messages": messages, "max_tokens": 1}).encode()
        status = request(server, "POST", "/v1/chat/completions", body)[0]
        assert status == (200 if depth == 100 else 400) or (depth < 500 and status == 200)
    wait_until_idle(server)
    assert ask(max_tokens=2).choices
    assert b"qwen_edge_model_restarts_total 0.0" in request(server, "GET", "/metrics")[2]


def test_leaving_stops_the_work(server: Server, client: OpenAI, model: Model, cpu_artifact: Path) -> None:
    long: dict[str, Any] = {"model": model.info.name, "prompt": "The", "max_tokens": 8000, "temperature": 0}
    long["logit_bias"] = endless(cpu_artifact)
    stream = client.completions.create(**long, stream=True)
    next(iter(stream))
    stream.close()
    wait_until_idle(server)
    with pytest.raises(openai.APITimeoutError):  # no stream: nothing is sent that could fail
        client.with_options(timeout=0.3).completions.create(**long)
    wait_until_idle(server)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot end such a connection")
def test_reader_that_stops_is_let_go(
    cpu_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It cannot hold its connection, nor the server when that is told to end."""
    patch = "import qwen_runtime.serve.http as http\nhttp.SEND_TIMEOUT = 2.0\n"
    (tmp_path / "sitecustomize.py").write_text(patch)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    asked = {"messages": QUESTION, "max_tokens": 2000, "stream": True, "logprobs": True, "top_logprobs": 20}
    body = json.dumps({**asked, "logit_bias": endless(cpu_artifact)}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with serving(cpu_artifact) as server, socket.socket() as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        reader.connect((urlsplit(server.url).hostname, urlsplit(server.url).port))
        reader.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        process = psutil.Process(server.process.pid)
        begun = b'qwen_edge_requests_total{path="/v1/chat/completions",status="200"} 1.0'
        until(lambda: begun in request(server, "GET", "/metrics")[2])

        def held() -> bool:
            return any(
                found.raddr and found.raddr.port == reader.getsockname()[1]
                for found in process.net_connections("tcp")
            )

        until(lambda: not held())
        wait_until_idle(server)


# A pause between two pieces is a third of what is granted or less; all of them together are more.
IMPATIENT = """
import qwen_runtime.serve.http as http

http.HEAD_TIMEOUT = 2.0
http.BODY_TIMEOUT = 4.0
http.SLOWEST_BODY = 1000.0
"""


def test_clients_that_say_nothing_are_let_go(
    cpu_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a request holds no connection for ever; one that goes on slowly is answered."""
    (tmp_path / "sitecustomize.py").write_text(IMPATIENT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    get = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
    post = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    body = json.dumps({"prompt": "The", "max_tokens": 1, "user": "u" * 6000}).encode()
    length = f"Content-Length: {len(body)}\r\n\r\n".encode()
    with serving(cpu_artifact) as server:
        address = urlsplit(server.url).hostname, urlsplit(server.url).port

        def answered(pieces: Sequence[bytes], pause: float = 0.0) -> list[str]:
            """The statuses of all answers before the server closes the connection."""
            with socket.create_connection(address, timeout=PATIENCE) as client:
                for piece in pieces:
                    client.sendall(piece)
                    time.sleep(pause)
                received = b"".join(iter(lambda: client.recv(65536), b""))
            return re.findall(r"HTTP/1\.1 (\d+)", received.decode())

        last = b"Connection: close\r\n"
        parts = [body[at : at + 400] for at in range(0, len(body), 400)]
        cases: list[tuple[list[bytes], float, list[str]]] = [
            ([], 0, []),
            ([get], 0, []),
            ([get + b"\r\n", get], 0.1, ["200"]),
            ([get + length, b"{"], 0.1, ["200"]),  # half of a body that nobody reads
            ([post + length + body[:50]], 0, ["408"]),
            ([post + last + length, *parts], 0.3, ["200"]),  # takes 4.8 seconds
            ([*[get + b"\r\n"] * 4, get + last + b"\r\n"], 0.6, ["200"] * 5),
        ]
        with ThreadPoolExecutor(len(cases)) as pool:
            found = list(pool.map(lambda case: answered(*case[:2]), cases))
        assert found == [case[2] for case in cases]
