"""The routes beside the answers, and who may use them."""

from __future__ import annotations

import mimetypes
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from qwen_runtime import Model
from qwen_runtime.serve import app
from starlette.testclient import TestClient

from tests.support.servers import RUN, Server, health, request, serving


def test_metrics(server: Server, ask: Callable[..., Any]) -> None:
    def read() -> dict[str, float]:
        text = request(server, "GET", "/metrics")[2].decode()
        lines = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, value in lines}

    before = read()
    answer = ask()
    for path in ("/v1/invented", "/v1/models/invented", "/", "/v1/models", "/health"):
        request(server, "GET", path)
    after = read()

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert grown('qwen_edge_requests_total{path="/v1/chat/completions",status="200"}') == 1
    assert grown('qwen_edge_requests_total{path="other",status="404"}') == 2
    for path in ("/", "/v1/models", "/health"):
        assert grown(f'qwen_edge_requests_total{{path="{path}",status="200"}}') == 1
    assert grown("qwen_edge_prompt_tokens_total") == answer.usage.prompt_tokens
    assert grown("qwen_edge_cached_prompt_tokens_total") == answer.usage.prompt_tokens_details.cached_tokens
    assert grown("qwen_edge_completion_tokens_total") == 30
    assert grown("qwen_edge_time_to_first_token_seconds_count") == 1
    assert after["qwen_edge_running"] == after["qwen_edge_waiting"] == 0
    assert after["process_resident_memory_bytes"] > 1e6


def test_health_answers_while_a_long_prompt_is_read(server: Server, client: OpenAI, model: Model) -> None:
    prompt = "word " * 8000  # some 16 chunks; a server that waits for all of them answers after the last
    reading = threading.Thread(
        target=lambda: client.completions.create(model=model.info.name, prompt=prompt, max_tokens=1)
    )
    reading.start()
    answers = 0
    while reading.is_alive():
        answers += health(server)["running"]
    assert answers > 3


def test_models(client: OpenAI, model: Model) -> None:
    assert [found.id for found in client.models.list()] == [model.info.name]
    assert client.models.retrieve(model.info.name).id == model.info.name
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")


def test_other_sites_have_no_business_here(server: Server) -> None:
    """A web page may point its own name at this machine, or send requests that the browser lets pass."""
    assert request(server, "GET", "/health", Host="evil.example")[0] == 400
    assert request(server, "GET", "/health", Host="localhost:1")[0] == 200
    status, headers, _ = request(
        server, "OPTIONS", "/v1/chat/completions", None,
        Origin="https://evil.example", **{"Access-Control-Request-Method": "POST"},
    )  # fmt: skip
    assert not any(name.startswith("access-control") for name in headers)
    assert status >= 400


def test_key_is_demanded(cpu_artifact: Path, model: Model) -> None:
    refused = subprocess.run(
        [*RUN, "serve", str(cpu_artifact), "--host", "0.0.0.0"], capture_output=True, text=True
    )
    assert refused.returncode == 2 and "give an --api-key" in refused.stderr
    with serving(cpu_artifact, "--host", "0.0.0.0", "--api-key", "sesame") as server:
        for path in ("/metrics", "/props", "/v1/models", "/v1/invented", "/api/invented"):
            assert request(server, "GET", path)[0] == 401, path
        for path in ("/tokenize", "/detokenize", "/apply-template", "/v1/chat/completions"):
            assert request(server, "POST", path, b"{}")[0] == 401, path
        for keys in ({"Authorization": "bearer sesame"}, {"x-api-key": "sesame"}):
            assert request(server, "GET", "/v1/models", None, **keys)[0] == 200, keys
        assert request(server, "GET", "/v1/models", None, **{"x-api-key": ""})[0] == 401
        with pytest.raises(openai.AuthenticationError, match="no valid API key"):
            server.client("wrong").models.list()
        assert [found.id for found in server.client("sesame").models.list()] == [model.info.name]
        assert health(server)["status"] == "ok"


def test_kiosk_page(cpu_artifact: Path) -> None:
    with serving(cpu_artifact, "--kiosk") as server:
        status, headers, _ = request(server, "GET", "/")
        assert (status, headers["location"]) == (307, "/?kiosk")
        status, _, page = request(server, "GET", "/?kiosk&idle=60")
        assert status == 200 and b"<html" in page
        assert request(server, "GET", "/app.js")[0] == 200


def test_scripts_have_their_type_whatever_the_system_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Windows' registry does, which Python's table takes over."""
    types = mimetypes.MimeTypes()
    types.add_type("text/plain", ".js")
    types.add_type("text/plain", ".mjs")
    monkeypatch.setattr(mimetypes, "_db", types)
    page = TestClient(app._Page(False, directory=Path(app.__file__).parent / "page", html=True))
    for path in ("/app.js", "/vendor/purify.es.mjs"):
        assert page.get(path).headers["content-type"].startswith("text/javascript"), path
