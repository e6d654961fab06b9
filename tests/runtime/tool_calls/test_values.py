"""Arguments by their schemas: what each text stands for."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.answers import argument, call, pieces, read_answer

TEXT: Any = {"type": "string"}
DEFINITIONS: Any = {
    "Id": {"type": "string"},
    "Count": {"type": "integer"},
    "Alias": {"$ref": "#/$defs/Count"},
    "Circle": {"$ref": "#/$defs/Circle"},
    "a/b": {"type": "boolean"},
    "Unit": {"enum": ["km", "mi"]},
    "Node": {
        "type": "object",
        "properties": {"value": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#/$defs/Node"}, {}]}},
    },
}


def optional(schema: Any) -> Any:
    """As pydantic writes it."""
    return {"anyOf": [schema, {"type": "null"}], "default": None}


def one_of(*schemas: Any) -> Any:
    return {"anyOf": list(schemas)}


CASES: list[tuple[Any, str, Any]] = [
    # Text stays text, whatever it looks like.
    (TEXT, "90210", "90210"),
    (TEXT, "null", "null"),
    (TEXT, "None", "None"),
    (TEXT, "true", "true"),
    (TEXT, '{"a": 1}', '{"a": 1}'),
    (TEXT, '"quoted"', '"quoted"'),
    (TEXT, "", ""),
    (TEXT, "  two  ", "  two  "),
    (TEXT, "a\tb\\n\x07", "a\tb\\n\x07"),
    (TEXT, "\ud800", "\ufffd"),
    ({}, "12", "12"),
    ({"description": "anything"}, "[1]", "[1]"),
    (True, "12", "12"),
    ({"minLength": 2}, "12", "12"),
    ({"pattern": "^[0-9]+$"}, "12", "12"),
    ({"type": "nonsense"}, "12", "12"),
    # Text or null.
    (optional(TEXT), "90210", "90210"),
    (optional(TEXT), "null", None),
    (optional(TEXT), "None", None),
    (optional(TEXT), "nullable", "nullable"),
    (optional(TEXT), "none of them", "none of them"),
    (optional(TEXT), "", ""),
    ({"type": ["string", "null"]}, "5", "5"),
    ({"type": ["string", "null"]}, "null", None),
    ({"type": "string", "nullable": True}, "null", None),
    ({"type": "string", "nullable": True}, "42", "42"),
    ({"type": "string", "nullable": False}, "null", "null"),
    (one_of({}, {"type": "null"}), "null", None),
    # Text or something else.
    ({"type": ["string", "integer"]}, "5", "5"),
    ({"type": ["integer", "string"]}, "5", "5"),
    (one_of({"type": "boolean"}, TEXT), "true", "true"),
    (one_of(TEXT, {"type": "array", "items": TEXT}), '["a", "b"]', ["a", "b"]),
    (one_of(TEXT, {"type": "array", "items": TEXT}), "[a", "[a"),
    (one_of(TEXT, {"type": "array", "items": TEXT}), "7", "7"),
    (one_of(TEXT, {"type": "array"}, {"type": "null"}), "null", None),
    (one_of(TEXT, {"type": "object"}), "['a']", "['a']"),
    # References.
    ({"$ref": "#/$defs/Id"}, "90210", "90210"),
    ({"$ref": "#/$defs/Count"}, "5", 5),
    ({"$ref": "#/$defs/Alias"}, "5", 5),
    ({"$ref": "#/$defs/a~1b"}, "True", True),
    ({"$ref": "#/$defs/Unit"}, "km", "km"),
    ({"$ref": "#/$defs/Node"}, '{"value": 1, "next": {"value": 2}}', {"value": 1, "next": {"value": 2}}),
    ({"$ref": "#/$defs/Node/properties/value"}, "5", 5),
    ({"$ref": "#/properties/other"}, "5", 5),
    ({"$ref": "#/$defs/Circle"}, "5", "5"),
    ({"$ref": "#/$defs/Missing"}, "5", "5"),
    ({"$ref": "https://example.org/schema"}, "5", "5"),
    (optional({"$ref": "#/$defs/Id"}), "90210", "90210"),
    (optional({"$ref": "#/$defs/Count"}), "None", None),
    # Parts of schemas.
    ({"allOf": [{"$ref": "#/$defs/Count"}], "description": "how many"}, "5", 5),
    ({"allOf": [{"minimum": 1}, {"type": "integer"}]}, "5", 5),
    ({"allOf": [{"type": ["string", "integer"]}, {"type": "string"}]}, "5", "5"),
    ({"oneOf": [{"type": "integer"}, {"type": "boolean"}]}, "true", True),
    ({"type": "integer", "anyOf": [{"minimum": 5}, {"maximum": 1}]}, "5", 5),
    # Choices.
    ({"enum": ["km", "5"]}, "5", "5"),
    ({"enum": [1, 2, 3]}, "2", 2),
    ({"enum": ["auto", 5, None, True]}, "5", 5),
    ({"enum": ["auto", 5, None, True]}, "auto", "auto"),
    ({"enum": ["auto", 5, None, True]}, "None", None),
    ({"enum": ["auto", 5, None, True]}, "True", True),
    ({"enum": ["none", None]}, "none", "none"),
    ({"enum": [1.0]}, "1", 1.0),
    ({"type": "string", "enum": ["1", "2"]}, "1", "1"),
    ({"const": "7"}, "7", "7"),
    ({"const": 7}, "7", 7),
    ({"const": {"a": 1}}, "{'a': 1}", {"a": 1}),
    (one_of({"const": "auto"}, {"type": "integer"}), "auto", "auto"),
    (one_of({"const": "auto"}, {"type": "integer"}), "5", 5),
    # Numbers.
    ({"type": "integer"}, "5.0", 5),
    ({"type": "integer"}, " 5 ", 5),
    ({"type": "integer"}, "-3", -3),
    ({"type": "integer"}, "+3", 3),
    ({"type": "integer"}, "007", 7),
    ({"type": "integer"}, "1e3", 1000),
    ({"type": "integer"}, '"5"', 5),
    ({"type": "integer"}, "5.5", 5.5),
    ({"type": "integer"}, "many", "many"),
    ({"type": "integer"}, "", ""),
    ({"type": "integer"}, "9" * 30, int("9" * 30)),
    ({"type": "integer"}, "9" * 5000, "9" * 5000),
    ({"type": ["integer", "null"]}, "null", None),
    ({"type": "number"}, "5.0", 5.0),
    ({"type": "number"}, ".5", 0.5),
    ({"type": "number"}, "NaN", "NaN"),
    ({"type": "number"}, "-Infinity", "-Infinity"),
    ({"type": "number"}, "inf", "inf"),
    ({"type": "number"}, "1e999", "1e999"),
    ({"maximum": 5}, "4.5", 4.5),
    ({"type": "int"}, "5", 5),
    ({"type": "float"}, "5.5", 5.5),
    # Booleans.
    ({"type": "boolean"}, "FALSE", False),
    ({"type": "boolean"}, "True", True),
    ({"type": "boolean"}, "true", True),
    ({"type": "boolean"}, "null", None),
    # Lists and objects.
    ({"type": "array"}, "[1, 2,]", [1, 2]),
    ({"type": "array"}, "['a', 'it\\'s', None]", ["a", "it's", None]),
    ({"type": "array"}, '["a", True, null]', ["a", True, None]),
    ({"type": "array"}, "(1, 2)", [1, 2]),
    ({"type": "array"}, "[-1.5, +2]", [-1.5, 2]),
    ({"items": {"type": "integer"}}, "[1, 2]", [1, 2]),
    ({"prefixItems": [{}]}, "[1]", [1]),
    ({"type": "array"}, "[1e999]", "[1e999]"),
    ({"type": "array"}, "[" * 5000, "[" * 5000),
    ({"type": "array"}, "[" * 500 + "]" * 500, "[" * 500 + "]" * 500),
    ({"type": "array"}, "[__import__('os')]", "[__import__('os')]"),
    ({"type": "array"}, "a, b", "a, b"),
    ({"type": "object"}, '{"text": "one\ntwo\tthree"}', {"text": "one\ntwo\tthree"}),
    ({"type": "object"}, '{\n  "a": [\n    1\n  ]\n}', {"a": [1]}),
    ({"type": "object"}, "{'a': {'b': False}, 2: 'c'}", {"a": {"b": False}, "2": "c"}),
    ({"type": "object"}, '"{\'a\': 1}"', {"a": 1}),
    ({"type": "object"}, '{"a": NaN}', '{"a": NaN}'),
    ({"type": "object"}, '{"a": "\\ud800", "b": "\\ud83d\\ude00"}', {"a": "\ufffd", "b": "😀"}),
    ({"type": "object"}, "{'b': '\\ud83d\\ude00'}", {"b": "😀"}),
    ({"properties": {"a": {}}}, '{"a": 1}', {"a": 1}),
    ({"additionalProperties": {"type": "integer"}}, '{"a": 1}', {"a": 1}),
    (optional({"type": "object"}), "None", None),
]  # fmt: skip


def arguments(schema: Any, written: str, size: int) -> str:
    parameters = {
        "type": "object",
        "properties": {"value": schema, "other": {"type": "integer"}},
        "$defs": DEFINITIONS,
    }
    tool = {"function": {"name": "f", "parameters": parameters}}
    message = read_answer(pieces(call("f", argument("value", written)), size), tools=[tool])
    return str(message["tool_calls"][0]["function"]["arguments"])


@pytest.mark.parametrize("size", [3, 100_000])
@pytest.mark.parametrize("schema,written,value", CASES)
def test_value(schema: Any, written: str, value: Any, size: int) -> None:
    found = arguments(schema, written, size)
    found.encode()  # nothing that UTF-8 does not have
    read = json.loads(found, parse_constant=pytest.fail)["value"]
    assert (read, type(read)) == (value, type(value))


def test_schemas_that_lead_in_circles() -> None:
    """Definitions that all refer to one another have more ways through them than anybody can follow."""
    names = [f"D{at}" for at in range(40)]
    all_of_them = [{"$ref": f"#/$defs/{name}"} for name in names]
    definitions = {name: {"anyOf": [*all_of_them, {"type": "integer"}]} for name in names}
    parameters = {"$defs": definitions, "properties": {"value": {"$ref": "#/$defs/D0"}}, "anyOf": all_of_them}
    tool = {"function": {"name": "f", "parameters": parameters}}
    message = read_answer([call("f", argument("value", "5"))], tools=[tool])
    assert message["tool_calls"][0]["function"]["arguments"] == '{"value": 5}'
