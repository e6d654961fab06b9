"""What the grammars let through, by llguidance and xgrammar themselves."""

from __future__ import annotations

import json
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from qwen_runtime.grammar import lark, make_guidance, structural_tag
from qwen_runtime.serve.tool_check import held_to_schemas

from tests.support.answers import calls_of, hermes_call, read_answer
from tests.support.constrained import rubbish, takes

NODE = {
    "type": "object",
    "properties": {"v": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}]}},
    "required": ["v", "next"],
}
A = {"properties": {"a": {"type": "string"}}, "required": ["a"]}
B = {"properties": {"b": {"type": "boolean"}}, "required": ["b"]}
X = {"x": {"type": "integer"}}
# A function's parameters, arguments that fit, and others.
CASES: list[tuple[Any, list[Any], list[Any]]] = [
    ({}, [{}], [{"a": 1}]),
    ({"type": "object", "properties": {}}, [{}], [{"a": 1}]),
    (A, [{"a": "x\ny"}, {"a": ""}, {"a": "</tool_call>"}], [{}, {"a": 1}, {"a": "x", "c": 1}]),
    ({"$ref": "#/$defs/A", "$defs": {"A": A}}, [{"a": "x"}], [{}]),
    ({"allOf": [A, B]}, [{"a": "x", "b": True}], [{}, {"a": "x"}, {"a": "x", "b": "yes"}]),
    ({"anyOf": [A, B]}, [{"a": "x"}, {"b": True}], [{}, {"a": "x", "b": True}]),
    ({"oneOf": [A, B]}, [{"a": "x"}, {"b": True}], [{}]),
    ({"type": "object", "additionalProperties": {"type": "integer"}}, [{"q": 5}], [{"q": "x"}]),
    ({"type": "object", "additionalProperties": True}, [{}, {"q": [5]}], []),
    ({**A, "additionalProperties": False}, [{"a": "x"}], [{"a": "x", "q": 5}]),
    ({"type": "object", "patternProperties": {"^x": {"type": "boolean"}}}, [{"x1": True}], [{"y": True}]),
    ({"$ref": "#/$defs/Node", "$defs": {"Node": NODE}},
     [{"v": 5, "next": None}, {"v": 5, "next": {"v": 1, "next": None}}], [{}, {"v": 5}]),
    ({"type": "object", "properties": {"kids": {"items": {"$ref": "#"}}, **X}, "required": ["x"]},
     [{"x": 1}, {"kids": [{"x": 1}], "x": 1}], [{}, {"kids": [1], "x": 1}]),
    ({"properties": {"e": {"enum": ["x", None, 5]}, "d": {"type": "string", "format": "date"}}},
     [{"e": "x"}, {"e": None, "d": "2026-11-26"}], [{"e": "y"}, {"d": "tomorrow"}]),
]  # fmt: skip


def guidance(parameters: Any, **more: Any) -> str:
    tools = [{"function": {"name": "f", "parameters": parameters}}]
    options: dict[str, Any] = {"thinking": False, "several": False, **more}
    return make_guidance(tools=tools, dialect="hermes", **options).text


def written(arguments: Any) -> str:
    return hermes_call("f", json.dumps(arguments))


@pytest.mark.parametrize("parameters,good,bad", CASES)
def test_llguidance(parameters: Any, good: list[Any], bad: list[Any]) -> None:
    for arguments in [*good, *bad]:
        taken = takes(lark(guidance(parameters)), written(arguments))
        assert taken == (arguments in good), arguments


@pytest.mark.parametrize("parameters,good,bad", CASES)
def test_xgrammar(parameters: Any, good: list[Any], bad: list[Any]) -> None:
    xgrammar = pytest.importorskip("xgrammar")
    tokens = xgrammar.TokenizerInfo([*map(chr, range(128)), "<end>"], stop_token_ids=[128])
    compiled = xgrammar.GrammarCompiler(tokens).compile_structural_tag(
        json.loads(structural_tag(guidance(parameters)))
    )
    for arguments in [*good, *bad]:
        matcher = xgrammar.GrammarMatcher(compiled, terminate_without_stop_token=True)
        taken = matcher.accept_string(written(arguments)) and matcher.is_terminated()
        assert taken == (arguments in good), arguments


