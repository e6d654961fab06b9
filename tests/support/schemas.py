"""JSON schemas as pydantic, zod and people make them every day."""

from __future__ import annotations

from typing import Any


def object_of(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


SHORT = {"type": "string", "maxLength": 6}
PAIR = {"type": "array", "items": {"enum": [1, 2]}, "maxItems": 2}
# Each has something that llguidance 1 refuses, or xgrammar leaves out.
EVERY_DAY: dict[str, Any] = {
    "formats": object_of(
        uri={**SHORT, "format": "uri"}, path={**SHORT, "format": "path"}, file={**SHORT, "format": "binary"}
    ),
    "uniqueItems": object_of(
        a={"type": "array", "items": {"enum": [1, 2]}, "maxItems": 2, "uniqueItems": True}
    ),
    "overlapping oneOf": object_of(a={"oneOf": [{"enum": [1, 2]}, {"enum": [2, 3]}]}),
    "not": object_of(a={"enum": [1, 2], "not": {"const": 2}}),
    "never": {**object_of(a={"enum": [1]}), "additionalProperties": {"not": {}}},
    "propertyNames": {"type": "object", "propertyNames": {"pattern": "^[a-z]$"}, "maxProperties": 0},
    "contains": object_of(
        a={"type": "array", "items": {"enum": [1, 2]}, "contains": {"const": 1}, "maxItems": 2}
    ),
    "lookahead": object_of(a={"type": "string", "pattern": "^(?=.*b)[ab]{1,2}$", "maxLength": 4}),
    "if": {**object_of(a={"enum": [1, 2]}), "if": {"properties": {"a": {"const": 1}}}, "then": {}},
    "tuple of draft 7": object_of(a={"type": "array", "items": [{"enum": [1]}], "additionalItems": False}),
    "bound of draft 4": object_of(
        a={"type": "integer", "minimum": 3, "exclusiveMinimum": True, "maximum": 5}
    ),
    "$defs": {"$defs": {"N": object_of(v={"enum": [1]})}, **object_of(a={"$ref": "#/$defs/N"})},
    "recursion": {
        "$defs": {"N": object_of(c={"anyOf": [{"$ref": "#/$defs/N"}, {"type": "null"}]})},
        "$ref": "#/$defs/N",
    },
    "all names of patterns": {
        "type": "object",
        "patternProperties": {"^(?!x)": {"enum": [1]}},
        "maxProperties": 0,
    },
}
