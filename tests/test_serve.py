"""The server through the official `openai` client, over a real socket."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import psutil
import pytest
from openai import OpenAI
from qwen_runtime import Model, Sampling
from servers import RUN, Server, serving

QUESTION = [{"role": "user", "content": "What is assert?"}]
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def model(cpu_artifact: Path) -> Iterator[Model]:
    with Model.load(cpu_artifact) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def server(cpu_artifact: Path) -> Iterator[Server]:
    with serving(cpu_artifact) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return server.client()


@pytest.fixture(scope="module")
def ask(client: OpenAI, model: Model) -> Callable[..., Any]:
    def create(messages: Any = QUESTION, **options: Any) -> Any:
        return client.chat.completions.create(
            model=model.info.name, messages=messages, **{"temperature": 0, "max_tokens": 30, **options}
        )

    return create


def request(
    server: Server, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """A request that no well-behaved client would make."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=30)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json", **headers})
        response = connection.getresponse()
        return (
            response.status,
            {name.lower(): value for name, value in response.getheaders()},
            response.read(),
        )
    finally:
        connection.close()


def health(server: Server) -> dict[str, Any]:
    return json.loads(request(server, "GET", "/health")[2])


def wait_until_idle(server: Server) -> None:
    deadline = time.monotonic() + 20
    while (found := health(server))["running"] or found["waiting"]:
        assert time.monotonic() < deadline, found
        time.sleep(0.05)


def test_answer_and_usage(ask: Callable[..., Any], model: Model) -> None:
    expected = model.generate(QUESTION, max_tokens=30, sampling=GREEDY)
    text = "".join(expected)
    answer = ask()
    assert answer.choices[0].message.content == text
    assert answer.choices[0].finish_reason == expected.finish_reason == "length"
    assert answer.usage.prompt_tokens == expected.prompt_tokens
    assert answer.usage.completion_tokens == 30 and answer.usage.total_tokens == expected.prompt_tokens + 30
    assert answer.model == model.info.name


