"""What an answer must look like - JSON of a schema, or calls of tools - as each backend takes it.

ONNX Runtime GenAI has llguidance inside, OpenVINO GenAI xgrammar. Sources: llguidance's docs/syntax.md, whose
literals are JSON strings, which its Lark reads alike; xgrammar's documentation of structural tags.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from qwen_runtime.guidance import Guidance

# One line, spaced as models write it. With white space left free, small models write little else.
_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_ELSEWHERE = {"$ref", "anyOf", "oneOf", "allOf", "const", "enum"}  # where a schema without a type has it
_NOTHING = {"type": "grammar", "grammar": 'root ::= ""'}  # xgrammar takes no empty literal
# llguidance forces what must come next as the tokenizer would write it, which is best for the answer. To ONNX
# Runtime GenAI 0.18, though, the rest of a character that a token began is U+FFFD, and the answer fails.
_NO_FORCING = '%llguidance {"no_forcing": true}\n'
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
    functions = [tool["function"] for tool in tools]
    answer = {"thinking": thinking, "schema": schema, "functions": functions, "several": several}
    return Guidance("answer", json.dumps(answer))


def lark(answer: str) -> str:
    """The text of a guidance of kind `answer` as a grammar for llguidance."""
    asked = json.loads(answer)
    bodies = []
    rules = []
    if asked["schema"] is not None:
        bodies.append("object")
        rules.append(f"object: {_json(asked['schema'])}")
    if asked["functions"]:
        bodies.append('call ("\\n" call)*' if asked["several"] else "call")
        names = " | ".join(f"f{at}" for at in range(len(asked["functions"])))
        rules.append(f'call: "<tool_call>\\n" ({names}) "</function>\\n</tool_call>"')
        rules += [_function(f"f{at}", function) for at, function in enumerate(asked["functions"])]
        rules.append(_TEXT)
    if asked["thinking"]:
        rules.append(_THOUGHT)
    begin = 'thought "\\n\\n" ' if asked["thinking"] else ""
    text = "\n".join([f"start: {begin}({' | '.join(bodies)})", *rules]) + "\n"
    plain = text.isascii() and "\\u" not in text
    return text if plain else _NO_FORCING + text


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
    if choices := _choices(schema):
        return f"({' | '.join(map(_literal, choices))}) {end}"
    if takes_text(schema):
        return "text"
    return f"{_json(_with_definitions(schema, parameters))} {end}"


def _choices(schema: Mapping[str, Any]) -> list[str]:
    """The texts that an argument must be one of; [] where it need not."""
    choices = schema.get("enum")
    texts = isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)
    return choices if texts and choices else []


def _with_definitions(schema: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    shared = {key: parameters[key] for key in ("$defs", "definitions") if key in parameters}
    return {**shared, **schema}


def _json(schema: Mapping[str, Any]) -> str:
    return f"%json {json.dumps({**schema, 'x-guidance': _SPACING})}"


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def structural_tag(answer: str) -> str:
    """The text of a guidance of kind `answer` as a structural tag for xgrammar, which is JSON."""
    asked = json.loads(answer)
    bodies: list[Any] = []
    if asked["schema"] is not None:
        bodies.append({"type": "json_schema", "json_schema": asked["schema"]})
    if asked["functions"]:
        bodies.append(
            {
                "type": "tags_with_separator",
                "tags": [_call(function) for function in asked["functions"]],
                "separator": "\n",
                "at_least_one": True,
                "stop_after_first": not asked["several"],
            }
        )
    found = {"type": "or", "elements": bodies} if len(bodies) > 1 else bodies[0]
    if asked["thinking"]:
        thought = {"type": "tag", "begin": "", "content": {"type": "any_text"}, "end": "</think>"}
        found = _sequence(thought, _const("\n\n"), found)
    return json.dumps({"type": "structural_tag", "format": found})


def _call(function: Mapping[str, Any]) -> dict[str, Any]:
    parameters = function.get("parameters") or {}
    parts = []
    for name, schema in parameters.get("properties", {}).items():
        argument = _tagged_argument(name, schema, parameters)
        optional = name not in parameters.get("required", ())
        parts.append({"type": "or", "elements": [argument, _NOTHING]} if optional else argument)
    return {
        "type": "tag",
        "begin": f"<tool_call>\n<function={function['name']}>\n",
        "content": _sequence(*parts) if parts else _NOTHING,
        "end": "</function>\n</tool_call>",
    }


def _tagged_argument(name: str, schema: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    begin, end = f"<parameter={name}>\n", "\n</parameter>\n"
    choices = _choices(schema)
    if choices:
        content: dict[str, Any] = {"type": "or", "elements": [_const(choice) for choice in choices]}
    elif takes_text(schema):
        return {"type": "tag", "begin": begin, "content": {"type": "any_text"}, "end": end}
    else:
        content = {"type": "json_schema", "json_schema": _with_definitions(schema, parameters)}
    return _sequence(_const(begin), content, _const(end))


def _sequence(*elements: Any) -> dict[str, Any]:
    return {"type": "sequence", "elements": list(elements)}


def _const(text: str) -> dict[str, Any]:
    return {"type": "const_string", "value": text}
