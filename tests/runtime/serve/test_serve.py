"""The server through the official `openai` client, over a real socket."""

from __future__ import annotations

import asyncio
import base64
import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
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
from PIL import Image
from qwen_runtime import Model, Sampling
from qwen_runtime.request import Request
from qwen_runtime.serve.engine import Engine
from qwen_runtime.serve.worker import ModelSettings

from tests.support.artifacts import float_profile, make_artifact
from tests.support.random_checkpoints import write_vision_checkpoint
from tests.support.servers import RUN, Server, serving

QUESTION = [{"role": "user", "content": "What is assert?"}]
GREEDY = Sampling(temperature=0)


def endless(artifact: Path) -> dict[str, int]:
    """`logit_bias` that rules out the tokens that end an answer: it goes on to `max_tokens`."""
    config = json.loads((artifact / "genai_config.json").read_text())
    return {str(token): -100 for token in config["model"]["eos_token_id"]}


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
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 30
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
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


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 10}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "properties": {
                "unit": {"type": "string", "enum": ["C", "F"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
                "exact": {"type": "boolean"},
            },
            "required": ["unit", "days"],
        },
    },
}


def function(name: str, **more: Any) -> Any:
    return {"type": "function", "function": {"name": name, **more}}


CLOCK = function("clock")


@pytest.mark.parametrize("thinking", [False, True])
def test_json_schema(ask: Callable[..., Any], thinking: bool) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": SCHEMA}}
    effort = "high" if thinking else "none"
    choice = ask(response_format=form, reasoning_effort=effort, max_tokens=600).choices[0]
    if thinking and choice.finish_reason == "length":
        assert choice.message.content is None  # it thought to the end
        return
    found = json.loads(choice.message.content)
    assert found.keys() == {"name", "age"} and isinstance(found["age"], int) and len(found["name"]) <= 10
    assert choice.finish_reason == "stop"


def test_schemas_with_characters_of_several_tokens(ask: Callable[..., Any], model: Model) -> None:
    assert len(model.encode("中")) > 1
    schema = {"type": "object", "properties": {"名": {"enum": ["中🙂"]}}, "required": ["名"]}
    schema["additionalProperties"] = False
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    choice = ask(response_format=form, max_tokens=60).choices[0]
    assert json.loads(choice.message.content) == {"名": "中🙂"} and choice.finish_reason == "stop"
    tool = function("look", parameters=schema)
    [call] = ask(tools=[tool], tool_choice=function("look"), max_tokens=90).choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == {"名": "中🙂"}


def test_json_object(ask: Callable[..., Any]) -> None:
    choice = ask(response_format={"type": "json_object"}, max_tokens=40, temperature=1, seed=1).choices[0]
    assert choice.message.content.startswith("{")
    assert choice.finish_reason == "length" or isinstance(json.loads(choice.message.content), dict)
    assert (
        ask(response_format={"type": "text"}).choices[0].message.content == ask().choices[0].message.content
    )


def test_schema_that_is_none(ask: Callable[..., Any]) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nope"}}}
    with pytest.raises(openai.BadRequestError, match="the guidance is not valid"):
        ask(response_format=form)


def test_tools_round_trip(ask: Callable[..., Any], model: Model) -> None:
    named = function("weather")
    first = ask(tools=[WEATHER, CLOCK], tool_choice=named, max_tokens=200).choices[0]
    assert first.finish_reason == "tool_calls"
    [call] = first.message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert call.function.name == "weather"
    assert arguments["unit"] in ("C", "F") and 1 <= arguments["days"] <= 9
    # What the model reads next is what it wrote, and the result.
    messages = [*QUESTION, first.message, {"role": "tool", "tool_call_id": call.id, "content": "rain"}]
    last = ask(messages=messages, tools=[WEATHER, CLOCK])
    plain = [
        *QUESTION,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": arguments}}],
        },
        {"role": "tool", "content": "rain"},
    ]
    expected = model.generate(plain, max_tokens=30, sampling=GREEDY, tools=[WEATHER, CLOCK])
    assert last.choices[0].message.content == "".join(expected)
    assert last.usage.prompt_tokens == expected.prompt_tokens


def test_tool_calls_are_streamed(ask: Callable[..., Any]) -> None:
    options: Any = {
        "tools": [WEATHER],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "max_tokens": 200,
    }
    whole = ask(**options).choices[0].message.tool_calls[0].function
    chunks = [chunk.choices[0] for chunk in ask(**options, stream=True)]
    deltas = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
    assert deltas[0].id and deltas[0].function.name == whole.name
    assert "".join(call.function.arguments for call in deltas) == whole.arguments
    assert len(deltas) >= 4  # the name, each argument, the end
    assert chunks[-1].finish_reason == "tool_calls"


