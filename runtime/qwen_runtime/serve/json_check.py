"""Whether an answer is what a JSON schema asks for: grammars do not carry all of it.

By jsonschema. Schemas and regular expressions come from clients and may take for ever: a few definitions that
refer to each other twice are billions of steps. So both have a limit of time.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import attrs
import regex
from jsonschema import Draft4Validator, Draft7Validator, Draft202012Validator, SchemaError, ValidationError
from jsonschema.exceptions import best_match
from jsonschema.validators import extend
from referencing import Registry

from qwen_runtime.grammar_schema import inside, repetitions
from qwen_runtime.serve.errors import ApiError

_DRAFTS = (Draft202012Validator, Draft7Validator, Draft4Validator)
_MOST_CHARACTERS = 100_000  # of a schema
_PATTERN_SECONDS = 0.2
_MOST_COUNTED = 10_000  # repetitions, of counts within each other
_SECONDS = 5.0  # of a whole answer
_SCHEMA_SECONDS = 10.0  # of a schema
_LONGEST_REASON = 300  # characters


def check_schema(schema: Mapping[str, Any], field: str) -> Any:
    """The draft that `schema` is a schema of, for `fault`.

    Raises:
        ApiError: it is no schema of any draft, refers to other documents, or is very large.
    """
    if len(json.dumps(schema)) > _MOST_CHARACTERS:
        raise _refused(field, f"the schema has more than {_MOST_CHARACTERS} characters")
    try:
        draft = _draft(schema)
    except TimeoutError:
        raise _refused(field, "to check the schema takes too long: make it smaller") from None
    except SchemaError as error:
        raise _refused(field, f"{_at(error, '.')}{error.message}") from error
    if far := next(_far_references(schema), None):
        raise _refused(field, f"$ref to '{far}', and nothing is fetched: put it in $defs")
    return draft


def fault(schema: Mapping[str, Any], draft: Any, answer: str, name: str = "the answer") -> str | None:
    """What of `answer` is not as `schema` asks; None where nothing is, or where it is no whole JSON.

    Args:
        name: what it is called.
    """
    try:
        value = json.loads(answer)
    except (ValueError, RecursionError):
        return None
    try:
        checker = _with_limits(draft, _SECONDS)(schema, registry=Registry())
        found = min(checker.iter_errors(value), key=lambda error: len(error.absolute_path), default=None)
    except TimeoutError:
        return f"{name} could not be checked: it takes too long"
    except Exception as error:  # a reference that leads nowhere or in a circle, a pattern that is none
        return f"{name} could not be checked: {type(error).__name__}"
    return None if found is None else f"{name} does not match the schema: {_at(found, '/')}{_short(found)}"


def narrowed(schema: Mapping[str, Any], draft: Any, field: str) -> dict[str, Any]:
    """`schema` with those values of `enum` and `const` only that its other keywords take.

    Raises:
        ApiError: none is left.
    """
    checker = _with_limits(draft, _SECONDS)(schema, registry=Registry())

    def narrow(inner: Any) -> Any:
        if not isinstance(inner, Mapping):
            return inner
        found = inside(inner, narrow)
        values = [inner["const"]] if "const" in inner else inner.get("enum")
        if isinstance(values, list) and len(inner) > 1:
            fitting = [value for value in values if checker.evolve(schema=inner).is_valid(value)]
            if not fitting:
                raise _refused(field, f"no value of {_short_list(values)} fits the rest of its schema")
            if len(fitting) < len(values):
                found["enum"] = fitting
        return found

    try:
        narrow_schema: dict[str, Any] = narrow(schema)
    except TimeoutError:
        raise _refused(field, "to check the schema takes too long: make it smaller") from None
    except ApiError:
        raise
    except Exception as error:  # as in `fault`
        raise _refused(field, f"the schema could not be checked: {type(error).__name__}") from error
    return narrow_schema


def _draft(schema: Mapping[str, Any]) -> Any:
    """The newest draft that `schema` is a schema of.

    Raises:
        SchemaError: it is of none, as the newest says it.
        TimeoutError: it takes too long.
    """
    first: SchemaError | None = None
    for draft in _DRAFTS:
        try:
            error = next(
                _with_limits(draft, _SCHEMA_SECONDS)(draft.META_SCHEMA).iter_errors(dict(schema)), None
            )
        except RecursionError:
            break
        if error is None:
            return draft
        first = first or SchemaError.create_from(best_match([error]))
    raise first or SchemaError("it is nested too deeply")


def _with_limits(draft: Any, seconds: float) -> Any:
    """`draft`, whose keywords raise `TimeoutError` after so many seconds from now."""
    end = time.monotonic() + seconds

    def timed(keyword: Callable[..., Any]) -> Callable[..., Iterator[ValidationError]]:
        def check(validator: Any, wanted: Any, value: Any, schema: Any) -> Iterator[ValidationError]:
            if time.monotonic() > end:
                raise TimeoutError
            yield from keyword(validator, wanted, value, schema) or ()

        return check

    ours = {
        "pattern": _pattern,
        "patternProperties": _pattern_properties,
        "additionalProperties": _additional_properties,
        "uniqueItems": _unique_items,
    }
    limited = extend(draft, {name: timed(keyword) for name, keyword in {**draft.VALIDATORS, **ours}.items()})
    limited.evolve = _evolve
    return limited


def _evolve(validator: Any, **changes: Any) -> Any:
    """As jsonschema's, which leaves the limits behind where a part of a schema has a `$schema` of its own."""
    kept = {
        field.alias: getattr(validator, field.name) for field in attrs.fields(type(validator)) if field.init
    }
    return type(validator)(**{**kept, **changes})


