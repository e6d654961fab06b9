"""`/v1/chat/completions` through the official `openai` client, over a real socket."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from PIL import Image
from qwen_profiles.schema import load_profile
from qwen_runtime import Model, Sampling

from benchmarks.support.checkpoints import TINY_VL
from tests.support.exported import Exported
from tests.support.servers import Server, endless, request, serving

QUESTION = [{"role": "user", "content": "What is assert?"}]
GREEDY = Sampling(temperature=0)


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
        {"extra_body": {"reasoning": {"effort": "low"}}},
        {"extra_body": {"thinking": {"type": "enabled"}}},
        {"extra_body": {"enable_thinking": True, "thinking": {"type": "disabled"}}},
    ):
        message = ask(**options).choices[0].message
        thoughts, _, said = text.partition("</think>")
        assert (message.reasoning_content, message.content) == (thoughts.strip(), said.strip() or None)
    assert not hasattr(ask(reasoning_effort="none").choices[0].message, "reasoning_content")


def test_logprobs(ask: Callable[..., Any], client: OpenAI, model: Model) -> None:
    expected = model.generate(QUESTION, max_tokens=30, sampling=GREEDY, logprobs=2)
    list(expected)
    choice = ask(logprobs=True, top_logprobs=2).choices[0]
    assert [entry.token for entry in choice.logprobs.content] == [e.text for e in expected.logprobs]
    for found, entry in zip(choice.logprobs.content, expected.logprobs, strict=True):
        assert found.logprob == pytest.approx(entry.logprob, abs=1e-3) and found.logprob <= 0
        assert [other.token for other in found.top_logprobs] == [other.text for other in entry.top]
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


def test_images(exported: Exported) -> None:
    artifact = exported(TINY_VL, load_profile("cpu"))
    file = io.BytesIO()
    Image.effect_noise((200, 150), 80).convert("RGB").save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()

    def asking(url: str) -> list[Any]:
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is this?"}]
        return [{"role": "user", "content": parts}]

    with Model.load(artifact) as model:
        expected = model.generate(asking(url), max_tokens=20, sampling=GREEDY)
        text = "".join(expected)
    with serving(artifact) as server:
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


def test_several_answers(ask: Callable[..., Any]) -> None:
    hot: dict[str, Any] = {"temperature": 1, "max_tokens": 8, "n": 3}
    answer = ask(**hot, seed=2**31 - 2)
    texts = [choice.message.content for choice in answer.choices]
    seeds = (2**31 - 2, 2**31 - 1, 0)
    assert texts == [ask(**{**hot, "n": 1}, seed=seed).choices[0].message.content for seed in seeds]
    assert len(set(texts)) == 3 and [choice.index for choice in answer.choices] == [0, 1, 2]
    alone = ask(max_tokens=1).usage.prompt_tokens
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (alone, 24)
    streamed = ["", "", ""]
    for chunk in ask(**hot, seed=2**31 - 2, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts
    assert len({choice.message.content for choice in ask(**hot).choices}) == 3  # without a seed too


def test_prompt_of_several_answers_is_read_once(server: Server, ask: Callable[..., Any]) -> None:
    def cached() -> float:
        text = request(server, "GET", "/metrics")[2].decode()
        return float(re.findall(r"^qwen_edge_cached_prompt_tokens_total (\S+)", text, re.M)[0])

    before = cached()
    messages = [{"role": "user", "content": "A tuple is not mutable. " * 60}]
    answer = ask(messages=messages, n=3, temperature=1, max_tokens=5)
    assert cached() - before > 1.8 * answer.usage.prompt_tokens


def test_bytes_of_tokens_join_to_the_text(ask: Callable[..., Any], model: Model) -> None:
    """Where a character has several tokens too."""
    ids = model.encode("é x中")
    bias = {str(token): 100 for token in ids}
    hot = {"temperature": 2, "logit_bias": bias, "presence_penalty": 2, "max_tokens": 12, "top_logprobs": 3}
    choice = ask(**hot, logprobs=True, seed=3).choices[0]
    entries = choice.logprobs.content
    joined = b"".join(bytes(entry.bytes) for entry in entries)
    assert joined.decode(errors="replace") == choice.message.content
    assert any(entry.token == "\ufffd" for entry in entries)
    for entry in entries:
        for other in entry.top_logprobs:
            assert bytes(other.bytes).decode(errors="replace") == other.token


def test_lengths_and_ends(ask: Callable[..., Any], cpu_artifact: Path) -> None:
    urged = {"logit_bias": dict.fromkeys(endless(cpu_artifact), 50), "max_tokens": 9}
    assert ask(**urged).usage.completion_tokens == 0
    assert ask(**urged, extra_body={"min_tokens": 4}).usage.completion_tokens == 4
    assert ask(**urged, extra_body={"ignore_eos": True}).usage.completion_tokens == 9
    # A grammar that is complete leaves nothing else.
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [1]}}}
    choice = ask(response_format=form, extra_body={"min_tokens": 9, "ignore_eos": True}).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("1", "stop")