def test_call_that_is_cut_off(ask: Callable[..., Any]) -> None:
    """As OpenAI has it: "length", and the arguments as far as they came."""
    options: Any = {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False}
    whole = ask(**options, max_tokens=200)
    [call] = whole.choices[0].message.tool_calls
    # No `</function>`, nor all of the last argument.
    options["max_tokens"] = whole.usage.completion_tokens - 8
    cut = ask(**options).choices[0]
    assert cut.finish_reason == "length"
    [begun] = cut.message.tool_calls
    assert begun.function.name == "weather"
    assert call.function.arguments.startswith(begun.function.arguments)
    assert len(begun.function.arguments) < len(call.function.arguments)
    chunks = [chunk.choices[0] for chunk in ask(**options, stream=True)]
    deltas = [delta for chunk in chunks for delta in chunk.delta.tool_calls or ()]
    assert "".join(delta.function.arguments for delta in deltas) == begun.function.arguments
    assert chunks[-1].finish_reason == "length"
    # An answer that stops there called nothing.
    stopped = ask(**{**options, "max_tokens": 200}, stop="</function>").choices[0]
    assert stopped.finish_reason == "stop"
    assert not stopped.message.tool_calls[0].function.arguments.endswith("}")


def test_tools_that_need_not_be_called(ask: Callable[..., Any], model: Model) -> None:
    told = "".join(model.generate(QUESTION, max_tokens=30, sampling=GREEDY, tools=[WEATHER]))
    assert ask(tools=[WEATHER]).choices[0].message.content == told
    unaware = ask(tools=[WEATHER], tool_choice="none").choices[0].message.content
    assert unaware == ask().choices[0].message.content


@pytest.mark.parametrize(
    "options,message",
    [
        ({"tool_choice": "required"}, "there are no tools"),
        ({"tools": [CLOCK], "tool_choice": function("x")}, "no tool 'x'"),
        ({"tools": [function("a b")]}, "tools.0.function.name"),
        ({"tools": [function("a", parameters={"properties": 5})]}, "properties"),
        (
            {"messages": [*QUESTION, {"role": "assistant", "tool_calls": [function("a", arguments="{")]}]},
            "not a JSON object",
        ),
    ],
)
def test_tools_that_are_refused(ask: Callable[..., Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        ask(**options)


def test_logprobs(ask: Callable[..., Any], client: OpenAI, model: Model) -> None:
    expected = model.generate(QUESTION, max_tokens=30, sampling=GREEDY, logprobs=2)
    list(expected)
    choice = ask(logprobs=True, top_logprobs=2).choices[0]
    assert [entry.token for entry in choice.logprobs.content] == [e.text for e in expected.logprobs]
    for found, entry in zip(choice.logprobs.content, expected.logprobs, strict=True):
        assert found.logprob == pytest.approx(entry.logprob, abs=1e-3) and found.logprob <= 0
        assert [other.token for other in found.top_logprobs] == [text for text, _ in entry.top]
        assert bytes(found.bytes).decode() == found.token
    streamed = [
        entry.token
        for chunk in ask(logprobs=True, stream=True)
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert streamed == [entry.text for entry in expected.logprobs]
    legacy = client.completions.create(
        model=model.info.name, prompt="The", max_tokens=8, temperature=0, logprobs=2
    ).choices[0]
    assert legacy.logprobs and legacy.logprobs.tokens and legacy.logprobs.text_offset
    assert "".join(legacy.logprobs.tokens) == legacy.text
    assert legacy.logprobs.text_offset[:2] == [0, len(legacy.logprobs.tokens[0])]
    assert ask().choices[0].logprobs is None


def test_logprobs_end_where_the_text_does(ask: Callable[..., Any], client: OpenAI, model: Model) -> None:
    """Nothing is told of a stop string, in the stream neither before it is known to be one."""

    def told(choices: list[Any]) -> list[str]:
        found = [choice.logprobs for choice in choices if choice.logprobs]
        return [entry.token for logprobs in found for entry in logprobs.content]

    options: dict[str, Any] = {"logprobs": True, "max_tokens": 12}
    whole = ask(**options).choices[0]
    tokens, text = told([whole]), whole.message.content
    for at in range(3, len(text) - 8, 5):
        stop = text[at : at + 7]
        shown = text[: text.index(stop)]
        expected = [token for n, token in enumerate(tokens) if len("".join(tokens[:n])) < len(shown)]
        assert told(ask(**options, stop=stop).choices) == expected
        chunks = [chunk.choices[0] for chunk in ask(**options, stop=stop, stream=True)]
        assert "".join(choice.delta.content or "" for choice in chunks) == shown
        assert told(chunks) == expected
    # A part that may begin the stop string is held back, and no part of it came of the last token but one.
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["a a a b"]}}}
    chunks = [
        chunk.choices[0]
        for chunk in ask(logprobs=True, response_format=form, stop=" a b", stream=True, max_tokens=20)
    ]
    assert told(chunks) == ['"', "a", " a"]
    plain: dict[str, Any] = {"model": model.info.name, "prompt": "The", "max_tokens": 12, "temperature": 0}
    legacy = client.completions.create(**plain, logprobs=0).choices[0]
    assert legacy.logprobs and legacy.logprobs.tokens and legacy.logprobs.text_offset
    at = legacy.logprobs.text_offset[4] + 1  # in the middle of a token
    stop = legacy.text[at : at + 9]
    stopped = client.completions.create(**plain, logprobs=0, stop=stop).choices[0]
    assert stopped.text == legacy.text[: legacy.text.index(stop)]
    assert stopped.logprobs and stopped.logprobs.tokens == legacy.logprobs.tokens[:5]
    stream = client.completions.create(**plain, logprobs=0, stop=stop, stream=True)
    pieces = [chunk.choices[0].logprobs for chunk in stream]
    assert [token for piece in pieces if piece for token in piece.tokens or ()] == stopped.logprobs.tokens


