"""Eight clients that behave badly, for five minutes: does the server stay up, and its memory flat?

Half of the requests are proper chats, whole or streamed, and each answer is checked. The others leave in the
middle, read slowly, or send what no server should take. At the end nothing may be running or waiting.

    python -m benchmarks.load ARTIFACT [--minutes 5] [--clients 8] [--kill-every 45] [-- --state-dir DIR ...]

With --kill-every the model's process is killed again and again: requests at work may end with an error then,
and no answer may be wrong. A request that takes longer than --late seconds is counted as late, which may be
nobody's fault on a busy machine; one that takes longer than --patience as never answered, which is wrong.
What follows -- are options of `qwen-run serve`. Of several models (`-- --model other=FOLDER`) each question
asks one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anthropic
import httpx
import ollama
import openai

from benchmarks.support import protocols
from benchmarks.support.serving import Sample, print_flatness, served, watch

_KILLED = ("process ended", "loaded again", "incomplete chunked read", "peer closed connection")
_WORDS = ["assert", "yield", "list", "class", "with", "numbers", "import", "lambda", "string", "context"]
_TOOL = {
    "type": "function",
    "name": "look_up",
    "parameters": {
        "type": "object",
        "properties": {"word": {"enum": ["assert", "yield"]}},
        "required": ["word"],
    },
    "strict": True,
}


@dataclass
class Load:
    """What the clients share.

    Attributes:
        models: names of the served models.
        embeds: those of them that make embeddings.
        kills: whether the model's process is killed meanwhile.
        late, patience: seconds after which a request is late, and those after which it was never answered.
        seen: how often each kind of request ended in which way.
        took: seconds of each request.
        wrong: what should not have happened.
    """

    url: str
    models: list[str]
    embeds: list[str]
    until: float
    kills: bool
    late: float
    patience: float
    seen: Counter[str] = field(default_factory=Counter)
    took: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def host(self) -> tuple[str, int]:
        host, port = self.url.removeprefix("http://").split(":")
        return host, int(port)

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key="unused", max_retries=0, timeout=self.patience, **options
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--kill-every", type=float, metavar="SECONDS", help="kill the model's process")
    parser.add_argument("--late", type=float, default=120.0, metavar="SECONDS")
    parser.add_argument("--patience", type=float, default=600.0, metavar="SECONDS")
    arguments = sys.argv[1:]
    end = arguments.index("--") if "--" in arguments else len(arguments)
    asked, options = parser.parse_args(arguments[:end]), arguments[end + 1 :]
    with served(asked.artifact, ["--queue", "4", *options]) as (url, server):
        models = [model.id for model in openai.OpenAI(base_url=f"{url}/v1", api_key="unused").models.list()]
        shown = {model: ollama.Client(host=url).show(model).capabilities or [] for model in models}
        embeds = [model for model, capabilities in shown.items() if "embedding" in capabilities]
        until = time.monotonic() + 60 * asked.minutes
        load = Load(url, models, embeds, until, bool(asked.kill_every), asked.late, asked.patience)
        threads = [
            threading.Thread(target=_client, args=(load, seed), daemon=True) for seed in range(asked.clients)
        ]
        for thread in threads:
            thread.start()
        samples, kills = watch(server.pid, threads, asked.kill_every, until + asked.patience)
        # A stream's comments keep its connection alive, whether or not an answer comes.
        load.wrong += ["a stream: never answered" for thread in threads if thread.is_alive()]
        _report(load, samples, kills, server)
    sys.exit(1 if load.wrong or server.returncode else 0)


def _client(load: Load, seed: int) -> None:
    rng = random.Random(seed)
    names, weights = zip(*_WEIGHTS.items(), strict=True)
    while time.monotonic() < load.until:
        kind: Callable[[Load, random.Random], str] = rng.choices(names, weights)[0]
        name, begun = kind.__name__.strip("_"), time.monotonic()
        try:
            outcome = kind(load, rng)
        except Exception as error:
            if load.kills and _is_of_a_kill(error):
                outcome = "ended by a kill"
                time.sleep(rng.uniform(0.2, 1))
            elif isinstance(
                error,
                TimeoutError | openai.APITimeoutError | anthropic.APITimeoutError | httpx.TimeoutException,
            ):
                outcome = "never answered"
                load.wrong.append(f"{name}: never answered in {load.patience:.0f} seconds")
            elif getattr(error, "status_code", None) != 429:
                outcome = "wrong"
                load.wrong.append(f"{name}: {type(error).__name__}: {error}"[:300])
            else:
                outcome = "429"
                if isinstance(error, openai.APIStatusError) and "Retry-After" not in error.response.headers:
                    load.wrong.append(f"{name}: 429 without Retry-After")
                time.sleep(rng.uniform(0.05, 0.5))
        load.took.append(time.monotonic() - begun)
        load.seen[f"{name}: {outcome}"] += 1


def _is_of_a_kill(error: Exception) -> bool:
    """Whether a request failed because the model's process ended: before the answer, or in its middle."""
    return getattr(error, "status_code", None) in (500, 503) or any(part in str(error) for part in _KILLED)


