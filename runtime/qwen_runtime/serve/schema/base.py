"""How requests are read: JSON's numbers, `null`, fields that nobody obeys, and errors that name the field."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from qwen_runtime.serve.errors import ApiError


class Part(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)


class Options(Part):
    """Fields that may be left out; `null` leaves one out too."""

    @model_validator(mode="before")
    @classmethod
    def _leave_out_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if value is not None}


class Body(Options):
    """The body of a request.

    Fields that nobody here knows are ignored, as other servers do. Of those in `unsupported`, which would
    change the answer, only the values that change nothing are taken.
    """

    model_config = ConfigDict(extra="allow")
    unsupported: ClassVar[Mapping[str, Sequence[Any]]] = {}


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


# JSON has one kind of number, so 1 is a float too, and 1.0 an integer.
Number = Annotated[float, Field(strict=False)]
Integer = Annotated[int, BeforeValidator(_whole)]

AnyBody = TypeVar("AnyBody", bound=Body)


def parse(kind: type[AnyBody], body: bytes) -> AnyBody:
    """The request in `body`.

    Raises:
        ApiError: it is not JSON, or not such a request; the message names the field.
    """
    try:
        found = kind.model_validate_json(body)
    except ValidationError as error:
        raise _refused(error, body) from error
    for name, value in (found.model_extra or {}).items():
        if name in kind.unsupported and value not in (allowed := kind.unsupported[name]):
            only = " or ".join(json.dumps(choice) for choice in allowed)
            message = f"only {only} is supported" if allowed else "not supported"
            raise ApiError(400, f"{name}: {message}", code="unsupported_parameter", parameter=name)
    return found


def _refused(error: ValidationError, body: bytes) -> ApiError:
    """The error that reached deepest into the body: of a choice's branches, the one that was meant.

    Of several, one whose type is right.
    """
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        given = None
    errors = error.errors(include_url=False)
    paths = [_path(found["loc"], given) for found in errors]
    right = [not found["type"].endswith("_type") for found in errors]
    at = max(range(len(errors)), key=lambda at: (len(paths[at]), right[at]))
    first, place = errors[at], ".".join(paths[at])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "union_tag_invalid":
        tag, expected = first["ctx"]["tag"], first["ctx"]["expected_tags"]
        message = f"type '{tag}' is not supported, only {expected}"
    return ApiError(
        400, f"{place}: {message}" if place else message, code=first["type"], parameter=place or None
    )


def _path(steps: Sequence[int | str], given: Any) -> list[str]:
    """The steps that lead somewhere in `given`, and the name of a field that is missing: pydantic adds the
    names of its own types."""
    found: list[str] = []
    for at, step in enumerate(steps):
        inside = isinstance(given, list) and isinstance(step, int) and step < len(given)
        if inside or (isinstance(given, dict) and step in given):
            given = given[step]
            found.append(str(step))
        elif isinstance(given, dict) and at == len(steps) - 1:
            found.append(str(step))
    return found
