"""Requests of other protocols than OpenAI's, each with its official client, checked; for `benchmarks.load`.

Each takes the server's address, a question as chat completions have it, a source of chance, and the seconds
after which it gives up, and returns how it ended.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from anthropic import Anthropic
from ollama import Client
from openai import OpenAI

_TOOL: Any = {
    "name": "look_up",
    "input_schema": {
        "type": "object",
        "properties": {"word": {"enum": ["assert", "yield"]}},
        "required": ["word"],
    },
}
_ONE_CALL = {"type": "any", "disable_parallel_tool_use": True}
_VARIANTS: list[dict[str, Any]] = [
    {},
    {"thinking": {"type": "adaptive"}},
    {"tools": [_TOOL], "tool_choice": _ONE_CALL},
]


def messages(url: str, question: Mapping[str, Any], rng: random.Random, patience: float) -> str:
    """Anthropic's, whole or streamed: text, a thought first, or a call."""
    client = Anthropic(base_url=url, api_key="unused", max_retries=0, timeout=patience)
    asked: Any = {"model": question["model"], "messages": question["messages"], "max_tokens": 60}
    asked |= {"extra_body": {"temperature": question["temperature"]}, **rng.choice(_VARIANTS)}
    if rng.random() < 0.5:
        answer = client.messages.create(**asked)
    else:
        with client.messages.stream(**asked) as stream:
            answer = stream.get_final_message()
    assert answer.stop_reason in ("end_turn", "max_tokens", "tool_use")
    assert 0 <= answer.usage.output_tokens <= 60
    if answer.stop_reason == "tool_use":
        assert answer.content[-1].type == "tool_use" and answer.content[-1].input["word"]
    return "answered"


def count_tokens(url: str, question: Mapping[str, Any], rng: random.Random, patience: float) -> str:
    client = Anthropic(base_url=url, api_key="unused", max_retries=0, timeout=patience)
    asked: Any = {"model": question["model"], "messages": question["messages"]}
    assert client.messages.count_tokens(**asked).input_tokens > 5
    return "answered"


def ollama_chat(url: str, question: Mapping[str, Any], rng: random.Random, patience: float) -> str:
    """Ollama's, whole, streamed, or left in the middle."""
    client = Client(host=url, timeout=patience)
    options = {"temperature": question["temperature"], "num_predict": 60}
    asked: Any = {"model": question["model"], "messages": question["messages"], "options": options}
    if rng.random() < 0.5:
        answer = client.chat(**asked)
        assert answer.done and answer.done_reason in ("stop", "length") and answer.eval_count is not None
        return "answered"
    chunks = client.chat(**asked, stream=True)
    if rng.random() < 0.3:
        next(chunks)
        chunks.close()  # type: ignore[attr-defined]
        return "left"
    *_, last = chunks
    assert last.done
    return "answered"


def embeddings(url: str, question: Mapping[str, Any], rng: random.Random, patience: float) -> str:
    """Of a few texts, in an artifact that can."""
    client = OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=patience)
    texts = [question["messages"][0]["content"]] * rng.randrange(1, 4)
    vectors = [
        entry.embedding for entry in client.embeddings.create(model=question["model"], input=texts).data
    ]
    assert len(vectors) == len(texts) and all(vector == vectors[0] for vector in vectors)
    return "answered"