def _chat(load: Load, rng: random.Random) -> str:
    answer = load.client().chat.completions.create(**_question(load, rng))
    [choice] = answer.choices
    assert choice.finish_reason in ("stop", "length") and answer.usage
    assert 0 < answer.usage.completion_tokens <= 60
    return "answered"


def _stream(load: Load, rng: random.Random) -> str:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(load.client().chat.completions.create(**_question(load, rng), **options))
    assert [c.choices[0].finish_reason for c in chunks[:-1] if c.choices[0].finish_reason] in (
        ["stop"],
        ["length"],
    )
    assert chunks[-1].usage and chunks[-1].usage.completion_tokens <= 60
    return "answered"


def _turns(load: Load, rng: random.Random) -> str:
    messages: list[Any] = []
    for _ in range(3):
        messages.append({"role": "user", "content": _words(rng, 30)})
        answer = load.client().chat.completions.create(**{**_question(load, rng), "messages": messages})
        messages.append({"role": "assistant", "content": answer.choices[0].message.content or ""})
    return "answered"


def _json(load: Load, rng: random.Random) -> str:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "maximum": 99}, "ok": {"type": "boolean"}},
        "required": ["n", "ok"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    answer = load.client().chat.completions.create(**_question(load, rng), response_format=form)
    found = json.loads(answer.choices[0].message.content or "")
    assert found.keys() == {"n", "ok"}
    return "answered"


def _responses(load: Load, rng: random.Random) -> str:
    answer = load.client().responses.create(**_response_question(load, rng))
    return _check_response(answer)


def _responses_stream(load: Load, rng: random.Random) -> str:
    events = list(load.client().responses.create(**_response_question(load, rng), stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created"
    return _check_response(events[-1].response)


def _check_response(answer: Any) -> str:
    assert answer.status in ("completed", "incomplete") and answer.usage
    assert 0 < answer.usage.output_tokens <= 60
    assert all(item.type in ("message", "reasoning", "function_call") for item in answer.output)
    for item in answer.output:
        if item.type == "function_call" and answer.status == "completed":
            assert item.name == "look_up" and "word" in json.loads(item.arguments)
    return "answered"


def _leave_responses(load: Load, rng: random.Random) -> str:
    question = {**_response_question(load, rng), "max_output_tokens": 4000}
    stream = load.client().responses.create(**question, stream=True)
    for _, _ in zip(range(rng.randrange(10)), stream, strict=False):
        pass
    stream.close()
    return "left"


def _leave_stream(load: Load, rng: random.Random) -> str:
    stream = load.client().chat.completions.create(
        **{**_question(load, rng), "max_tokens": 4000}, stream=True
    )
    for _, _ in zip(range(rng.randrange(10)), stream, strict=False):
        pass
    stream.close()
    return "left"


def _leave_waiting(load: Load, rng: random.Random) -> str:
    client = load.client().with_options(timeout=rng.uniform(0.01, 1))
    try:
        client.chat.completions.create(**{**_question(load, rng), "max_tokens": 4000})
    except openai.APITimeoutError:
        return "left"
    return "answered"


def _leave_long_prompt(load: Load, rng: random.Random) -> str:
    client = load.client().with_options(timeout=rng.uniform(0.05, 1))
    try:
        client.completions.create(model=load.models[0], prompt=_words(rng, 3000), max_tokens=4000)
    except openai.APITimeoutError:
        return "left"
    return "answered"


def _read_slowly(load: Load, rng: random.Random) -> str:
    body = json.dumps({**_question(load, rng), "stream": True}).encode()
    with socket.create_connection(load.host, timeout=load.patience) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        connection.sendall(_head(len(body)) + body)
        received = b""
        while (part := connection.recv(512)) and b"data: [DONE]" not in received[-2000:] + part:
            received += part
            time.sleep(0.01)
    status = _status(received)
    assert status in ("200", "429"), received[:200]
    end = (received + part)[-2000:]
    assert status == "429" or b"data: [DONE]" in end, end
    return "answered" if status == "200" else "429"


def _send_rubbish(load: Load, rng: random.Random) -> str:
    body = rng.choice(
        [
            b"{",
            b"\xff\xfe\x00",
            b"[" * 10_000,
            b'{"messages": [], "model": 5}',
            b'{"messages": [{"role": "king"}]}',
            b'{"input": [{"type": "message"}]}',
            b'{"input": "x", "background": true}',
        ]
    )
    path = "responses" if b"input" in body else rng.choice(["chat/completions", "completions", "responses"])
    return _expect(load, _head(len(body), path) + body, "400")


def _send_too_much(load: Load, rng: random.Random) -> str:
    return _expect(load, _head(40_000_000) + b" " * 34_000_000, "413")


def _send_bad_image(load: Load, rng: random.Random) -> str:
    url = rng.choice(
        ["https://example.org/a.png", "data:image/png;base64,AAAA", "data:image/png;base64,?", "x"]
    )
    if rng.random() < 0.5:
        path, parts = "responses", [{"type": "input_image", "image_url": url}]
    else:
        path, parts = "chat/completions", [{"type": "image_url", "image_url": {"url": url}}]
    field = "input" if path == "responses" else "messages"
    body = json.dumps({field: [{"role": "user", "content": parts}]}).encode()
    return _expect(load, _head(len(body), path) + body, "400", "429")


def _hang_up(load: Load, rng: random.Random) -> str:
    with socket.create_connection(load.host, timeout=load.patience) as connection:
        connection.sendall(_head(1000)[: rng.randrange(1, 150)])
    return "left"


def _messages(load: Load, rng: random.Random) -> str:
    return protocols.messages(load.url, _question(load, rng), rng, load.patience)


def _count_tokens(load: Load, rng: random.Random) -> str:
    return protocols.count_tokens(load.url, _question(load, rng), rng, load.patience)


def _ollama_chat(load: Load, rng: random.Random) -> str:
    return protocols.ollama_chat(load.url, _question(load, rng), rng, load.patience)


def _embeddings(load: Load, rng: random.Random) -> str:
    if not load.embeds:
        return "not asked"
    return protocols.embeddings(
        load.url, {**_question(load, rng), "model": rng.choice(load.embeds)}, rng, load.patience
    )


_WEIGHTS = {
    _chat: 15, _stream: 15, _responses: 5, _responses_stream: 5, _turns: 5, _json: 5,
    _leave_stream: 10, _leave_responses: 5, _leave_waiting: 10, _leave_long_prompt: 5, _read_slowly: 5,
    _messages: 15, _count_tokens: 5, _ollama_chat: 10, _embeddings: 5,
    _send_rubbish: 10, _send_too_much: 2, _send_bad_image: 5, _hang_up: 5,
}  # fmt: skip


def _question(load: Load, rng: random.Random) -> dict[str, Any]:
    messages = [{"role": "user", "content": _words(rng, rng.randrange(1, 200))}]
    return {
        "model": rng.choice(load.models),
        "messages": messages,
        "max_tokens": 60,
        "temperature": rng.choice([0, 0.7]),
    }


def _response_question(load: Load, rng: random.Random) -> dict[str, Any]:
    """In one of four cases with a thought first, in another with a call that is demanded."""
    question = _question(load, rng)
    asked: dict[str, Any] = {
        "model": question["model"],
        "input": question["messages"],
        "max_output_tokens": question["max_tokens"],
        "temperature": question["temperature"],
    }
    more = rng.choice(
        [{}, {}, {"reasoning": {"effort": "high"}}, {"tools": [_TOOL], "tool_choice": "required"}]
    )
    return {**asked, **more}


def _words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choices(_WORDS, k=count))


def _head(length: int, path: str = "chat/completions") -> bytes:
    return (
        f"POST /v1/{path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {length}\r\nConnection: close\r\n\r\n"
    ).encode()


def _expect(load: Load, request: bytes, *statuses: str) -> str:
    with socket.create_connection(load.host, timeout=load.patience) as connection:
        with contextlib.suppress(OSError):  # the server may answer, and close, before all was sent
            connection.sendall(request)
        try:
            received = connection.recv(65536)
        except ConnectionResetError:
            return "reset"
    status = _status(received) if received else "nothing"
    assert status in statuses, received[:200]
    return status


def _status(received: bytes) -> str:
    """Raises:
    Unavailable: the model's process has just died.
    """
    status = received.split(b" ", 2)[1].decode()
    if status in ("500", "503"):
        raise Unavailable(received[-300:])
    return status


class Unavailable(Exception):
    """A request was refused as of a kill."""

    status_code = 503


def _report(load: Load, samples: list[Sample], kills: int, server: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + load.late
    while (state := _health(load))["running"] or state["waiting"]:
        if time.monotonic() > deadline:
            load.wrong.append(f"still at work {load.late:.0f} seconds after the last client: {state}")
            break
        time.sleep(0.2)
    if server.poll() is not None:
        load.wrong.append(f"the server ended with {server.returncode}")
    metrics = load.client()._client.get(f"{load.url}/metrics").text
    restarts = re.search(r"^qwen_edge_model_restarts_total (\S+)", metrics, re.MULTILINE)
    if restarts is None or float(restarts[1]) > kills:
        load.wrong.append(f"restarts of the model's process: {restarts and restarts[1]}, kills: {kills}")
    for name, count in sorted(load.seen.items()):
        print(f"{count:6}  {name}")
    print_flatness(samples)
    if kills:
        print(f"{kills} times the model's process was killed")
    late = sum(seconds > load.late for seconds in load.took)
    print(f"{late} took longer than {load.late:.0f} seconds, the longest {max(load.took):.0f}")
    print(f"{sum(load.seen.values())} requests, {len(load.wrong)} that went wrong")
    for line in load.wrong[:20]:
        print(" ", line)


def _health(load: Load) -> dict[str, Any]:
    return dict(load.client()._client.get(f"{load.url}/health").json())


if __name__ == "__main__":
    main()
