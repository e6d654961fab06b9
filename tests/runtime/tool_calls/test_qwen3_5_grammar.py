"""What the grammars let through, by llguidance and xgrammar themselves."""

from __future__ import annotations

import json
from typing import Any

import pytest
from qwen_runtime.grammar import lark, make_guidance, structural_tag

from tests.support.answers import argument, call, calls_of, read_answer
from tests.support.constrained import takes

NODE = {
    "type": "object",
    "properties": {"v": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}]}},
    "required": ["v"],
}
A = {"properties": {"a": {"type": "string"}}, "required": ["a"]}
B = {"properties": {"b": {"type": "boolean"}}, "required": ["b"]}
X = {"x": {"type": "integer"}}
KINDS = {
    "enum": {"enum": ["x", None, 5]},
    "const": {"const": 7},
    "either": {"anyOf": [{"const": "auto"}, {"type": "integer"}]},
    "optional": {"type": ["string", "null"]},
    "list": {"items": {"type": "integer"}},
    "int": {"type": "int"},
    "nullable": {"type": "integer", "nullable": True},
    "one": {"oneOf": [{"type": "integer"}, {"type": "boolean"}]},
}


def text_of(**more: Any) -> Any:
    return {"properties": {"a": {"type": "string", **more}}, "required": ["a"]}


# A function's parameters, arguments as they may be written, and others.
CASES: list[tuple[Any, list[dict[str, str]], list[dict[str, str]]]] = [
    ({}, [{}], [{"a": "1"}]),
    ({"type": "object", "properties": {}}, [{}], [{"a": "1"}]),
    ({"type": "object", "required": ["a"]}, [{"a": "1"}], [{}]),
    (A, [{"a": "x\ny"}, {"a": ""}], [{}, {"b": "x"}]),
    ({"$ref": "#/$defs/A", "$defs": {"A": A}}, [{"a": "x"}], [{}]),
    ({"allOf": [A, B]}, [{"a": "x", "b": "true"}], [{}, {"a": "x"}, {"a": "x", "b": "yes"}]),
    ({"anyOf": [A, B]}, [{"a": "x"}, {"b": "true"}], [{}, {"a": "x", "b": "true"}]),
    ({"anyOf": [{"required": ["x"]}, {"required": ["b"]}], "properties": {**X, **B["properties"]}},
     [{"x": "1"}, {"b": "true"}, {"x": "1", "b": "true"}], [{}]),
    ({"type": "object", "additionalProperties": {"type": "integer"}},
     [{"q": "5"}, {"q": "5", "r": "6"}], [{}, {"q": "x"}]),
    ({"type": "object", "additionalProperties": True}, [{"q": "5x"}], [{}]),
    ({**A, "additionalProperties": {"type": "integer"}}, [{"a": "x"}, {"a": "x", "q": "5"}], [{"q": "5"}]),
    ({**A, "additionalProperties": False}, [{"a": "x"}], [{"a": "x", "q": "5"}]),
    ({"type": "object", "minProperties": 2}, [{"q": "", "r": ""}], [{}, {"q": ""}]),
    ({"type": "object", "additionalProperties": {}, "maxProperties": 1}, [{"q": ""}], [{"q": "", "r": ""}]),
    ({"$ref": "#/$defs/Node", "$defs": {"Node": NODE}},
     [{"v": "5"}, {"v": "5", "next": '{"v": 1, "next": null}'}], [{}, {"v": "5", "next": '{"v": "x"}'}]),
    ({"type": "object", "properties": {"kids": {"items": {"$ref": "#"}}, **X}, "required": ["x"]},
     [{"x": "1"}, {"kids": '[{"x": 1}]', "x": "1"}], [{}, {"kids": "[1]", "x": "1"}]),
    ({"properties": {**X, "y": {"$ref": "#/properties/x"}}}, [{}, {"y": "5"}], [{"y": "z"}]),
    ({"properties": KINDS},
     [{"enum": "x"}, {"enum": "null"}, {"enum": "5", "const": "7"}, {"either": "auto"}, {"either": "12"},
      {"optional": "null"}, {"list": "[1, 2]"}, {"int": "5"}, {"nullable": "null"}, {"one": "true"}],
     [{"enum": "y"}, {"const": "8"}, {"either": "x"}, {"list": "5"}, {"int": "x"}, {"one": "x"}]),
    (text_of(pattern="^[ab]{2}$"), [{"a": "ab"}], [{"a": "abb"}, {"a": ""}]),
    (text_of(maxLength=2), [{"a": "x"}, {"a": ""}], [{"a": "xyz"}]),
    (text_of(format="date"), [{"a": "2026-11-26"}], [{"a": "2026-11-31"}]),
    (text_of(enum=["x", "</parameter>", ""]), [{"a": "x"}, {"a": ""}], [{"a": "</parameter>"}]),
]  # fmt: skip