def test_text_offset_of_characters_in_several_tokens(client: OpenAI, model: Model) -> None:
    ids = model.encode("é x")
    assert len(ids) == 3
    options: dict[str, Any] = {"model": model.info.name, "prompt": "The", "max_tokens": 6, "logprobs": 0}
    options |= {"temperature": 2, "logit_bias": {str(token): 100 for token in ids}}
    options |= {"presence_penalty": 2, "frequency_penalty": 2}
    for seed in range(100):
        choice = client.completions.create(**options, seed=seed).choices[0]
        if "é x" in choice.text:
            break
    assert choice.logprobs and choice.logprobs.tokens and choice.logprobs.text_offset
    whole = 0
    for token, offset in zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True):
        if token == " x" and "é" in choice.text[:offset]:
            assert choice.text[offset:].startswith(token)
            whole += 1
    assert whole
    stream = client.completions.create(**options, seed=seed, stream=True)
    pieces = [chunk.choices[0].logprobs for chunk in stream]
    assert [at for piece in pieces if piece for at in piece.text_offset or ()] == choice.logprobs.text_offset


def test_penalties(ask: Callable[..., Any]) -> None:
    usual = ask(max_tokens=60).choices[0].message.content
    assert ask(max_tokens=60, presence_penalty=2, frequency_penalty=2).choices[0].message.content != usual


def test_min_p(ask: Callable[..., Any]) -> None:
    likeliest = ask(max_tokens=60).choices[0].message.content
    hot = {"max_tokens": 60, "temperature": 2, "top_p": 1, "seed": 1}
    assert ask(**hot, extra_body={"min_p": 1, "top_k": 0}).choices[0].message.content == likeliest
    assert ask(**hot, extra_body={"min_p": 0, "top_k": 0}).choices[0].message.content != likeliest


def test_next_turn_need_not_be_read_again(ask: Callable[..., Any], model: Model) -> None:
    messages: list[Any] = [{"role": "user", "content": "A list is mutable. " * 100}]
    first = ask(messages=messages)
    messages += [first.choices[0].message, *QUESTION]
    second = ask(messages=messages)
    assert second.usage.prompt_tokens_details.cached_tokens > 0.9 * first.usage.prompt_tokens
    plain = [messages[0], {"role": "assistant", "content": first.choices[0].message.content}, *QUESTION]
    assert second.choices[0].message.content == "".join(model.generate(plain, max_tokens=30, sampling=GREEDY))


def test_metrics(server: Server, ask: Callable[..., Any]) -> None:
    def read() -> dict[str, float]:
        text = request(server, "GET", "/metrics")[2].decode()
        lines = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, value in lines}

    before = read()
    answer = ask()
    request(server, "GET", "/v1/invented")
    after = read()

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert grown('qwen_edge_requests_total{path="/v1/chat/completions",status="200"}') == 1
    assert grown('qwen_edge_requests_total{path="other",status="404"}') == 1
    assert grown("qwen_edge_prompt_tokens_total") == answer.usage.prompt_tokens
    assert grown("qwen_edge_cached_prompt_tokens_total") == answer.usage.prompt_tokens_details.cached_tokens
    assert grown("qwen_edge_completion_tokens_total") == 30
    assert grown("qwen_edge_time_to_first_token_seconds_count") == 1
    assert after["qwen_edge_running"] == after["qwen_edge_waiting"] == 0
    assert after["process_resident_memory_bytes"] > 1e6