def test_stream_is_the_answer_in_pieces(ask: Callable[..., Any]) -> None:
    whole = ask()
    chunks = list(ask(stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == whole.choices[0].message.content
    assert len(chunks) > 20
    assert [c.choices[0].finish_reason for c in chunks[:-1] if c.choices[0].finish_reason] == ["length"]
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in ask(stream=True))


def test_stop_and_seed(ask: Callable[..., Any]) -> None:
    whole = ask().choices[0].message.content
    stopped = ask(stop=[whole[20:26], "never"]).choices[0]
    assert stopped.message.content == whole[: whole.index(whole[20:26])]
    assert stopped.finish_reason == "stop"
    texts = [ask(temperature=1, seed=seed, max_tokens=15).choices[0].message.content for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_thoughts_are_apart(ask: Callable[..., Any], model: Model) -> None:
    text = "".join(model.generate(QUESTION, max_tokens=30, sampling=GREEDY, thinking=True))
    for options in (
        {"extra_body": {"chat_template_kwargs": {"enable_thinking": True}}},
        {"reasoning_effort": "low"},
    ):
        message = ask(**options).choices[0].message
        thoughts, _, said = text.partition("</think>")
        assert (message.reasoning_content, message.content) == (thoughts.strip(), said.strip() or None)
    assert not hasattr(ask(reasoning_effort="none").choices[0].message, "reasoning_content")


def test_completions(client: OpenAI, model: Model) -> None:
    text = "".join(model.generate("The", max_tokens=12, sampling=GREEDY))
    options: dict[str, Any] = {"model": model.info.name, "prompt": "The", "max_tokens": 12, "temperature": 0}
    answer = client.completions.create(**options)
    assert answer.choices[0].text == text and answer.usage and answer.usage.completion_tokens == 12
    chunks = list(client.completions.create(**options, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == text
    assert chunks[-1].choices[0].finish_reason == "length"


def test_models(client: OpenAI, model: Model) -> None:
    assert [found.id for found in client.models.list()] == [model.info.name]
    assert client.models.retrieve(model.info.name).id == model.info.name
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")


@pytest.mark.parametrize(
    "options,status,message",
    [
        ({"model": "gpt"}, 404, "no model 'gpt': this server has"),
        ({"n": 2}, 400, "n: only 1 is supported"),
        ({"max_tokens": 0}, 400, "max_tokens: "),
        ({"temperature": 3}, 400, "temperature: "),
        ({"messages": []}, 400, "messages: "),
        ({"messages": [{"role": "king", "content": ""}]}, 400, "messages.0.role: "),
        ({"messages": [{"role": "user", "content": "word " * 9000}]}, 400, "the context is 8192: shorten it"),
        ({"messages": [{"role": "user", "content": "a\0b"}]}, 400, "NUL character"),
        ({"logit_bias": {"1": 1}}, 400, "logit_bias: "),
        ({"extra_body": {"min_p": 0.1}}, 400, "min_p: "),
        ({"audio": {"voice": "alloy", "format": "wav"}}, 400, "audio: not supported"),
    ],
)
def test_requests_that_are_refused(
    ask: Callable[..., Any], client: OpenAI, model: Model, options: dict[str, Any], status: int, message: str
) -> None:
    for stream in (False, True):
        with pytest.raises(openai.APIStatusError) as caught:
            client.chat.completions.create(
                **{"model": model.info.name, "messages": QUESTION, "stream": stream, **options}
            )
        assert caught.value.status_code == status
        assert message in str(caught.value)


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


def test_leaving_stops_the_work(server: Server, client: OpenAI, model: Model) -> None:
    long: dict[str, Any] = {"model": model.info.name, "prompt": "The", "max_tokens": 8000, "temperature": 0}
    stream = client.completions.create(**long, stream=True)
    next(iter(stream))
    stream.close()
    wait_until_idle(server)
    with pytest.raises(openai.APITimeoutError):  # no stream: nothing is sent that could fail
        client.with_options(timeout=0.3).completions.create(**long)
    wait_until_idle(server)


def test_busy_server_says_when_to_come_back(cpu_artifact: Path, model: Model) -> None:
    with serving(cpu_artifact, "--queue", "1") as server:
        client = server.client()
        options: dict[str, Any] = {"model": model.info.name, "messages": QUESTION, "max_tokens": 3000}
        first = client.chat.completions.create(**options, stream=True)
        next(iter(first))
        second = threading.Thread(
            target=lambda: client.chat.completions.create(**{**options, "max_tokens": 1})
        )
        second.start()
        while health(server)["waiting"] < 1:
            time.sleep(0.01)
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(**options)
        assert int(caught.value.response.headers["Retry-After"]) >= 1
        first.close()
        second.join()
        wait_until_idle(server)


def test_key_is_demanded(cpu_artifact: Path, model: Model) -> None:
    refused = subprocess.run(
        [*RUN, "serve", str(cpu_artifact), "--host", "0.0.0.0"], capture_output=True, text=True
    )
    assert refused.returncode == 2 and "give an --api-key" in refused.stderr
    with serving(cpu_artifact, "--host", "0.0.0.0", "--api-key", "sesame") as server:
        with pytest.raises(openai.AuthenticationError, match="no valid API key"):
            server.client("wrong").models.list()
        assert [found.id for found in server.client("sesame").models.list()] == [model.info.name]
        assert health(server)["status"] == "ok"


def test_sigterm_lets_answers_finish(cpu_artifact: Path, model: Model) -> None:
    with serving(cpu_artifact) as server:
        stream = server.client().chat.completions.create(
            model=model.info.name, messages=QUESTION, max_tokens=300, stream=True, temperature=1, seed=3
        )
        chunks = [next(iter(stream))]
        server.process.send_signal(signal.SIGTERM)
        chunks += list(stream)
        assert chunks[-1].choices[0].finish_reason
        assert server.process.wait(timeout=20) == 0


def test_ctrl_c_ends_it(cpu_artifact: Path) -> None:
    with serving(cpu_artifact) as server:
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(timeout=20) == 130


def test_model_process_that_dies_is_started_again(cpu_artifact: Path, model: Model) -> None:
    with serving(cpu_artifact) as server:
        client = server.client()
        options: dict[str, Any] = {"model": model.info.name, "messages": QUESTION, "max_tokens": 3000}
        stream = client.chat.completions.create(**options, stream=True)
        next(iter(stream))
        children = psutil.Process(server.process.pid).children()
        [worker] = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(openai.APIError, match="the model's process ended"):
            list(stream)
        assert health(server)["status"] == "loading"
        deadline = time.monotonic() + 30
        while health(server)["status"] != "ok":
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert client.chat.completions.create(**{**options, "max_tokens": 2}).choices


def test_server_that_dies_takes_the_model_along(cpu_artifact: Path) -> None:
    with serving(cpu_artifact) as server:
        children = psutil.Process(server.process.pid).children()
        server.process.kill()
        _, alive = psutil.wait_procs(children, timeout=20)
        assert not alive


def test_port_that_is_taken(cpu_artifact: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        refused = subprocess.run(
            [*RUN, "serve", str(cpu_artifact), "--port", port], capture_output=True, text=True
        )
    assert refused.returncode == 2 and "choose another with --port" in refused.stderr