@pytest.mark.parametrize("parameters,good,bad", CASES)
def test_what_may_be_written_is_read(parameters: Any, good: list[Any], bad: list[Any]) -> None:
    tools = [{"function": {"name": "f", "parameters": parameters}}]
    for arguments in good:
        message = read_answer([written(arguments)], tools=tools, dialect="hermes")
        assert calls_of(message) == [("f", arguments)]


@pytest.mark.parametrize("forced", [True, False])
@pytest.mark.parametrize("parameters", [parameters for parameters, *_ in CASES if "oneOf" not in parameters])
def test_whatever_is_written_fits(parameters: Any, forced: bool) -> None:
    """What a model without any sense writes, held by the grammar."""
    tools = [{"function": {"name": "f", "parameters": parameters, "strict": not forced}}]
    held, checks = held_to_schemas(tools, every=forced)
    grammar = lark(
        make_guidance(thinking=False, tools=held, several=False, forced=forced, dialect="hermes").text
    )
    begin = "" if forced else 'So:\n\n<tool_call>\n{"name": "f'
    found = [rubbish(grammar, seed, begin) for seed in range(2)]
    for text in filter(None, found):
        message = read_answer([text], tools=tools, call_checks=checks, dialect="hermes")
        assert "refusal" not in message
        for _, arguments in calls_of(message):
            assert not list(Draft202012Validator(parameters).iter_errors(arguments)), text
    assert any(found)


def test_strict_function_beside_others() -> None:
    """Text is free, and so are calls of others; calls of the strict one are not."""
    strict = {"function": {"name": "look", "strict": True, "parameters": {**B, "type": "object"}}}
    tools = [strict, {"function": {"name": "free"}}]
    grammar = lark(make_guidance(thinking=True, tools=tools, forced=False, dialect="hermes").text)
    free, held = hermes_call("free", '{"x": any}'), hermes_call("look", '{"b": true}')
    for text in (
        "",
        "Of <tool_call> and </tool_call>.</think>\n\nSo.",
        f"{free}\n{held}",
        f"A\n{held} b {free}",
    ):
        rubbish(grammar, 0, text)
    for text in (hermes_call("look", "{}"), hermes_call("other", "{}"), "<tool_call>{", '<tool_call>\n[{"n'):
        with pytest.raises(ValueError, match="does not fit"):
            rubbish(grammar, 0, text)


def test_thoughts_come_before_forced_calls() -> None:
    grammar = lark(guidance(B, thinking=True))
    call = hermes_call("f", '{"b": true}')
    assert rubbish(grammar, 0, f"Hm <tool_call>.</think>\n\n{call}") is not None
    with pytest.raises(ValueError, match="does not fit"):
        rubbish(grammar, 0, "Hm. <tool_call>\n{")


def test_several_calls() -> None:
    grammar = lark(guidance(B, several=True))
    call = hermes_call("f", '{"b": true}')
    assert rubbish(grammar, 0, f"{call}\n{call}")
    with pytest.raises(ValueError, match="does not fit"):
        rubbish(lark(guidance(B)), 0, f"{call}\n{call}")


def test_xgrammar_without_force() -> None:
    xgrammar = pytest.importorskip("xgrammar")
    tools = [{"function": {"name": "f", "strict": True, "parameters": B}}, {"function": {"name": "g"}}]
    tag = structural_tag(make_guidance(thinking=True, tools=tools, forced=False, dialect="hermes").text)
    tokens = xgrammar.TokenizerInfo([*map(chr, range(128)), "<end>"], stop_token_ids=[128])
    compiled = xgrammar.GrammarCompiler(tokens).compile_structural_tag(json.loads(tag))
    good = ["Hm.</think>", f"a {written({'b': True})} b", hermes_call("g", '{"x": 1}')]
    for text in [*good, written({"b": 5}), written({})]:
        assert xgrammar.GrammarMatcher(compiled).accept_string(text) == (text in good), text