def test_health_answers_while_a_long_prompt_is_read(server: Server, client: OpenAI, model: Model) -> None:
    prompt = "word " * 8000
    reading = threading.Thread(
        target=lambda: client.completions.create(model=model.info.name, prompt=prompt, max_tokens=1)
    )
    reading.start()
    answers = 0
    while reading.is_alive():
        before = time.monotonic()
        answers += health(server)["running"]
        assert time.monotonic() - before < 1
    assert answers > 3  # all of them while it was read


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
        ({"logit_bias": {"1": 101}}, 400, "logit_bias.1: "),
        ({"logit_bias": {"100000000": 1}}, 400, "logit_bias has token 100000000"),
        ({"extra_body": {"min_p": 1.1}}, 400, "min_p: "),
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


def test_request_that_is_nested_too_deeply(server: Server, ask: Callable[..., Any]) -> None:
    """It harms no other, wherever on its way to the model it becomes too much."""
    for depth in (100, 300, 400, 500, 700, 900):
        arguments = '{"a":' * depth + "1" + "}" * depth
        call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
        messages = [*QUESTION, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "x"}]
        body = json.dumps({"messages": messages, "max_tokens": 1}).encode()
        status = request(server, "POST", "/v1/chat/completions", body)[0]
        assert status == (200 if depth == 100 else 400) or (depth < 500 and status == 200)
    wait_until_idle(server)
    assert ask(max_tokens=2).choices
    assert b"qwen_edge_model_restarts_total 0.0" in request(server, "GET", "/metrics")[2]


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


def test_busy_server_says_when_to_come_back(cpu_artifact: Path, model: Model) -> None:
    with serving(cpu_artifact, "--queue", "1") as server:
        client = server.client()
        options: dict[str, Any] = {"model": model.info.name, "messages": QUESTION, "max_tokens": 3000}
        options["logit_bias"] = endless(cpu_artifact)
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
        assert request(server, "GET", "/metrics")[0] == request(server, "GET", "/v1/models")[0] == 401
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
        options["logit_bias"] = endless(cpu_artifact)
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


REMOVED_DEVICE = """
# Stands for a CUDA device that is removed while it works: this install's CPU, claimed to be CUDA.
import onnxruntime_genai as og

cuda = []
og.is_cuda_available = lambda: True
og.Config.append_provider = lambda self, name: cuda.append(name)
og.Config.set_provider_option = lambda self, *option: None
generate_next_token = og.Generator.generate_next_token


def removed(self):
    if cuda:
        raise RuntimeError("CUDA failure 46: device is not available")
    generate_next_token(self)


og.Generator.generate_next_token = removed
"""


