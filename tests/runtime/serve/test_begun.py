"""Answers that a client has begun."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import openai
import pytest
from openai import OpenAI
from qwen_runtime import Model, Sampling
from qwen_runtime.serve.begun import begun
from qwen_runtime.serve.schema.chat import ChatRequest

from tests.support.servers import Server

GREEDY = Sampling(temperature=0)
USER = {"role": "user", "content": "What is assert?"}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def test_answer_goes_on_where_it_ends(ask: Callable[..., Any], model: Model) -> None:
    """As if the model had written the beginning itself, white space at its end included."""
    whole = model.generate([USER], max_tokens=20, sampling=GREEDY)
    text = whole.run()
    first = model.decode(whole.tokens[:8])
    rest = ask(messages=[USER, assistant(first)], max_tokens=12)
    assert rest.choices[0].message.content == text[len(first) :]
    assert rest.usage.prompt_tokens == whole.prompt_tokens + 8
    parts = [{"type": "text", "text": first[:3]}, {"type": "text", "text": first[3:]}]
    further: dict[str, Any] = {"continue_final_message": True, "add_generation_prompt": False}
    for messages, options in (
        ([USER, assistant(parts)], {}),
        ([USER, assistant(first)], further),
        ([USER, assistant(first)], {"add_generation_prompt": False}),
    ):
        again = ask(messages=messages, max_tokens=12, extra_body=options)
        assert again.choices[0].message.content == text[len(first) :]
    chunks = ask(messages=[USER, assistant(first)], max_tokens=12, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text[len(first) :]
    spaced = ask(messages=[USER, assistant("It is  ")], max_tokens=1).usage.prompt_tokens
    assert spaced > ask(messages=[USER, assistant("It is")], max_tokens=1).usage.prompt_tokens


def test_answer_anew(ask: Callable[..., Any], model: Model) -> None:
    messages = [USER, assistant("It")]
    for options in ({"continue_final_message": False}, {"add_generation_prompt": True}):
        found = ask(messages=messages, extra_body=options)
        expected = model.generate(messages, max_tokens=30, sampling=GREEDY)
        assert found.choices[0].message.content == expected.run()
        assert found.usage.prompt_tokens == expected.prompt_tokens
    bare = ask(extra_body={"add_generation_prompt": False}).usage.prompt_tokens
    assert bare < ask().usage.prompt_tokens


@pytest.mark.parametrize(
    "last,thinking,text,template_thinking,in_thought",
    [
        (assistant("It"), True, "It", False, False),
        (assistant("It", reasoning_content="Hm"), True, "Hm\n</think>\n\nIt", True, False),
        (assistant("It", reasoning_content="Hm"), False, "It", False, False),
        (assistant(None, reasoning_content="Hm"), True, "Hm", True, True),
        (assistant(None, reasoning_content="Hm"), False, "", False, False),
        (assistant(""), True, "", True, True),
        (USER, True, "", True, True),
    ],
)
def test_thoughts(
    last: dict[str, Any], thinking: bool, text: str, template_thinking: bool, in_thought: bool
) -> None:
    """With a template that does as it is asked."""
    found = begun(ChatRequest.model_validate({"messages": [USER, last]}), thinking)
    opened = found.thinking
    assert (found.text(opened), opened, found.in_thought(opened)) == (text, template_thinking, in_thought)
    assert len(found.messages) == (1 if text else 2)


@pytest.mark.parametrize(
    "last,thinking,opened,text,in_thought",
    [
        (assistant("It"), False, True, "\n</think>\n\nIt", False),
        (assistant(None, reasoning_content="Hm"), True, False, "<think>\nHm", True),
        (assistant("It", reasoning_content="Hm"), True, False, "<think>\nHm\n</think>\n\nIt", False),
        (USER, False, True, "", True),
        (USER, True, False, "", False),
    ],
)
def test_thoughts_by_a_template_of_its_own_mind(
    last: dict[str, Any], thinking: bool, opened: bool, text: str, in_thought: bool
) -> None:
    found = begun(ChatRequest.model_validate({"messages": [USER, last]}), thinking)
    assert (found.text(opened), found.in_thought(opened)) == (text, in_thought)


def test_thought_goes_on(ask: Callable[..., Any], model: Model) -> None:
    whole = model.generate([USER], max_tokens=20, sampling=GREEDY, thinking=True)
    text = whole.run()
    assert "</think>" not in text
    first = model.decode(whole.tokens[:8])
    messages = [USER, assistant(None, reasoning_content=first)]
    found = ask(messages=messages, max_tokens=12, reasoning_effort="high").choices[0].message
    assert found.reasoning_content == text[len(first) :].strip() and not found.content


def test_next_turn(server: Server, client: OpenAI, ask: Callable[..., Any], model: Model) -> None:
    """What was read ahead after such an answer changes nothing."""
    first = ask(messages=[USER, assistant("It is")], max_tokens=12).choices[0].message.content
    messages = [USER, assistant(f"It is{first}"), USER]
    found = ask(messages=messages).choices[0].message.content
    assert found == model.generate(messages, max_tokens=30, sampling=GREEDY).run()


@pytest.mark.parametrize(
    "messages,options,message",
    [
        ([USER], {"continue_final_message": True}, "no text of the assistant's"),
        ([USER, assistant("")], {"continue_final_message": True}, "no text of the assistant's"),
        (
            [USER, assistant("a")],
            {"continue_final_message": True, "add_generation_prompt": True},
            "leave one off",
        ),
        ([USER, assistant("a")], {"guided_regex": "b"}, "can have no other form"),
    ],
)
def test_what_cannot_be(
    ask: Callable[..., Any], messages: list[Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        ask(messages=messages, extra_body=options)
