"""Requests that are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from qwen_runtime import Model
from qwen_runtime.serve.schema import unsupported

from tests.support.servers import Server, request

QUESTION = [{"role": "user", "content": "What is assert?"}]


@pytest.mark.parametrize(
    "options,status,message",
    [
        ({"n": 0}, 400, "n: "),
        ({"stop": ["x"] * 1001}, 400, "stop: List should have at most 1000 items"),
        (
            {"extra_body": {"thinking": {"type": "enabled", "budget_tokens": 9}}},
            400,
            "thinking.budget_tokens",
        ),
        ({"extra_body": {"reasoning": {"max_tokens": 9}}}, 400, "reasoning.max_tokens"),
        ({"extra_body": {"stop_token_ids": [10**8]}}, 400, "stop_token_ids has 100000000"),
        ({"extra_body": {"best_of": 3}}, 400, "best_of: only 1 is supported"),
        ({"extra_body": {"mirostat": 2}}, 400, "mirostat: only 0 is supported"),
        ({"extra_body": {"grammar": 'root ::= "a"'}}, 400, 'grammar: only "" is supported'),
        ({"max_tokens": 0}, 400, "max_tokens: "),
        ({"temperature": 3}, 400, "temperature: "),
        ({"messages": []}, 400, "messages: "),
        ({"messages": [{"role": "king", "content": ""}]}, 400, "messages.0.role: "),
        ({"messages": [{"role": "user", "content": "word " * 9000}]}, 400, "the context is 8192: shorten it"),
        ({"logit_bias": {"1": 101}}, 400, "logit_bias.1: "),
        ({"logit_bias": {"100000000": 1}}, 400, "logit_bias has token 100000000"),
        ({"extra_body": {"min_p": 1.1}}, 400, "min_p: "),
        ({"max_tokens": 12.5}, 400, "max_tokens: "),
        ({"messages": [{"role": "user", "content": 5}]}, 400, "messages.0.content: "),
        ({"messages": [{"role": "user"}, {"content": "a"}]}, 400, "messages.1.role: Field required"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}, {"type": "audio"}]}]},
            400,
            "messages.0.content.1: type 'audio' is not supported, only 'text', 'image_url'",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            400,
            "messages.0.content.0.image_url.url: Field required",
        ),
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


def test_numbers_and_nulls_as_clients_write_them(ask: Callable[..., Any]) -> None:
    """JSON has one kind of number, and `null` leaves a field out. Many stops are no fault either."""
    whole = ask(max_tokens=12).choices[0].message.content
    nulls = {
        "stream": None,
        "stream_options": None,
        "n": None,
        "tools": None,
        "best_of": None,
        "logprobs": None,
    }
    odd = {**nulls, "max_tokens": 12.0, "seed": 7.0, "top_k": 20.0, "user": "somebody", "nobody_knows": [1]}
    assert ask(extra_body=odd).choices[0].message.content == whole
    stops = [f"never {number}" for number in range(40)]
    assert ask(max_tokens=12, stop=[*stops, whole[8:]]).choices[0].message.content == whole[:8]


def test_prompt_that_is_too_long(server: Server) -> None:
    """Agents shorten it when they read this code, and by how much."""
    for path, body in {
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "word " * 9000}]},
        "/v1/completions": {"prompt": "word " * 9000},
    }.items():
        status, _, text = request(server, "POST", path, json.dumps(body).encode())
        error = json.loads(text)["error"]
        assert (status, error["code"], error["n_ctx"]) == (400, "context_length_exceeded", 8192)
        assert error["n_prompt_tokens"] > 8999 and str(error["n_prompt_tokens"]) in error["message"]


def test_page_names_what_is_refused() -> None:
    page = (Path(__file__).parents[3] / "docs" / "server.md").read_text(encoding="utf-8")
    for name in {**unsupported.CHAT, **unsupported.COMPLETIONS, **unsupported.RESPONSES}:
        assert f"`{name}`" in page, f"docs/server.md does not name {name}"
