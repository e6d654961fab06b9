"""What answers must be: schemas as pydantic and zod make them, regular expressions, choices."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from typing import Any

import openai
import pytest
from jsonschema import Draft202012Validator
from openai import OpenAI
from pydantic import BaseModel, Field
from qwen_runtime.grammar import make_guidance
from qwen_runtime.serve import admission, json_check
from qwen_runtime.serve.errors import ApiError
from qwen_runtime.serve.json_check import check_schema, fault

from tests.support.schemas import EVERY_DAY, object_of
from tests.support.servers import Server, health, processor_seconds


def form(schema: Any) -> Any:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


@pytest.mark.parametrize("name", EVERY_DAY)
def test_schemas_of_every_day(ask: Callable[..., Any], name: str) -> None:
    schema = EVERY_DAY[name]
    choice = ask(response_format=form(schema), max_tokens=60, temperature=1, seed=3).choices[0]
    if choice.finish_reason == "stop":
        assert choice.message.refusal == fault(schema, check_schema(schema, "x"), choice.message.content)
        json.loads(choice.message.content)
    else:
        assert name in ("recursion", "lookahead", "formats")


def test_tools_with_such_schemas(ask: Callable[..., Any]) -> None:
    parameters = object_of(a={"type": "array", "items": {"enum": [1, 2]}, "maxItems": 1, "uniqueItems": True})
    tool = {"type": "function", "function": {"name": "look", "parameters": parameters}}
    [call] = ask(tools=[tool], tool_choice="required", max_tokens=90).choices[0].message.tool_calls[:1]
    assert json.loads(call.function.arguments).keys() == {"a"}


def test_answer_that_is_not_what_was_asked(ask: Callable[..., Any], server: Server) -> None:
    """The text stays, and the refusal says what is wrong with it."""
    schema = object_of(a={"type": "string", "enum": ["b"], "not": {"const": "b"}})
    choice = ask(response_format=form(schema)).choices[0]
    assert json.loads(choice.message.content) == {"a": "b"} and choice.finish_reason == "stop"
    reason = choice.message.refusal
    assert reason.startswith("the answer does not match the schema: a: ")
    chunks = [chunk.choices[0].delta for chunk in ask(response_format=form(schema), stream=True)]
    assert [delta.refusal for delta in chunks if delta.refusal] == [reason]
    client = server.client()
    plain: dict[str, Any] = {"model": "any", "prompt": "The", "max_tokens": 30}
    plain["extra_body"] = {"guided_json": schema}
    assert client.completions.create(**plain).choices[0].refusal == reason  # type: ignore[attr-defined]
    *_, last = client.completions.create(**plain, stream=True)
    assert last.choices[0].refusal == reason
    text: Any = {"format": {"type": "json_schema", "name": "x", "schema": schema}}
    options: dict[str, Any] = {"model": "any", "input": "What?", "text": text, "temperature": 0}
    answer = client.responses.create(**options)
    parts = [part for item in answer.output for part in getattr(item, "content", None) or ()]
    assert [part.type for part in parts] == ["output_text", "refusal"]
    assert parts[1].refusal == reason  # type: ignore[union-attr]
    kinds = [event.type for event in client.responses.create(**options, stream=True)]
    assert kinds.count("response.refusal.delta") == kinds.count("response.refusal.done") == 1


class Person(BaseModel):
    name: str = Field(max_length=5)
    site: str = Field(max_length=5, json_schema_extra={"format": "uri"})
    marks: set[bool] = Field(max_length=1)


def test_pydantic_model(server: Server) -> None:
    answer = server.client().chat.completions.parse(
        model="any",
        messages=[{"role": "user", "content": "Who?"}],
        response_format=Person,
        temperature=0,
        max_tokens=60,
    )
    assert isinstance(answer.choices[0].message.parsed, Person)


@pytest.mark.parametrize(
    "further,expected",
    [
        ({"response_format": {"type": "json_object", "schema": object_of(a={"enum": [7]})}}, r'\{"a": 7\}'),
        ({"json_schema": object_of(a={"enum": [7]})}, r'\{"a": 7\}'),
        ({"guided_json": object_of(a={"enum": [7]})}, r'\{"a": 7\}'),
        ({"guided_json": json.dumps(object_of(a={"enum": [7]}))}, r'\{"a": 7\}'),
        ({"guided_regex": "[ab]{2}/c\\/"}, "[ab]{2}/c/"),
        ({"guided_choice": ["yes", 'no "n" / \\ é']}, 'yes|no "n" / \\\\ é'),
        ({"structured_outputs": {"json": object_of(a={"enum": [7]})}}, r'\{"a": 7\}'),
        ({"structured_outputs": {"regex": "x\ny"}}, "x\ny"),
        ({"structured_outputs": {"choice": ["maybe"]}}, "maybe"),
    ],
)
def test_fields_of_other_servers(
    ask: Callable[..., Any], client: OpenAI, further: dict[str, Any], expected: str
) -> None:
    found = ask(extra_body=further).choices[0].message.content
    assert re.fullmatch(expected, found)
    plain = client.completions.create(model="any", prompt="The", max_tokens=30, extra_body=further)
    assert re.fullmatch(expected, plain.choices[0].text)


@pytest.mark.parametrize(
    "further,message",
    [
        ({"response_format": form({"type": "nope"})}, "'nope' is not valid under any of the given schemas"),
        ({"response_format": form(object_of(a={"$ref": "https://x.org/b"}))}, "nothing is fetched"),
        ({"response_format": form(object_of(a={"$ref": "#/$defs/N"}))}, "guidance is not valid: .*N"),
        ({"response_format": form(object_of(a=False))}, "guidance is not valid: .*unsatisfiable$"),
        ({"response_format": form({"enum": ["x" * 300_000]})}, "more than 100000 characters"),
        ({"response_format": form({"type": "object"}), "guided_regex": "a"}, "leave one off"),
        ({"guided_regex": "(?=a)b"}, "look-around"),
        ({"guided_regex": "("}, "guidance is not valid"),
        ({"guided_choice": []}, "guided_choice: "),
        ({"guided_choice": ["x" * 200_000]}, "^guided_choice: more than 100000 characters$"),
        ({"guided_regex": "a" * 10_001}, "^guided_regex: more than 10000 characters$"),
        (
            {"structured_outputs": {"choice": ["x" * 60_000, "y" * 60_000]}},
            "choice: more",
        ),
        ({"guided_json": "5"}, "no JSON object"),
        ({"structured_outputs": {"grammar": "root ::= x"}}, "structured_outputs.grammar: "),
        ({"guided_grammar": "root ::= x"}, "guided_grammar: "),
        ({"grammar": "root ::= x"}, "grammar: "),
    ],
)
def test_what_is_refused_in_one_line(ask: Callable[..., Any], further: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(extra_body=further)
    said = caught.value.body["message"]  # type: ignore[index, call-overload]
    assert re.search(message, said), said
    assert "\n" not in said and len(said) < 450 and "start:" not in said


@pytest.mark.parametrize(
    "asked,begins",
    [
        ({"guided_choice": ["x" * 90_000]}, "xxx"),
        ({"guided_regex": "a{100000}"}, "aaa"),
        ({"guided_regex": "((a{100}){100}){20}"}, "aaa"),
        ({"guided_choice": [f"{at:06}" for at in range(1000)]}, "0"),
        ({"guided_json": {"const": "x" * 90_000}}, '"xxx'),
    ],
)
def test_others_are_answered_beside_long_guidance(
    ask: Callable[..., Any], server: Server, asked: dict[str, Any], begins: str
) -> None:
    """100 tokens of these took 10 seconds and more, in which nobody else had a place."""
    before = processor_seconds(server)
    answer = ask(extra_body=asked, max_tokens=100, temperature=1, seed=1).choices[0].message.content
    assert answer.startswith(begins)
    ask(max_tokens=2)
    assert processor_seconds(server) - before < 8


def test_guidance_that_is_too_much(ask: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    inner = object_of(**{f"a{at}": {"type": "string", "pattern": "^a*$"} for at in range(400)})
    schema = {**object_of(**{f"b{at}": {"$ref": "#/$defs/D"} for at in range(40)}), "$defs": {"D": inner}}
    tool = {"type": "function", "function": {"name": "look", "parameters": schema}}
    with pytest.raises(openai.BadRequestError, match="and 500000 are the most"):
        ask(tools=[tool], tool_choice="required")
    large = object_of(a={"type": "string", "description": "a" * 50_000})
    many = [{**tool, "function": {"name": f"f{at}", "parameters": large}} for at in range(11)]
    with pytest.raises(openai.BadRequestError, match=r"schemas, choices or tools of .* 500000 are the most"):
        ask(tools=many, tool_choice="required")
    # As it is told where compiling takes longer than it may.
    monkeypatch.setattr(admission, "_SECONDS", -1.0)
    guidance = make_guidance(thinking=False, regex="slow")
    assert "the limit: make schemas, choices" in (admission._fault(guidance) or "")


def fault_of(schema: Any, answer: Any) -> str | None:
    return fault(schema, check_schema(schema, "x"), json.dumps(answer))


def doubled(depth: int) -> dict[str, Any]:
    """Definitions that take 2 ** depth steps."""
    steps = {f"a{at}": {"anyOf": [{"$ref": f"#/$defs/a{at + 1}"}] * 2} for at in range(depth)}
    return {**steps, f"a{depth}": {"type": "string"}}


DRAFT = "https://json-schema.org/draft/2020-12/schema"
SLOW = "the answer could not be checked: it takes too long"


@pytest.mark.parametrize(
    "inner",
    [
        pytest.param({"pattern": "^(?=a)(a|aa)+$"}, id="pattern"),
        pytest.param({"$schema": DRAFT, "pattern": "^(?=a)(a|aa)+$"}, id="pattern of a draft"),
        pytest.param({"not": {"$ref": "#/$defs/a0"}}, id="definitions"),
    ],
)
def test_the_check_has_a_limit_of_time(monkeypatch: pytest.MonkeyPatch, inner: Any) -> None:
    monkeypatch.setattr(json_check, "_SECONDS", 0.2)
    value = 5 if "not" in inner else "a" * 60 + "b"
    assert fault_of({**object_of(a=inner), "$defs": doubled(40)}, {"a": value}) == SLOW


def test_the_check_of_a_schema_has_a_limit_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_check, "_SCHEMA_SECONDS", 0.2)
    with pytest.raises(ApiError, match=r"^x: to check the schema takes too long"):
        check_schema({"allOf": [{}] * 24_000}, "x")


def test_what_cannot_be_checked() -> None:
    assert fault_of(object_of(a={"$ref": "#/$defs/none"}), {"a": 1}) == (
        "the answer could not be checked: _WrappedReferencingError"
    )
    schema = object_of(a={"type": "string"})
    assert fault(schema, check_schema(schema, "x"), '{"a": 1') is None


@pytest.mark.parametrize(
    "items",
    [
        [1, 1.0],
        [1, True],
        [{"a": 1, "b": 2}, {"b": 2, "a": 1.0}],
        ["1", 1],
        [[], {}],
        [None, None],
        [-0.0, 0],
    ],
)
def test_items_that_are_unique(items: Any) -> None:
    valid = Draft202012Validator({"uniqueItems": True}).is_valid(items)
    assert (fault_of({"uniqueItems": True}, items) is None) == valid


def test_many_items_that_are_unique() -> None:
    begun = time.thread_time()
    assert fault_of({"uniqueItems": True}, [{"a": at} for at in range(5000)]) is None
    assert time.thread_time() - begun < 5  # seconds; it was a minute


def test_others_are_answered_during_a_check(ask: Callable[..., Any], server: Server) -> None:
    schema = {**object_of(a={"enum": [7], "not": {"$ref": "#/$defs/a0"}}), "$defs": doubled(40)}
    refusals = []
    asking = threading.Thread(
        target=lambda: refusals.append(ask(response_format=form(schema)).choices[0].message.refusal)
    )
    asking.start()
    whole, longest = time.monotonic(), 0.0
    while asking.is_alive():
        begun = time.monotonic()
        health(server)
        longest = max(longest, time.monotonic() - begun)
        time.sleep(0.05)
    assert refusals == [SLOW]
    assert longest < (time.monotonic() - whole) / 2  # it waited for nearly all of it
