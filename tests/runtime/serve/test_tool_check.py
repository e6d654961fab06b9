"""Calls that must fit their schemas: whatever their grammars let through is checked by jsonschema."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import openai
import pytest
from jsonschema import Draft202012Validator
from qwen_runtime.grammar import lark, make_guidance
from qwen_runtime.serve import tool_check
from qwen_runtime.serve.errors import ApiError
from qwen_runtime.serve.tool_check import held_to_schemas

from tests.support.answers import argument, call, calls_of, read_answer
from tests.support.constrained import rubbish
from tests.support.schemas import object_of

S = {"type": "string"}
FORMATS = ("date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uuid")
ODD = ["a\nb", "", "x\r", "</parameter>", "null", 5, None, "5", True, {"a": [1]}, 'é🙂"\\']
# Each of one argument, and some of them beside another.
VALUES: dict[str, Any] = {
    "pattern": {**S, "pattern": "^[a-z]{2,4}$"},
    "pattern that is found": {**S, "pattern": "ab", "maxLength": 4},
    "branches": {**S, "pattern": "^(?:a|(b|c))|/$", "maxLength": 3},
    "classes": {**S, "pattern": r"^[^\d][\[&~\]-]\w\d{x}+?$"},
    "escapes of nothing special": {**S, "pattern": r"^\<[\<\>\-]{2}\>\/$"},
    "pattern and lengths": {**S, "pattern": "^[ab\n<]+$", "minLength": 2, "maxLength": 4},
    "lengths": {**S, "minLength": 3, "maxLength": 5},
    "no characters": {**S, "maxLength": 0},
    **{form: {**S, "format": form} for form in FORMATS},
    "odd values": {"enum": ODD},
    "values of a type": {**S, "enum": ["a", 5, "bb"], "minLength": 2},
    "numbers of a list": {"enum": [1, 2, 3], "minimum": 2},
    "bounds": {"type": "integer", "minimum": 3, "maximum": 17},
    "bounds that are apart": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "multiples": {"type": "integer", "multipleOf": 5, "minimum": -20, "maximum": 20},
    "numbers": {"type": "number"},
    "items": {"type": "array", "items": {**S, "maxLength": 2}, "minItems": 1, "maxItems": 3},
    "object": object_of(s={**S, "pattern": "^[ab]{1,3}$"}, n={"type": "integer", "minimum": 1, "maximum": 3}),
    "text or number": {"anyOf": [{**S, "maxLength": 2}, {"type": "integer"}, {"type": "null"}]},
    "text or object": {"anyOf": [{**S, "maxLength": 9}, object_of(a={"type": "boolean"})]},
    "text or list": {
        "type": ["string", "array"],
        "maxLength": 9,
        "items": {"type": "boolean"},
        "maxItems": 2,
    },
    "text or null": {"type": ["string", "null"], "minLength": 6, "maxLength": 7},
    "both": {"allOf": [{**S, "minLength": 2}, {"maxLength": 3}]},
    "reference": {"$ref": "#/$defs/S"},
    "constant or pattern": {"anyOf": [{**S, "pattern": "^x.$"}, {"const": "auto"}, {"type": "boolean"}]},
}
CASES: dict[str, Any] = {
    name: {**object_of(a=value, z={"type": "boolean"}), "$defs": {"S": {**S, "maxLength": 2}}}
    for name, value in VALUES.items()
}
CASES |= {
    "never": {**object_of(a=False, z={"type": "boolean"}), "required": ["z"]},
    "names of patterns": {
        "type": "object",
        "patternProperties": {"^x": {"type": "boolean"}},
        "additionalProperties": False,
    },
    "other names": {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "additionalProperties": {**S, "maxLength": 3},
    },
    "odd names": object_of(**{' "q"': {"type": "boolean"}, "'b'": {"type": "boolean"}}),
    "one of two": {"anyOf": [object_of(a={"type": "boolean"}), object_of(b={**S, "maxLength": 2})]},
}


def tool(parameters: Any, **more: Any) -> Any:
    return {"type": "function", "function": {"name": "look", "parameters": parameters, **more}}


@pytest.mark.parametrize("forced", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_whatever_is_written_fits(name: str, forced: bool) -> None:
    schema = CASES[name]
    asked = [tool(schema, strict=not forced)]
    held, checks = held_to_schemas(asked, every=forced)
    grammar = lark(make_guidance(thinking=False, tools=held, several=False, forced=forced).text)
    begin = "" if forced else "So:\n\n<tool_call>\n<function=look>"
    written = [rubbish(grammar, seed, begin) for seed in range(2)]
    for text in filter(None, written):
        message = read_answer([text], tools=asked, call_checks=checks)
        assert "refusal" not in message
        for _, arguments in calls_of(message):
            validator = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
            assert not list(validator.iter_errors(arguments)), text
    assert any(written)


def test_strict_function_beside_others() -> None:
    """Text is free, and so are calls of others; calls of the strict one are not."""
    tools = [tool(object_of(a={"type": "boolean"}), strict=True), tool({})]
    tools[1]["function"]["name"] = "free"
    held, _ = held_to_schemas(tools, every=False)
    grammar = lark(make_guidance(thinking=True, tools=held, forced=False).text)
    for text in (
        "",
        "A thought of <tool_call> and </tool_call>.</think>\n\nSo.",
        call("free", "anything") + "\n" + call("look", argument("a", "true")),
        "First\n" + call("look", argument("a", "true")) + " and " + call("free", argument("b", "5")),
    ):
        rubbish(grammar, 0, text)
    for text in (call("look", ""), call("look", argument("a", "x")), "<function=look>", call("other", "")):
        with pytest.raises(ValueError, match="does not fit"):
            rubbish(grammar, 0, text)


@pytest.mark.parametrize(
    "schema,message",
    [
        (object_of(a={"type": "array", "uniqueItems": True}), "no grammar carries all of 'uniqueItems'"),
        (object_of(a={"type": "array", "items": object_of(b={"not": S})}), "'not'"),
        (object_of(a={"oneOf": [S, {"type": "integer"}]}), "'oneOf'"),
        (object_of(a={**S, "pattern": "^(?=a)"}), "'pattern'"),
        (object_of(a={**S, "pattern": "(^a|b)$"}), "'pattern'"),
        ({**object_of(a=S), "minProperties": 1}, "'minProperties'"),
        (object_of(a={"type": "int"}), "'int' is not valid"),
        (object_of(a={"enum": ["a", "b"], "minLength": 2}), r'no value of \["a", "b"\] fits'),
        (object_of(a={"$ref": "https://x.org/b"}), "nothing is fetched"),
        (object_of(a={"$ref": "#/$defs/x"}), r"\$ref to '#/\$defs/x', which is not there"),
        (object_of(a={**S, "pattern": "("}), r"'\(' is no regular expression: missing \)"),
        (object_of(a={**S, "pattern": "(" * 5000}), "is no regular expression"),
        (object_of(a={**S, "pattern": "((a{1000}){1000}){1000}"}), "counts multiply to more"),
        (object_of(a={**S, "pattern": "a" * 10_001}), "more than 10000 characters"),
        (object_of(a={"type": "object", "patternProperties": {"(": S}}), "is no regular expression"),
        (object_of(a={"$ref": "#/required/x"}), "cannot be followed"),
    ],
)
def test_what_cannot_be_promised(schema: Any, message: str) -> None:
    with pytest.raises(ApiError, match=rf"^tools\.1\.function\.parameters: .*{message}"):
        held_to_schemas([tool(object_of(a=S)), tool(schema, strict=True)], every=False)
    # Without a promise nothing is asked of it.
    assert held_to_schemas([tool(schema)], every=False)[1] == {}


def test_more_schemas_than_can_be_checked_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool_check, "_SECONDS", -1.0)
    with pytest.raises(ApiError, match="takes too long: ask for fewer"):
        held_to_schemas([tool(object_of(a=S))], every=True)


def test_types_that_are_written_by_hand() -> None:
    schema = {"type": "dict", "properties": {"a": {"type": "int", "nullable": True}, "b": {"type": "any"}}}
    _, checks = held_to_schemas([tool(schema)], every=True)
    check = checks["look"]
    assert check('{"a": 5, "b": "x"}') is None and check('{"a": null}') is None
    assert (
        check('{"a": "x"}')
        == "the call of look does not match the schema: a: 'x' is not valid under any of the given schemas"
    )


def test_forced_through_the_client(ask: Callable[..., Any]) -> None:
    """Rubbish of a real, tiny model."""
    names = ("pattern", "pattern and lengths", "lengths", "date", "values of a type", "bounds", "items")
    schema = object_of(**{name.replace(" ", "_"): VALUES[name] for name in names})
    for seed in range(2):
        options = {"tools": [tool(schema)], "tool_choice": "required", "parallel_tool_calls": False}
        message = ask(**options, temperature=1.5, seed=seed, max_tokens=300).choices[0].message
        [made] = message.tool_calls
        Draft202012Validator(schema).validate(json.loads(made.function.arguments))
        assert message.refusal is None


@pytest.mark.parametrize(
    "limits", [{"minLength": 200}, {"maxLength": 5000}, {"minLength": 40, "maxLength": 900}]
)
def test_long_limits_through_the_client(ask: Callable[..., Any], limits: dict[str, int]) -> None:
    """With a vocabulary, beside other conditions, such limits were too much for llguidance."""
    options: Any = {"tools": [tool(object_of(a={**S, **limits}))], "tool_choice": "required"}
    choice = ask(**options, parallel_tool_calls=False, max_tokens=150).choices[0]
    assert choice.message.tool_calls and choice.finish_reason in ("length", "tool_calls")


def test_strict_through_the_client(ask: Callable[..., Any]) -> None:
    """Nothing is called, and the answer is the model's own."""
    free = ask(tools=[tool(object_of(a=S), strict=False)])
    strict = ask(tools=[tool(object_of(a=S), strict=True)])
    assert free.choices[0].finish_reason == strict.choices[0].finish_reason == "length"
    assert strict.choices[0].message.content


def test_what_the_grammar_does_not_carry(ask: Callable[..., Any]) -> None:
    """A forced call that does not fit is told as such."""
    schema = object_of(a={"enum": [5], "type": "integer"}, b={"type": "array", "items": {"enum": [1]}})
    schema["properties"]["b"] |= {"minItems": 2, "maxItems": 2, "uniqueItems": True}
    options: Any = {"tools": [tool(schema)], "tool_choice": "required", "parallel_tool_calls": False}
    reason = "the call of look does not match the schema: b: [1, 1] has non-unique elements"
    message = ask(**options, max_tokens=200).choices[0].message
    assert message.refusal == reason and json.loads(message.tool_calls[0].function.arguments)["b"] == [1, 1]
    *_, last = [
        chunk for chunk in ask(**options, max_tokens=200, stream=True) if chunk.choices[0].delta.refusal
    ]
    assert last.choices[0].delta.refusal == reason
    options["tools"] = [tool(schema, strict=True)]
    with pytest.raises(openai.BadRequestError, match="no grammar carries all of 'uniqueItems'"):
        ask(**options)
