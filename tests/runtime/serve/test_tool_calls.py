"""Calls of tools through the official `openai` client: what a grammar enforces, and earlier calls."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from qwen_runtime import Model, Sampling

from tests.support.servers import serving

QUESTION: Any = {"role": "user", "content": "What is assert?"}
NODE = {
    "type": "object",
    "properties": {
        "value": {"enum": [1, 2]},
        "next": {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}]},
    },
    "required": ["value", "next"],
    "additionalProperties": False,
}
VALUE = {"properties": {"value": {"type": "boolean"}}, "required": ["value"]}
UNIT = {"properties": {"unit": {"$ref": "#/$defs/Unit"}}, "required": ["unit"]}
UNITS = {"Unit": {"enum": ["km", "mi"]}}


def tool(name: str, parameters: Any) -> Any:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


@pytest.fixture(scope="module")
def model(cpu_artifact: Path) -> Iterator[Model]:
    with Model.load(cpu_artifact) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def client(cpu_artifact: Path) -> Iterator[OpenAI]:
    with serving(cpu_artifact) as server:
        yield server.client()


def ask(client: OpenAI, model: Model, **options: Any) -> Any:
    options = {"messages": [QUESTION], "temperature": 0, "max_tokens": 250, **options}
    return client.chat.completions.create(model=model.info.name, **options)


@pytest.mark.parametrize(
    "parameters,names",
    [
        ({"$ref": "#/$defs/Value", "$defs": {"Value": VALUE}}, {"value"}),
        ({"allOf": [VALUE, UNIT], "$defs": UNITS}, {"value", "unit"}),
        ({"allOf": [{"$ref": "#/definitions/Value"}], "definitions": {"Value": VALUE}}, {"value"}),
        ({"anyOf": [VALUE, UNIT], "$defs": UNITS}, None),
        ({"oneOf": [VALUE, {"type": "null"}]}, {"value"}),
        ({"type": "object", "additionalProperties": {"type": "boolean"}}, None),
        ({"type": "object", "patternProperties": {"^x": {"type": "boolean"}}}, None),
        ({"$ref": "#/$defs/Node", "$defs": {"Node": NODE}}, {"value", "next"}),
        ({"properties": {"self": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}, **VALUE["properties"]},
          "required": ["self", "value"], "additionalProperties": False}, {"self", "value"}),
        ({"properties": {"a": {"allOf": [{"$ref": "#/$defs/Unit"}]}}, "required": ["a"], "$defs": UNITS},
          {"a"}),
    ],
)  # fmt: skip
def test_forced_calls_have_arguments(
    client: OpenAI, model: Model, parameters: Any, names: set[str] | None
) -> None:
    for seed in (1, 2):
        options = {"tools": [tool("f", parameters)], "tool_choice": "required", "parallel_tool_calls": False}
        choice = ask(client, model, temperature=1, seed=seed, **options).choices[0]
        [call] = choice.message.tool_calls
        if choice.finish_reason == "length":  # deep in a model that refers to itself
            assert call.function.arguments not in ("", "{")
            continue
        arguments = json.loads(call.function.arguments)
        assert arguments.keys() == names if names else arguments
        assert arguments.get("unit", "km") in ("km", "mi")
        if parameters.get("$defs") is not UNITS:
            assert arguments.get("value", True) in (True, False, 1, 2)


def test_types_of_forced_arguments(client: OpenAI, model: Model) -> None:
    """Each has but one value."""
    values: dict[str, Any] = {
        "a": "x",
        "b": 5,
        "c": None,
        "d": True,
        "e": {"deep": [1, "5"]},
        "f": "5",
        "g": "中",
    }
    properties = {name: {"const": value} for name, value in values.items()}
    properties |= {f"{name}2": {"allOf": [{"enum": [value]}]} for name, value in values.items()}
    parameters = {"properties": properties, "required": list(properties)}
    options = {
        "tools": [tool("f", parameters)],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
    }
    [call] = ask(client, model, max_tokens=900, **options).choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == values | {
        f"{name}2": value for name, value in values.items()
    }


def history(*results: tuple[str | None, str], arguments: str = '{"word": "a"}') -> Any:
    """Two calls, c1 and c2, and results."""
    function = {"name": "look", "arguments": arguments}
    calls = [{"id": name, "type": "function", "function": function} for name in ("c1", "c2")]
    told = [
        {"role": "tool", "content": text} | ({} if name is None else {"tool_call_id": name})
        for name, text in results
    ]
    return [QUESTION, {"role": "assistant", "content": None, "tool_calls": calls}, *told]


def test_results_come_in_the_order_of_their_calls(client: OpenAI, model: Model) -> None:
    def answer(*results: tuple[str | None, str], after: Any = ()) -> Any:
        messages = [*history(*results), *after]
        found = ask(client, model, messages=messages, max_tokens=10, logprobs=True)
        entries = found.choices[0].logprobs.content
        return found.choices[0].message.content, [round(entry.logprob, 3) for entry in entries]

    call = {"type": "function", "function": {"name": "look", "arguments": {"word": "a"}}}
    messages = [
        QUESTION,
        {"role": "assistant", "content": "", "tool_calls": [call, call]},
        {"role": "tool", "content": "one"},
        {"role": "tool", "content": "two two two"},
    ]
    options: Any = {"max_tokens": 10, "sampling": Sampling(temperature=0), "logprobs": 0}
    expected = model.generate(messages, **options)
    told = "".join(expected), [round(entry.logprob, 3) for entry in expected.logprobs]
    assert answer(("c1", "one"), ("c2", "two two two")) == told
    assert answer(("c2", "two two two"), ("c1", "one")) == told
    assert answer(("c2", "one"), ("c1", "two two two")) != told
    # The same ids again, as some clients count in each turn.
    results = ("c1", "one"), ("c2", "two two two")
    _, call_again, *again = history(*results)
    found = [answer(*results, after=[call_again, *last]) for last in (again, again[::-1])]
    assert found[0] == found[1] != told


@pytest.mark.parametrize(
    "results,says",
    [
        ([("c1", "one"), (None, "two")], r"messages\.3\.tool_call_id: missing"),
        ([("c3", "one")], r"messages\.2\.tool_call_id: no call before it has the id 'c3'"),
    ],
)
def test_results_of_no_call(client: OpenAI, model: Model, results: Any, says: str) -> None:
    with pytest.raises(openai.BadRequestError, match=says):
        ask(client, model, messages=history(*results))


def test_results_of_no_call_in_responses(client: OpenAI, model: Model) -> None:
    call = {"type": "function_call", "call_id": "c1", "name": "look", "arguments": "{}"}
    output = {"type": "function_call_output", "call_id": "c2", "output": "x"}
    with pytest.raises(openai.BadRequestError, match="no call before it has the id 'c2'"):
        client.responses.create(model=model.info.name, input=[QUESTION, call, output])  # type: ignore[list-item]


@pytest.mark.parametrize(
    "written,read",
    [
        ('{"word": "a b', {"word": "a b"}),
        ('{"word": "a b", "limit": 3', {"word": "a b", "limit": 3}),
        ('{"word": "a b", "lim', {"word": "a b"}),
        ('{"word": ["a", "b', {"word": ["a", "b"]}),
        ('{"word": "a\nb"}', {"word": "a\nb"}),
        ('{"word": "\\ud800"}', {"word": "\ufffd"}),
        ("{", {}),
        ("", {}),
        ("null", {}),
        ("rubbish", {}),
    ],
)
def test_calls_that_were_cut_off_stay_in_the_history(
    client: OpenAI, model: Model, written: str, read: Any
) -> None:
    found = ask(client, model, messages=history(("c1", "x"), ("c2", "y"), arguments=written), max_tokens=10)
    expected = ask(
        client, model, messages=history(("c1", "x"), ("c2", "y"), arguments=json.dumps(read)), max_tokens=10
    )
    assert found.usage.prompt_tokens == expected.usage.prompt_tokens
    assert found.choices[0].message.content == expected.choices[0].message.content


@pytest.mark.parametrize("written", ["[1]", '"word"', "5"])
def test_arguments_that_are_no_object(client: OpenAI, model: Model, written: str) -> None:
    with pytest.raises(
        openai.BadRequestError, match=r"messages\.1\.tool_calls: arguments are not a JSON object"
    ):
        ask(client, model, messages=history(arguments=written))


def test_names_that_the_dialect_cannot_write(client: OpenAI, model: Model) -> None:
    for parameters in ({"properties": {"a>b": {}}}, {"allOf": [{"properties": {"a\nb": {}}}]}):
        with pytest.raises(openai.BadRequestError, match="names of properties"):
            ask(client, model, tools=[tool("f", parameters)])
