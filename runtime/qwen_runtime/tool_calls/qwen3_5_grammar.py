"""Calls in the dialect of `qwen3_5` as grammars, for answers that must be calls.

ONNX Runtime GenAI has llguidance inside, OpenVINO GenAI xgrammar. Sources: llguidance's docs/syntax.md, whose
literals are JSON strings, which its Lark reads alike; xgrammar's documentation of structural tags.

Arguments come in the schema's order; those that are not required may be left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from qwen_runtime.tool_calls.json_schema import Allowed, Arguments, allowed, forms, standalone
from qwen_runtime.tool_calls.qwen3_5 import (
    CALL,
    CALL_END,
    FUNCTION,
    FUNCTION_END,
    PARAMETER,
    PARAMETER_END,
)

_BEGIN, _END = f"{CALL}\n", f"{FUNCTION_END}\n{CALL_END}"
_VALUE_END = f"\n{PARAMETER_END}\n"
_OTHER_NAME = "[A-Za-z_][A-Za-z0-9_.-]{0,63}"  # where the schema leaves names free
_MOST_OTHERS = 16  # such arguments, which small models would write without end
# One line, spaced as models write it. With white space left free, small models write little else.
SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_TYPED_ELSEWHERE = {"$ref", "allOf", "anyOf", "oneOf"}


def lark(functions: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rules of llguidance; the one for a call of one of these functions is `call`."""
    names = [f"f{at}" for at in range(len(functions))]
    return [
        f"call: {_quoted(_BEGIN)} ({' | '.join(names)}) {_quoted(_END)}",
        *[f"{name}: {_lark_function(function)}" for name, function in zip(names, functions, strict=True)],
        f"text[suffix={_quoted(_VALUE_END)}]: /(.|\\n)*/",
        f"other: /{_OTHER_NAME}/",
    ]


def _lark_function(function: Mapping[str, Any]) -> str:
    begin = _quoted(f"{FUNCTION}{function['name']}>\n")
    parameters = function.get("parameters") or {}
    # Each form once: some differ in nothing that the grammar knows of.
    bodies = dict.fromkeys(_lark_arguments(form, parameters) for form in forms(parameters, parameters))
    some = " | ".join(body for body in bodies if body)
    return begin if not some else f"{begin} ({some})" if "" not in bodies else f"{begin} ({some})?"


def _lark_arguments(form: Arguments, root: Any) -> str:
    parts = []
    for name, schema in form.named():
        argument = f"{_quoted(f'{PARAMETER}{name}>{chr(10)}')} {_lark_value(schema, root)}"
        parts.append(argument if name in form.required else f"({argument})?")
    fewest, most = _others(form)
    if most:
        other = f'{_quoted(PARAMETER)} other ">\\n" {_lark_value(form.others, root)}'
        parts.append(f"({other}){{{fewest},{most}}}")
    return " ".join(parts)


def _lark_value(schema: Any, root: Any) -> str:
    known = allowed(schema, root)
    if known.text:
        return "text"
    choices = [_quoted(text) for text in _texts(known)]
    if known.kinds:
        options = {**SPACING, "coerce_one_of": True}  # oneOf is not known to llguidance
        choices.append(f"%json {json.dumps({**_typed(schema, root, known), 'x-guidance': options})}")
    return f"({' | '.join(choices)}) {_quoted(_VALUE_END)}"


def structural_tag(function: Mapping[str, Any]) -> dict[str, Any]:
    """A tag of xgrammar for a call of this function."""
    parameters = function.get("parameters") or {}
    bodies = [_tagged_arguments(form, parameters) for form in forms(parameters, parameters)]
    return {
        "type": "tag",
        "begin": f"{_BEGIN}{FUNCTION}{function['name']}>\n",
        "content": either([body for at, body in enumerate(bodies) if body not in bodies[:at]]),
        "end": _END,
    }


def _tagged_arguments(form: Arguments, root: Any) -> dict[str, Any]:
    parts = []
    for name, schema in form.named():
        argument = sequence(const(f"{PARAMETER}{name}>\n"), _tagged_value(schema, root))
        parts.append(argument if name in form.required else either([argument, _NOTHING]))
    fewest, most = _others(form)
    if most:
        free = {"type": "regex", "pattern": _OTHER_NAME}
        other = sequence(const(PARAMETER), free, const(">\n"), _tagged_value(form.others, root))
        parts += [other] * fewest + [either([other, _NOTHING])] * (most - fewest)
    return sequence(*parts) if parts else _NOTHING


def _tagged_value(schema: Any, root: Any) -> dict[str, Any]:
    known = allowed(schema, root)
    if known.text:
        return {"type": "tag", "begin": "", "content": {"type": "any_text"}, "end": _VALUE_END}
    choices = [const(text) for text in _texts(known)]
    if known.kinds:
        choices.append({"type": "json_schema", "json_schema": _typed(schema, root, known)})
    return sequence(either(choices), const(_VALUE_END))


_NOTHING = {"type": "grammar", "grammar": 'root ::= ""'}  # xgrammar takes no empty literal


def either(elements: list[Any]) -> Any:
    return {"type": "or", "elements": elements} if len(elements) > 1 else elements[0]


def sequence(*elements: Any) -> dict[str, Any]:
    return {"type": "sequence", "elements": list(elements)}


def const(text: str) -> dict[str, Any]:
    return {"type": "const_string", "value": text}


def _texts(known: Allowed) -> list[str]:
    """How the values are written that a value is one of."""
    return [
        value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in known.values
    ]


def _typed(schema: Any, root: Any, known: Allowed) -> dict[str, Any]:
    """The schema by itself, with types that the libraries know."""
    found = standalone(schema, root)
    if _TYPED_ELSEWHERE.isdisjoint(found):
        kinds = known.kinds - {"integer"} if "number" in known.kinds else known.kinds
        found = {**found, "type": sorted(kinds) if len(kinds) > 1 else next(iter(kinds))}
    return found


def _others(form: Arguments) -> tuple[int, int]:
    """How many arguments with free names there may be. None at all is no call that anybody asked for."""
    if form.others is None:
        return 0, 0
    fewest = max(form.fewest, 0 if form.properties else 1) - len(form.required)
    most = _MOST_OTHERS if form.most is None else form.most - len(form.required)
    most = max(0, min(most, _MOST_OTHERS))
    return max(0, min(fewest, most)), most


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
