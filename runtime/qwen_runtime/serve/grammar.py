"""What an answer must look like, as a grammar for llguidance, which ONNX Runtime GenAI has inside.

Source: llguidance's docs/syntax.md. Literals are JSON strings, which its Lark reads alike.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from qwen_runtime.backends import Guidance

# One line, spaced as models write it. With white space left free, small models write little else.
_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_ELSEWHERE = {"$ref", "anyOf", "oneOf", "allOf", "const", "enum"}  # where a schema without a type has it
_THOUGHT = r"thought[lazy]: /(.|\n)*<\/think>/"
_TEXT = r'text[suffix="\n</parameter>\n"]: /(.|\n)*/'


def make_guidance(
    *,
    thinking: bool,
    schema: Mapping[str, Any] | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
    several: bool = True,
) -> Guidance:
    """An answer that is JSON of this schema, or calls of these tools; with both, one or the other.

    Args:
        thinking: the prompt ended inside a thought, which is finished first.
        several: more than one call is allowed.
    """
    bodies = []
    rules = []
    if schema is not None:
        bodies.append("object")
        rules.append(f"object: {_json(schema)}")
    if tools:
        bodies.append('call ("\\n" call)*' if several else "call")
        functions = [tool["function"] for tool in tools]
        names = " | ".join(f"f{at}" for at in range(len(functions)))
        rules.append(f'call: "<tool_call>\\n" ({names}) "</function>\\n</tool_call>"')
        rules += [_function(f"f{at}", function) for at, function in enumerate(functions)]
        rules.append(_TEXT)
    if thinking:
        rules.append(_THOUGHT)
    begin = 'thought "\\n\\n" ' if thinking else ""
    return Guidance("lark_grammar", "\n".join([f"start: {begin}({' | '.join(bodies)})", *rules]) + "\n")


def _function(rule: str, function: Mapping[str, Any]) -> str:
    """Arguments come in the schema's order; those that are not required may be left out."""
    parameters = function.get("parameters") or {}
    required = parameters.get("required", ())
    parts = [_literal(f"<function={function['name']}>\n")]
    for name, schema in parameters.get("properties", {}).items():
        begin = _literal(f"<parameter={name}>\n")
        argument = f"{begin} {_argument(schema, parameters)}"
        parts.append(argument if name in required else f"({argument})?")
    return f"{rule}: {' '.join(parts)}"


def takes_text(schema: Mapping[str, Any]) -> bool:
    """Whether an argument is written as it is, and not as JSON: it may be a string, or anything."""
    kinds = schema.get("type")
    if isinstance(kinds, list):
        return "string" in kinds
    return kinds == "string" or (kinds is None and not _ELSEWHERE & schema.keys())


def _argument(schema: Mapping[str, Any], parameters: Mapping[str, Any]) -> str:
    end = _literal("\n</parameter>\n")
    choices = schema.get("enum")
    if isinstance(choices, list) and choices and all(isinstance(choice, str) for choice in choices):
        return f"({' | '.join(map(_literal, choices))}) {end}"
    if takes_text(schema):
        return "text"
    shared = {key: parameters[key] for key in ("$defs", "definitions") if key in parameters}
    return f"{_json({**shared, **schema})} {end}"


def _json(schema: Mapping[str, Any]) -> str:
    return f"%json {json.dumps({**schema, 'x-guidance': _SPACING})}"


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
