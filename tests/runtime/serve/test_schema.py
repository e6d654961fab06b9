"""Requests that are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import openai
import pytest
from openai import OpenAI
from qwen_runtime import Model

QUESTION = [{"role": "user", "content": "What is assert?"}]


@pytest.mark.parametrize(
    "options,status,message",
    [
        ({"n": 2}, 400, "n: only 1 is supported"),
        ({"max_tokens": 0}, 400, "max_tokens: "),
        ({"temperature": 3}, 400, "temperature: "),
        ({"messages": []}, 400, "messages: "),
        ({"messages": [{"role": "king", "content": ""}]}, 400, "messages.0.role: "),
        ({"messages": [{"role": "user", "content": "word " * 9000}]}, 400, "the context is 8192: shorten it"),
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
