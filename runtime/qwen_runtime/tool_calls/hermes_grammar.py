"""Calls in the dialect of `hermes` as grammars, for calls that must fit their schemas.

Arguments come in the schema's order; those that are not required may be left out. Sources as
`qwen3_5_grammar`'s.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from qwen_runtime.tool_calls.hermes import ARGUMENTS, CALL, CALL_END, NAME
from qwen_runtime.tool_calls.json_schema import Arguments, forms, standalone
from qwen_runtime.tool_calls.notation import SPACING, in_slashes, quoted
from qwen_runtime.tool_calls.texts import ANY, whole

BEGINS = rf"{CALL}\s*[\[{{]"
_BEGIN, _END = f'{CALL}\n{{"{NAME}": "', f"}}\n{CALL_END}"
_MIDDLE = f'", "{ARGUMENTS}": '  # between the name and the arguments


def lark(functions: Sequence[Mapping[str, Any]]) -> list[str]:
    """As `protocol.Grammar`."""
    bodies = [_body(function) for function in functions]
    return [f"call: {quoted(_BEGIN)} ({' | '.join(bodies)})"]


def lark_unforced(functions: Sequence[Mapping[str, Any]]) -> list[str]:
    """As `protocol.Grammar`."""
    bodies = [
        _body(function) if function.get("strict") else quoted(f'{function["name"]}"')
        for function in functions
    ]
    return [
        "answer: (OPENING called)* PROSE?",
        rf"OPENING: /{ANY}{in_slashes(re.escape(_BEGIN))}/ & ~/{ANY}{BEGINS}{ANY}{BEGINS}{ANY}/",
        rf"PROSE: /(.|\n)+/ & ~/{ANY}{BEGINS}{ANY}/",
        f"called: {' | '.join(bodies)}",
    ]


def _body(function: Mapping[str, Any]) -> str:
    options = {**SPACING, "coerce_one_of": True}  # oneOf is not known to llguidance
    schema = {**_arguments(function), "x-guidance": options}
    begin = quoted(f"{function['name']}{_MIDDLE}")
    return f"({begin} %json {json.dumps(schema)} {quoted(_END)})"


def structural_tag(function: Mapping[str, Any]) -> dict[str, Any]:
    """As `protocol.Grammar`."""
    return _tag(function, {"type": "json_schema", "json_schema": _arguments(function)})


def structural_tag_unforced(functions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """As `protocol.Grammar`."""
    tags = [
        structural_tag(function) if function.get("strict") else _tag(function, {"type": "any_text"})
        for function in functions
    ]
    return {"type": "triggered_tags", "triggers": [_BEGIN], "tags": tags}


def _tag(function: Mapping[str, Any], content: dict[str, Any]) -> dict[str, Any]:
    begin = f"{_BEGIN}{function['name']}{_MIDDLE}"
    return {"type": "tag", "begin": begin, "content": content, "end": _END}


def _arguments(function: Mapping[str, Any]) -> dict[str, Any]:
    """A schema of the arguments, without those that nobody asked for."""
    parameters = function.get("parameters") or {}
    every = [_object(form) for form in forms(parameters, parameters)]
    different = [form for at, form in enumerate(every) if form not in every[:at]]
    found: dict[str, Any] = standalone(
        different[0] if len(different) == 1 else {"anyOf": different}, parameters
    )
    return found


def _object(form: Arguments) -> dict[str, Any]:
    said = {
        "properties": dict(form.named()),
        "required": sorted(form.required),
        "patternProperties": {_whole(pattern): schema for pattern, schema in form.patterns.items()},
        "minProperties": form.fewest,
        "maxProperties": form.most,
    }
    others = False if form.others is None else form.others
    # xgrammar takes empty ones for more than they say.
    return {
        "type": "object",
        **{key: value for key, value in said.items() if value},
        "additionalProperties": others,
    }


def _whole(pattern: str) -> str:
    """To xgrammar a pattern is one of the whole name, whatever anchors it has."""
    found = whole(pattern)
    return pattern if found is None else f"^({found})$"