def written(arguments: dict[str, str]) -> str:
    return call("f", "".join(argument(name, value) for name, value in arguments.items()))


def guidance(parameters: Any) -> str:
    tools = [{"function": {"name": "f", "parameters": parameters}}]
    return make_guidance(thinking=False, tools=tools, several=False).text


@pytest.mark.parametrize("parameters,good,bad", CASES)
def test_llguidance(parameters: Any, good: list[dict[str, str]], bad: list[dict[str, str]]) -> None:
    for arguments in [*good, *bad]:
        taken = takes(lark(guidance(parameters)), written(arguments))
        assert taken == (arguments in good), arguments


@pytest.mark.parametrize("parameters,good,bad", CASES)
def test_xgrammar(parameters: Any, good: list[dict[str, str]], bad: list[dict[str, str]]) -> None:
    xgrammar = pytest.importorskip("xgrammar")
    vocabulary = [chr(code) for code in range(128)]
    tokens = xgrammar.TokenizerInfo([*vocabulary, "<end>"], stop_token_ids=[len(vocabulary)])
    tag = json.loads(structural_tag(guidance(parameters)))
    compiled = xgrammar.GrammarCompiler(tokens).compile_structural_tag(tag)
    for arguments in [*good, *bad]:
        matcher = xgrammar.GrammarMatcher(compiled, terminate_without_stop_token=True)
        taken = matcher.accept_string(written(arguments)) and matcher.is_terminated()
        assert taken == (arguments in good), arguments


def test_xgrammar_without_force() -> None:
    """Text is free, and so are calls of a function that is not strict."""
    xgrammar = pytest.importorskip("xgrammar")
    strict = {"function": {"name": "f", "strict": True, "parameters": {"properties": X, "required": ["x"]}}}
    tools = [strict, {"function": {"name": "g"}}]
    tag = json.loads(structural_tag(make_guidance(thinking=True, tools=tools, forced=False).text))
    tokens = xgrammar.TokenizerInfo([*map(chr, range(128)), "<end>"], stop_token_ids=[128])
    compiled = xgrammar.GrammarCompiler(tokens).compile_structural_tag(tag)
    good = ["Hm.</think>", written({"x": "5"}), f"a {written({'x': '5'})} b", call("g", argument("x", "z"))]
    for text in [*good, written({"x": "z"}), written({})]:
        assert xgrammar.GrammarMatcher(compiled).accept_string(text) == (text in good), text


@pytest.mark.parametrize("parameters,good,bad", CASES)
def test_what_may_be_written_is_read(
    parameters: Any, good: list[dict[str, str]], bad: list[dict[str, str]]
) -> None:
    tools = [{"function": {"name": "f", "parameters": parameters}}]
    for arguments in good:
        [(_, found)] = calls_of(read_answer([written(arguments)], tools=tools))
        assert found.keys() == arguments.keys()
        for name, value in found.items():
            assert value == arguments[name] or json.dumps(value) == arguments[name]
