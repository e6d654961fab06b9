"""A server that decodes speculatively, against the model on its own."""

from __future__ import annotations

import json
import re
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from openai.types import CompletionUsage
from qwen_runtime import Model, Sampling

from tests.support.servers import Server, serving

TEXT = "The global statement is a declaration which holds for the entire code block. " * 5
MESSAGES: list[dict[str, Any]] = [{"role": "user", "content": TEXT}]
SCHEMA = {
    "type": "object",
    "properties": {
        "words": {"type": "array", "items": {"enum": ["one", "two"]}, "minItems": 6, "maxItems": 6}
    },
    "required": ["words"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def exact(cpu_artifact: Path) -> Iterator[Server]:
    with serving(cpu_artifact, "--speculative", "--exact", "--parallel", "2") as running:
        yield running


def streamed(client: OpenAI, **options: Any) -> str:
    stream = client.chat.completions.create(
        model="any", messages=MESSAGES, **{"temperature": 0, "max_tokens": 60, "stream": True, **options}
    )
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


def test_streams_and_stops(exact: Server, model: Model) -> None:
    expected = model.generate(MESSAGES, max_tokens=60, sampling=Sampling(temperature=0)).run()
    client = exact.client()
    assert streamed(client) == expected
    stop = expected[20:24]
    assert streamed(client, stop=stop) == expected.partition(stop)[0]
    raw = urllib.request.urlopen(f"{exact.url}/metrics").read().decode()
    drafted, accepted = (
        float(re.findall(rf"^qwen_edge_{name}_tokens_total (\S+)", raw, re.M)[0])
        for name in ("drafted", "accepted")
    )
    assert drafted >= accepted >= 0


def test_two_answers_at_a_time(exact: Server, model: Model) -> None:
    expected = model.generate(MESSAGES, max_tokens=60, sampling=Sampling(temperature=0)).run()
    found: list[str] = []
    client = exact.client()
    threads = [threading.Thread(target=lambda: found.append(streamed(client))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected, expected]


def test_answers_are_held_to_a_schema(exact: Server) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "words", "schema": SCHEMA}}
    options: dict[str, Any] = {"response_format": form, "temperature": 1, "seed": 1, "max_tokens": 200}
    words = json.loads(streamed(exact.client(), **options))["words"]
    assert len(words) == 6 and set(words) <= {"one", "two"}


def test_a_prediction_is_drafted_from(exact: Server, model: Model) -> None:
    """As OpenAI's editors send the file that they have; it changes no answer."""
    question = [{"role": "user", "content": "What is assert?"}]
    expected = model.generate(question, max_tokens=60, sampling=Sampling(temperature=0)).run()

    def accepted() -> float:
        raw = urllib.request.urlopen(f"{exact.url}/metrics").read().decode()
        return float(re.findall(r"^qwen_edge_accepted_tokens_total (\S+)", raw, re.M)[0])

    def usage(found: CompletionUsage | None) -> tuple[int, int]:
        details = found and found.completion_tokens_details
        assert details is not None
        assert details.accepted_prediction_tokens is not None
        assert details.rejected_prediction_tokens is not None
        return details.accepted_prediction_tokens, details.rejected_prediction_tokens

    client, counts = exact.client(), [accepted()]
    parts = [{"type": "text", "text": expected[:90]}, {"type": "text", "text": expected[90:]}]
    for content in ("Nothing of the kind.", parts):
        prediction: Any = {"type": "content", "content": content}
        found = client.chat.completions.create(
            model="any", messages=question, prediction=prediction, temperature=0, max_tokens=60
        )
        assert found.choices[0].message.content == expected
        counts.append(accepted())
        of_prediction, _ = usage(found.usage)
        assert of_prediction <= counts[-1] - counts[-2]
        *_, last = client.chat.completions.create(
            model="any",
            messages=question,
            prediction=prediction,
            temperature=0,
            max_tokens=60,
            stream=True,
            stream_options={"include_usage": True},
        )
        assert min(usage(last.usage)) >= 0
        counts[-1] = accepted()
    assert counts[2] >= counts[1] >= counts[0]


def test_history_is_not_read_again(exact: Server) -> None:
    client = exact.client()
    turn = [*MESSAGES, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Why?"}]
    for messages in (MESSAGES, turn):
        answer = client.chat.completions.create(model="any", messages=messages, max_tokens=8, temperature=0)
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    assert (answer.usage.prompt_tokens_details.cached_tokens or 0) > 50


def test_fast_answers(cpu_artifact: Path) -> None:
    with serving(cpu_artifact, "--speculative") as server:
        assert len(streamed(server.client(), temperature=1)) > 0
        assert streamed(server.client(), logprobs=True, top_logprobs=2)
