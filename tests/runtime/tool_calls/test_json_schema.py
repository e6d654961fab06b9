"""What a schema allows, where it is made to take long."""

from __future__ import annotations

import time
from typing import Any

import pytest
from qwen_runtime.tool_calls.json_schema import allowed, forms


def doubled(levels: int, other: str) -> dict[str, Any]:
    """Every level refers to the next one twice: as many ways as 2 ** levels lead to the last."""
    last = {"properties": {"x": {"type": "integer"}}, "required": ["x"]}
    definitions: dict[str, Any] = {f"a{levels}": last, f"b{levels}": last}
    for at in range(levels):
        both = [{"$ref": f"#/$defs/a{at + 1}"}, {"$ref": f"#/$defs/{other}{at + 1}"}]
        definitions |= {f"a{at}": {"allOf": both}, f"b{at}": {"allOf": list(both)}}
    return {"$defs": definitions, "$ref": "#/$defs/a0"}


@pytest.mark.parametrize("other", ["a", "b"])
def test_references_that_multiply_are_read_in_time(other: str) -> None:
    schema = doubled(60, other)
    begun = time.process_time()
    (form,) = forms(schema, schema)
    assert form.required == {"x"}
    assert allowed(form.properties["x"], schema).kinds == {"integer"}
    assert time.process_time() - begun < 2


def test_long_lists_of_values_are_read_in_time() -> None:
    some = {"enum": [*range(20_000), "a", True, None]}
    begun = time.process_time()
    found = allowed({"allOf": [some, {"enum": [*range(10_000, 30_000), "a", 1, 1.0]}]}, {})
    assert len(found.values) == 10_000 + 2
    assert found.names(15_000.0) and found.names("a") and not found.names(True) and not found.names(9)
    assert time.process_time() - begun < 2


def test_what_is_nested_too_deeply_allows_anything() -> None:
    nested: Any = {"type": "integer"}
    for _ in range(5_000):
        nested = {"allOf": [nested]}
    chain = {f"a{at}": {"$ref": f"#/$defs/a{at + 1}"} for at in range(5_000)}
    schema = {"$defs": chain, "$ref": "#/$defs/a0"}
    assert allowed(nested, nested).text and allowed(schema, schema).text
    assert len(forms(nested, nested)) == len(forms(schema, schema)) == 1


def test_branches_that_are_no_objects_are_no_forms() -> None:
    """However far a reference leads to them; what contradicts itself keeps what it says."""
    schema: dict[str, Any] = {"$defs": {"text": {"type": "string"}, "far": {"$ref": "#/$defs/text"}}}
    one, properties = {"required": ["a"]}, {"a": {}}
    schema |= {"properties": properties, "anyOf": [one, {"$ref": "#/$defs/far"}, {"type": "null"}, False]}
    assert [(form.properties, form.required) for form in forms(schema, schema)] == [(properties, {"a"})]
    (alone,) = forms({"properties": properties, "allOf": [{"type": "string"}]}, {})
    assert alone.properties == properties