def expands(pattern: str) -> bool:
    """Whether to compile `pattern` may take for ever: the library writes each count out, and no limit of time
    ends that."""
    return repetitions(pattern) > _MOST_COUNTED


def _matches(pattern: str, text: str) -> bool:
    if expands(pattern):
        raise TimeoutError
    return regex.search(pattern, text, timeout=_PATTERN_SECONDS) is not None


def _pattern(validator: Any, pattern: str, value: Any, schema: Any) -> Iterator[ValidationError]:
    if isinstance(value, str) and not _matches(pattern, value):
        yield ValidationError(f"{value!r} does not match {pattern!r}")


def _pattern_properties(validator: Any, patterns: Any, value: Any, schema: Any) -> Iterator[ValidationError]:
    for pattern, inner in patterns.items() if isinstance(value, dict) else ():
        for name, each in value.items():
            if _matches(pattern, name):
                yield from validator.descend(each, inner, path=name, schema_path=pattern)


def _additional_properties(validator: Any, inner: Any, value: Any, schema: Any) -> Iterator[ValidationError]:
    if not isinstance(value, dict):
        return
    patterns = schema.get("patternProperties", {})
    for name, each in value.items():
        if name in schema.get("properties", {}) or any(_matches(pattern, name) for pattern in patterns):
            continue
        if inner is False:
            yield ValidationError(f"{name!r} is one property too many")
        else:
            yield from validator.descend(each, inner, path=name)


def _unique_items(validator: Any, wanted: Any, value: Any, schema: Any) -> Iterator[ValidationError]:
    """By their texts: jsonschema compares each with each, minutes for some thousand objects."""
    if not wanted or not isinstance(value, list):
        return
    items = json.loads(json.dumps(value), parse_float=_number)
    if len({json.dumps(item, sort_keys=True) for item in items}) < len(items):
        yield ValidationError(f"{value!r} has non-unique elements")


def _number(text: str) -> float:
    """1.0 is 1."""
    number = float(text)
    return int(number) if number.is_integer() else number


def _far_references(schema: Any) -> Iterator[str]:
    for each in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        yield from _far_references(each)
    if isinstance(schema, dict):
        reference = schema.get("$ref")
        if isinstance(reference, str) and not reference.startswith("#"):
            yield reference


def _at(error: SchemaError | ValidationError, separator: str) -> str:
    place = separator.join(str(step) for step in error.absolute_path)
    return f"{place}: " if place else ""


def _short(error: ValidationError) -> str:
    return error.message if len(error.message) <= _LONGEST_REASON else f"{error.validator} does not hold"


def _short_list(values: list[Any]) -> str:
    text = json.dumps(values, ensure_ascii=False)
    return text if len(text) <= _LONGEST_REASON // 3 else f"{text[: _LONGEST_REASON // 3]}..."


def _refused(field: str, message: str) -> ApiError:
    short = message if len(message) <= _LONGEST_REASON else f"{message[:_LONGEST_REASON]}..."
    return ApiError(400, f"{field}: {short}", code="invalid_json_schema", parameter=field)
