"""A JSON schema as far as a grammar can carry it: what is left out is checked when the answer is there.

llguidance refuses what it does not know, and xgrammar leaves most of it out in silence. Both take what comes
out of here. Source: llguidance's docs/json_schema.md, xgrammar's json_schema_converter.cc, and runs of both.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from math import prod
from typing import Any

from qwen_runtime.tool_calls.texts import whole

_FORMATS = frozenset({"date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid"})
_LEFT_OUT = frozenset(
    {
        "$dynamicRef", "contains", "dependencies", "dependentRequired", "dependentSchemas", "else", "if",
        "maxContains", "minContains", "not", "propertyNames", "then", "unevaluatedItems",
        "unevaluatedProperties", "uniqueItems", "x-guidance",
    }
)  # fmt: skip
_SCHEMA = frozenset({"additionalProperties", "items"})  # keywords whose value is a schema, a list of them,
_LIST = frozenset({"allOf", "anyOf", "prefixItems"})
_MAP = frozenset({"$defs", "definitions", "patternProperties", "properties"})  # or an object of them
# What `left_out` names too: of these the grammar carries a part.
_NOT_WHOLLY = (_LEFT_OUT - {"x-guidance"}) | {"minProperties", "maxProperties", "oneOf"}
# Where schemas stand in schemas: as they are or in lists, and in objects.
_SCHEMAS = frozenset(
    {
        "additionalItems", "additionalProperties", "allOf", "anyOf", "contains", "else", "if", "items", "not",
        "oneOf", "prefixItems", "propertyNames", "then", "unevaluatedItems", "unevaluatedProperties",
    }
)  # fmt: skip
_MAPS = frozenset({"$defs", "definitions", "dependentSchemas", "patternProperties", "properties"})
_LOWER, _UPPER = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")
# llguidance takes no bound of more than 18 digits (some of them, by direction), and multiples of some eight.
_BOUND, _MULTIPLE, _PLACES = 10**18 - 64, 10**8, 9  # from 10**18 - 64 on a float is 10**18
_NEVER: tuple[Any, ...] = ({}, True)  # `not` of these allows nothing
_COUNT = re.compile(r"\{(\d{1,99})")
# Look-around, named groups and flags; references back; classes of Unicode; borders of words.
_IRREGULAR = re.compile(r"(?<!\\)(?:\\\\)*(?:\(\?(?!:)|\\[1-9kpPbB])")


def repetitions(pattern: str) -> int:
    """How often the counts of a regular expression repeat something at most, were they all within each
    other."""
    return prod(max(1, int(count)) for count in _COUNT.findall(pattern))


def carried(schema: Any) -> Any:
    """`schema` without what no grammar carries; it allows all that `schema` does, and perhaps more."""
    if not isinstance(schema, Mapping):
        return schema
    if schema.keys() == {"not"} and schema["not"] in _NEVER:
        return False
    modern = _modern(schema)
    found = {
        keyword: _value(keyword, value)
        for keyword, value in modern.items()
        if keyword not in _LEFT_OUT and not _unknown(keyword, value) and not _too_long(keyword, modern)
    }
    patterns = schema.get("patternProperties")
    if isinstance(patterns, Mapping) and any(map(is_irregular, patterns)):
        # Names that cannot be told by a grammar are others to it.
        regular = {
            name: value for name, value in found["patternProperties"].items() if not is_irregular(name)
        }
        found["patternProperties"] = regular
        found.pop("additionalProperties", None)
    return found


def inside(schema: Mapping[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """`schema` with each schema that stands in it changed."""

    def changed(keyword: str, value: Any) -> Any:
        if keyword in _SCHEMAS and isinstance(value, list):
            return [change(each) for each in value]
        if keyword in _SCHEMAS:
            return change(value)
        if keyword in _MAPS and isinstance(value, Mapping):
            return {name: change(each) for name, each in value.items()}
        return value

    return {keyword: changed(keyword, value) for keyword, value in schema.items()}


def left_out(schema: Any) -> Iterator[str]:
    """The keywords of which a grammar carries nothing, or not all."""
    if not isinstance(schema, Mapping):
        return
    for keyword, value in schema.items():
        if keyword in _NOT_WHOLLY and value is not False:
            yield keyword
        elif keyword in ("pattern", "patternProperties"):
            patterns = value if isinstance(value, Mapping) else [value]
            yield from (keyword for each in patterns if isinstance(each, str) and whole(each) is None)
        elif _too_long(keyword, schema) and not _wider_than_calls(schema):
            yield keyword
    found: list[Any] = []
    inside(schema, found.append)
    for each in found:
        yield from left_out(each)


def is_irregular(pattern: Any) -> bool:
    """Whether a regular expression has what no grammar carries."""
    return isinstance(pattern, str) and _IRREGULAR.search(pattern) is not None


def _unknown(keyword: str, value: Any) -> bool:
    return (keyword == "format" and value not in _FORMATS) or (keyword == "pattern" and is_irregular(value))


def _too_long(keyword: str, schema: Mapping[str, Any]) -> bool:
    """Whether a bound or a multiple has more digits than a grammar can be made of. llguidance takes any upper
    bound of integers, which is left out where the lower one is."""
    value = schema.get(keyword)
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    if keyword in _UPPER and value > 0 and schema.get("type") == "integer":
        return not abs(value) < _BOUND and any(_too_long(lower, schema) for lower in _LOWER)
    if keyword in (*_LOWER, *_UPPER):
        return not abs(value) < _BOUND
    if keyword != "multipleOf":
        return False
    number = Decimal(str(value))
    exponent = number.as_tuple().exponent
    places = max(0, -exponent) if isinstance(exponent, int) else _PLACES + 1
    return places > _PLACES or not number.scaleb(places) < _MULTIPLE


def _wider_than_calls(schema: Mapping[str, Any]) -> bool:
    """Whether an integer has no bounds but such as hold for every one of 18 digits. Calls have none that is
    longer, where no other bound is left."""
    longest = 10**18 - 1
    limits = {keyword: schema[keyword] for keyword in (*_LOWER, *_UPPER, "multipleOf") if keyword in schema}
    return schema.get("type") == "integer" and all(
        (keyword in _LOWER and value <= -longest) or (keyword in _UPPER and value >= longest)
        for keyword, value in limits.items()
    )


def _value(keyword: str, value: Any) -> Any:
    if keyword in _SCHEMA:
        return carried(value)
    if keyword in _LIST and isinstance(value, list):
        return [carried(each) for each in value]
    if keyword in _MAP and isinstance(value, Mapping):
        return {name: carried(each) for name, each in value.items()}
    return value


def _modern(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Older drafts' lists of items and bounds that are true or false, and `oneOf` as `anyOf`."""
    found = dict(schema)
    if isinstance(found.get("items"), list):
        found["prefixItems"] = found.pop("items")
        found["items"] = found.pop("additionalItems", True)
    for bound, exclusive in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        if isinstance(found.get(exclusive), bool) and found.pop(exclusive) and bound in found:
            found[exclusive] = found.pop(bound)
    if isinstance(found.get("oneOf"), list):
        either = found.pop("oneOf")
        if "anyOf" in found:
            both = found.get("allOf")
            found["allOf"] = [*(both if isinstance(both, list) else []), {"anyOf": either}]
        else:
            found["anyOf"] = either
    return found
