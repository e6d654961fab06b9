"""Arguments that are written without JSON's quotes, as the values that they stand for.

A text stays a text wherever the schema takes one. Other values are JSON, or what models that have seen much
Python write in its place: `True`, `None`, lists and objects with single quotes. What is none of them stays
the text that it is. What JSON does not have - NaN, infinity, half a surrogate pair - never comes out.
"""

from __future__ import annotations

import ast
import json
import math
import re
import warnings
from collections.abc import Mapping
from typing import Any, NoReturn

from qwen_runtime.tool_calls.json_schema import Allowed, kind_of, same

_WORDS = {"true": True, "false": False, "null": None, "none": None}
_NULL = ("null", "none")
_DEEPEST = 100  # levels of a value, which others have to read too
_LONGEST = 100_000  # characters of a Python literal
_SURROGATE = re.compile("[\ud800-\udfff]")


def value_of(text: str, allowed: Allowed) -> Any:
    """The value that `text` stands for."""
    if text in [value for value in allowed.values if isinstance(value, str)]:
        return text
    if allowed.null and text.lower() in _NULL:
        return None
    if allowed.text:
        return _container(text, allowed) if allowed.containers else without_surrogates(text)
    try:
        value = _parse(text.strip())
    except (ValueError, RecursionError):
        return without_surrogates(text)
    for other in allowed.values:
        if same(value, other):
            return other
    if isinstance(value, str) and value != text:  # in quotes, which a value of another type has no use for
        return value_of(value, allowed)
    if isinstance(value, float) and value.is_integer() and not allowed.has(value) and allowed.has(int(value)):
        return int(value)
    return value


def read(text: str, allowed: Allowed) -> Any:
    """The value of `text` in a dialect that writes texts in quotes: a text only if it is nothing else."""
    try:
        value = _parse(text.strip())
    except (ValueError, RecursionError):
        return without_surrogates(text)
    whole = isinstance(value, float) and value.is_integer() and not allowed.has(value)
    return int(value) if whole and allowed.has(int(value)) else value


def grows(allowed: Allowed) -> bool:
    """Whether a value is its text, so that it can be passed on before its end is known."""
    return allowed.text and not allowed.containers


def undecided(text: str, allowed: Allowed) -> bool:
    """Whether a value that `grows` may still turn out not to be its text."""
    return allowed.null and any(word.startswith(text.lower()) for word in _NULL)


def begun(text: str, allowed: Allowed) -> str:
    """The beginning of the JSON of a value of which `text` is the beginning, as far as it is certain."""
    if undecided(text, allowed):
        return ""
    if allowed.containers and text.lstrip()[:1] in ("[", "{"):
        return text.strip()
    names = [value for value in allowed.values if isinstance(value, str)]
    if allowed.text or (text and any(name.startswith(text) for name in names)):
        return f'"{escaped(text)}'
    number = not allowed.kinds.isdisjoint(("integer", "number"))
    return text.strip() if number and re.fullmatch(r"\s*-?(0|[1-9]\d*)(\.\d+)?\s*", text) else ""


def escaped(text: str) -> str:
    """`text` as it stands inside a string of JSON."""
    return json.dumps(without_surrogates(text), ensure_ascii=False)[1:-1]


def without_surrogates(text: str) -> str:
    """Halves of surrogate pairs cannot be written as UTF-8; whole pairs become their character."""
    if not _SURROGATE.search(text):
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _container(text: str, allowed: Allowed) -> Any:
    """A list or an object where the schema takes it beside text, and that is what `text` is."""
    try:
        value = _parse(text.strip())
    except (ValueError, RecursionError):
        value = text
    return value if kind_of(value) in allowed.containers else without_surrogates(text)


def _parse(text: str) -> Any:
    """Raises:
    ValueError, RecursionError: `text` is no value.
    """
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        # Not strict: strings may have raw line breaks.
        return _clean(json.loads(text, strict=False, parse_constant=_refuse, parse_float=_finite))
    except ValueError:
        pass
    if text[:1] in ("[", "{", "(", '"', "'"):
        return _clean(_literal(_syntax(text)))
    try:
        return int(text)
    except ValueError:
        return _finite(text)


def _clean(value: Any, depth: int = 0) -> Any:
    if depth > _DEEPEST:
        raise ValueError("nested too deeply")
    if isinstance(value, str):
        return without_surrogates(value)
    if isinstance(value, list):
        return [_clean(each, depth + 1) for each in value]
    if isinstance(value, Mapping):
        return {without_surrogates(key): _clean(each, depth + 1) for key, each in value.items()}
    return value


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"JSON has no {constant}")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"JSON has no {number}")
    return number


def _syntax(text: str) -> ast.expr:
    """Raises:
    ValueError: `text` is no Python expression, or more than one need read.
    """
    if len(text) > _LONGEST:
        raise ValueError("too long")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # of escapes such as \d
            warnings.simplefilter("ignore", DeprecationWarning)
            return ast.parse(text, mode="eval").body
    except (SyntaxError, MemoryError) as error:
        raise ValueError("no Python expression") from error


def _literal(node: ast.expr) -> Any:
    """The value of a literal, with JSON's words among Python's. Raises ValueError for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str | int | float | None):
        return _finite(str(node.value)) if isinstance(node.value, float) else node.value
    if isinstance(node, ast.Name) and node.id.lower() in _WORDS:
        return _WORDS[node.id.lower()]
    if isinstance(node, ast.List | ast.Tuple | ast.Set):
        return [_literal(each) for each in node.elts]
    if isinstance(node, ast.Dict):
        keys = [_key(key) for key in node.keys]
        return dict(zip(keys, map(_literal, node.values), strict=True))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        number = _literal(node.operand)
        if isinstance(number, int | float) and not isinstance(number, bool):
            return -number if isinstance(node.op, ast.USub) else number
    raise ValueError("no literal")


def _key(node: ast.expr | None) -> str:
    """JSON's names are texts: those of Python that are not are written as JSON."""
    if node is None:
        raise ValueError("no literal")
    key = _literal(node)
    return key if isinstance(key, str) else json.dumps(key)
