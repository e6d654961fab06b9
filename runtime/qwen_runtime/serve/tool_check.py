"""Tools whose calls must fit their schemas: what may be asked so, and the check of what came.

A grammar holds most of a schema while the call is written. What it does not carry is checked when the call
is there, as with forms of answers. A tool that is `strict` promises that arguments fit: there it is refused.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import regex
from referencing import Registry
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from qwen_runtime.grammar_schema import inside, left_out
from qwen_runtime.serve.errors import ApiError
from qwen_runtime.serve.json_check import check_schema, expands, fault, narrowed
from qwen_runtime.tool_calls.json_schema import proper_type

Check = Callable[[str], str | None]
Tool = dict[str, Any]

_SECONDS = 10.0  # of all tools' schemas together
_LONGEST_PATTERN = 10_000  # characters


def held_to_schemas(tools: Sequence[Tool], every: bool) -> tuple[list[Tool], dict[str, Check]]:
    """The tools as a grammar takes them, and what says by its name what is wrong with a function's arguments.

    Args:
        every: all calls are to fit, not those of strict tools only.

    Raises:
        ApiError: a schema is none, no grammar can promise it where it is strict, or they are too many.
    """
    found: list[Tool] = []
    checks: dict[str, Check] = {}
    begun = time.monotonic()
    for at, tool in enumerate(tools):
        function = tool["function"]
        strict = bool(function.get("strict"))
        if (every or strict) and function.get("parameters"):
            field = f"tools.{at}.function.parameters"
            if time.monotonic() - begun > _SECONDS:
                message = f"{field}: to check the schemas of so many tools takes too long: ask for fewer"
                raise ApiError(400, message, code="invalid_json_schema", parameter=field)
            schema, draft, narrow = _prepared(json.dumps(function["parameters"]), strict, field)
            name = f"the call of {function['name']}"
            checks[function["name"]] = partial(fault, schema, draft, name=name)
            function = {**function, "parameters": narrow}
        found.append({**tool, "function": function})
    return found, checks


@lru_cache(maxsize=256)  # an agent sends the same tools with every request
def _prepared(text: str, strict: bool, field: str) -> tuple[Mapping[str, Any], Any, Mapping[str, Any]]:
    """The schema in `text` for a check, its draft, and the schema for a grammar."""
    given = json.loads(text)
    schema = given if strict else _proper(given)
    draft = check_schema(schema, field)
    resolver = Registry().resolver_with_root(DRAFT202012.create_resource(schema))
    if broken := next(_broken(schema, resolver.lookup), None):
        raise ApiError(400, f"{field}: {broken}", code="invalid_json_schema", parameter=field)
    if strict and (keyword := next(left_out(schema), None)):
        message = f"strict: no grammar carries all of '{keyword}': leave it out, or leave strict off"
        raise ApiError(400, f"{field}: {message}", code="invalid_json_schema", parameter=field)
    return schema, draft, narrowed(schema, draft, field)


def _broken(schema: Any, lookup: Callable[[str], Any]) -> Iterator[str]:
    """References that lead nowhere, and patterns that are no regular expressions."""
    if not isinstance(schema, Mapping):
        return
    if isinstance(reference := schema.get("$ref"), str):
        try:
            lookup(reference)
        except Unresolvable:
            yield f"$ref to '{reference[:100]}', which is not there"
        except Exception:  # through what is no schema, or from an address that is none: nearly anything
            yield f"$ref to '{reference[:100]}', which cannot be followed"
    named = schema.get("patternProperties")
    for pattern in [schema.get("pattern"), *(named if isinstance(named, Mapping) else ())]:
        if isinstance(pattern, str) and (fault := _no_pattern(pattern)):
            yield f"'{pattern[:100]}' is no regular expression: {fault}"
    found: list[Any] = []
    inside(schema, found.append)
    for each in found:
        yield from _broken(each, lookup)


def _no_pattern(pattern: str) -> str | None:
    if len(pattern) > _LONGEST_PATTERN:
        return f"more than {_LONGEST_PATTERN} characters"
    if expands(pattern):
        return "its counts multiply to more than can be checked"
    try:
        regex.compile(pattern)
    except regex.error as error:
        return str(error.msg)
    except Exception as error:  # such as RecursionError
        return type(error).__name__
    return None


def _proper(schema: Any) -> Any:
    """What people write by hand, as JSON Schema has it: names of types, and OpenAPI's `nullable`."""
    if not isinstance(schema, Mapping):
        return schema
    found = inside(schema, _proper)
    nullable = found.pop("nullable", None) is True
    if "type" in found:
        names = found["type"] if isinstance(found["type"], list) else [found["type"]]
        proper = [proper_type(name) for name in names]
        found["type"] = list(dict.fromkeys(name for name in proper if name is not None))
        if None in proper:
            del found["type"]
    return {"anyOf": [found, {"type": "null"}]} if nullable else found
