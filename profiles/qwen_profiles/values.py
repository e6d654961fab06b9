"""Types of single values in a profile."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from qwen_common.providers import PROVIDERS


def _known_provider(key: str) -> str:
    if key not in PROVIDERS:
        *others, last = map(repr, PROVIDERS)
        raise ValueError(f"Input should be {', '.join(others)} or {last}")
    return key


ProviderKey = Annotated[str, AfterValidator(_known_provider)]


def _thread_count(value: object) -> object:
    if value != "performance" and not (type(value) is int and 0 <= value <= 1024):
        raise ValueError("Input should be a number from 0 to 1024, or 'performance'")
    return value


ThreadCount = Annotated[int | Literal["performance"], BeforeValidator(_thread_count)]
PciId = Annotated[str, Field(pattern=r"^[0-9a-f]{4}:([0-9a-f]{4}|\*)$")]


def _expression(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"Input should be a regular expression ({error})") from error
    return text


Expression = Annotated[str, AfterValidator(_expression)]
# `true` is no number in TOML, and "32" is none.
Number = Annotated[float, Field(strict=True)]
Integer = Annotated[int, Field(strict=True)]
# More than any machine has, and few enough to compute with.
Amount = Annotated[Number, Field(gt=0, le=1e9)]
