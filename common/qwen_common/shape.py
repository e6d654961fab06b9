"""Whether what JSON gave has the types that a TypedDict names: one description for mypy and for files."""

from __future__ import annotations

import types
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

_hints = cache(get_type_hints)
_MISSING = object()  # of no type that JSON has


def first_fault(value: object, kind: Any, name: str = "") -> str | None:
    """The first part of `value` that is not of the type `kind`; None where all of it is.

    Args:
        kind: a TypedDict, whose unnamed keys may hold anything; `dict[str, T]`, `list[T]`, `T | U`, `Any`,
            `Literal`; or `str`, `int`, `bool`, of which a bool is not an int.
        name: of `value` itself.

    Returns:
        Its name, with a dot before each key: "files.model.onnx.size".
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return name if value is _MISSING else None
    if origin is Literal:
        return None if value in arguments else name
    if origin in (Union, types.UnionType):
        return None if any(first_fault(value, choice) is None for choice in arguments) else name
    if origin is list and isinstance(value, list):
        parts = [(str(index), item, arguments[0]) for index, item in enumerate(value)]
    elif origin is dict and isinstance(value, dict):
        parts = [(key, item, arguments[1]) for key, item in value.items()]
    elif is_typeddict(kind) and isinstance(value, dict):
        parts = [
            (key, value.get(key, _MISSING), hint)
            for key, hint in _hints(kind).items()
            if key in value or key in kind.__required_keys__
        ]
    else:
        return None if type(value) is kind else name
    faults = (first_fault(item, hint, _dotted(name, key)) for key, item, hint in parts)
    return next((fault for fault in faults if fault is not None), None)


def _dotted(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key
