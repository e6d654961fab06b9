"""JSON schemas and tools in `/v1/chat/completions`."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import openai
import pytest
from qwen_runtime import Model, Sampling

QUESTION = [{"role": "user", "content": "What is assert?"}]
GREEDY = Sampling(temperature=0)
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
    with pytest.raises(openai.BadRequestError, match="'nope' is not valid"):
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
            {"messages": [*QUESTION, {"role": "assistant", "tool_calls": [function("a", arguments="[]")]}]},
            "not a JSON object",
        ),
    ],
)
def test_tools_that_are_refused(ask: Callable[..., Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        ask(**options)