def test_removed_device_is_left_for_the_cpu(
    cpu_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(REMOVED_DEVICE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with serving(cpu_artifact, "--provider", "cuda") as server:
        client = server.client()
        assert health(server)["provider"] == "cuda"
        options: dict[str, Any] = {"model": "tiny-dense", "messages": QUESTION, "max_tokens": 8}
        for _ in range(2):
            with pytest.raises(openai.APIError):
                client.chat.completions.create(**options)
            until_healthy(server)
        assert health(server)["provider"] == "cpu"
        assert client.chat.completions.create(**options).choices[0].message.content


def until_healthy(server: Server) -> None:
    """Wait until the model's process is gone and there again."""
    deadline = time.monotonic() + 30
    while health(server)["status"] == "ok" and time.monotonic() < deadline - 28:
        time.sleep(0.05)
    while health(server)["status"] != "ok":
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_server_that_dies_takes_the_model_along(cpu_artifact: Path) -> None:
    with serving(cpu_artifact) as server:
        children = psutil.Process(server.process.pid).children()
        server.process.kill()
        _, alive = psutil.wait_procs(children, timeout=20)
        assert not alive


def test_job_before_the_engine_attends(cpu_artifact: Path) -> None:
    """A request may see that the model is there again before the loop takes up its events."""

    async def ask() -> str:
        engine = Engine(ModelSettings(cpu_artifact))
        engine.load()
        asking = asyncio.create_task(engine.submit(Request("The", max_tokens=2)))
        await asyncio.sleep(0)
        running = asyncio.create_task(engine.supervise())
        try:
            answer = await asyncio.wait_for(asking, 20)
            return "".join([piece.text async for piece in answer])
        finally:
            running.cancel()
            engine.close()

    assert asyncio.run(ask())


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

        def held() -> bool:
            return any(
                found.raddr and found.raddr.port == reader.getsockname()[1]
                for found in process.net_connections("tcp")
            )

        deadline = time.monotonic() + 60
        for state in (True, False):
            while held() != state:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        wait_until_idle(server)


IMPATIENT = """
import qwen_runtime.serve.http as http

http.HEAD_TIMEOUT = 0.5
http.BODY_TIMEOUT = 1.0
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

        def answered(*pieces: bytes, pause: float = 0.1) -> list[str]:
            """The statuses of all answers before the server closes the connection."""
            with socket.create_connection(address, timeout=8) as client:
                for piece in pieces:
                    client.sendall(piece)
                    time.sleep(pause)
                received = b"".join(iter(lambda: client.recv(65536), b""))
            return re.findall(r"HTTP/1\.1 (\d+)", received.decode())

        assert answered() == []
        assert answered(get) == []
        assert answered(get + b"\r\n", get) == ["200"]
        assert answered(get + length, b"{") == ["200"]  # half of a body that nobody reads
        assert answered(post + length + body[:50]) == ["408"]
        last = b"Connection: close\r\n"
        pieces = [body[at : at + 400] for at in range(0, len(body), 400)]
        assert answered(post + last + length, *pieces) == ["200"]  # takes 1.5 seconds
        assert answered(get + b"\r\n", *[get + b"\r\n"] * 3, get + last + b"\r\n", pause=0.2) == ["200"] * 5


def test_ipv6(cpu_artifact: Path) -> None:
    with serving(cpu_artifact, "--host", "::1") as server:
        assert health(server)["status"] == "ok"
        assert request(server, "GET", "/health", Host="evil.example")[0] == 400


def test_port_that_is_taken(cpu_artifact: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        refused = subprocess.run(
            [*RUN, "serve", str(cpu_artifact), "--port", port], capture_output=True, text=True
        )
    assert refused.returncode == 2 and "choose another with --port" in refused.stderr


@pytest.fixture(scope="module")
def vision_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint = write_vision_checkpoint(tmp_path_factory.mktemp("checkpoint"))
    output = tmp_path_factory.mktemp("vision") / "float"
    return make_artifact(checkpoint, float_profile("fused"), output, all_logits=False)


def test_images(vision_artifact: Path) -> None:
    file = io.BytesIO()
    Image.effect_noise((200, 150), 80).convert("RGB").save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()

    def asking(url: str) -> list[Any]:
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is this?"}]
        return [{"role": "user", "content": parts}]

    with Model.load(vision_artifact) as model:
        expected = model.generate(asking(url), max_tokens=20, sampling=GREEDY)
        text = "".join(expected)
    with serving(vision_artifact) as server:
        options: Any = {"model": model.info.name, "max_tokens": 20, "temperature": 0}
        client = server.client()
        answer = client.chat.completions.create(messages=asking(url), **options)
        assert answer.choices[0].message.content == text
        assert answer.usage and answer.usage.prompt_tokens == expected.prompt_tokens
        stream = client.chat.completions.create(messages=asking(url), stream=True, **options)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == text
        for bad, message in [
            ("https://example.org/a.png", "not a data URL"),
            ("file:///etc/passwd", "not a data URL"),
            ("data:image/png;base64,AAAA", "image"),
            ("data:image/png;base64,!", "not valid base64"),
        ]:
            with pytest.raises(openai.BadRequestError, match=message):
                client.chat.completions.create(messages=asking(bad), **options)
        text_only = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
        assert client.chat.completions.create(messages=text_only, **options).choices  # type: ignore[arg-type]


def test_text_models_take_no_images(ask: Callable[..., Any]) -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    with pytest.raises(openai.BadRequestError, match="takes no images"):
        ask(messages=[{"role": "user", "content": [part]}])
    for name in ("image", "input_audio"):
        with pytest.raises(openai.BadRequestError, match=r"messages\.0\.content"):
            ask(messages=[{"role": "user", "content": [{"type": name, name: "/etc/passwd"}]}])


def test_kiosk_page(cpu_artifact: Path) -> None:
    with serving(cpu_artifact, "--kiosk") as server:
        status, headers, _ = request(server, "GET", "/")
        assert (status, headers["location"]) == (307, "/?kiosk")
        status, _, page = request(server, "GET", "/?kiosk&idle=60")
        assert status == 200 and b"<html" in page
        assert request(server, "GET", "/app.js")[0] == 200
