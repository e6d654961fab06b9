"""Profiles as plain tables: found by name, read from TOML, laid over the one that they extend. No pydantic,
so that the runtime can read them too."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from qwen_common.errors import UserError
from qwen_common.files import parse_toml

# What `weights.body` stands for: most of the bytes, and what takes 4 bits well.
BODY = ("mlp", "experts")


def profile_names() -> list[str]:
    """Names of the shipped profiles, sorted."""
    names = [entry.name for entry in files("qwen_profiles").iterdir()]
    return sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml"))


def shipped_text(name: str) -> str:
    """The TOML text of a shipped profile.

    Raises:
        UserError: there is none of that name; the message has the nearest.
    """
    names = profile_names()
    if name not in names:
        near = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else f"there are: {', '.join(names)}"
        raise UserError(f"no profile '{name}': {hint}")
    return (files("qwen_profiles") / f"{name}.toml").read_text(encoding="utf-8")


def read_fields(name: str, text: str, below: tuple[str, ...] = ()) -> dict[str, Any]:
    """The fields of a profile over those of the one that it extends.

    Raises:
        UserError: it is not TOML, or extends what is not shipped or itself.
    """
    fields = merged({}, parse_toml(text, f"profile '{name}'"))
    parent = fields.pop("extends", None)
    if parent is None:
        return fields
    if not isinstance(parent, str) or parent in below:
        raise UserError(f"profile '{name}', field 'extends': give the name of one shipped profile")
    return merged(read_fields(parent, shipped_text(parent), (*below, parent)), fields)


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, table by table; weights' short forms are written out first."""
    if isinstance(weights := over.get("weights"), Mapping):
        over = {**over, "weights": _written_out(weights)}
    if isinstance(layers := over.get("layer_weights"), Mapping):
        written = {
            layer: _written_out(weights) if isinstance(weights, Mapping) else weights
            for layer, weights in layers.items()
        }
        over = {**over, "layer_weights": written}
    return _deep(base, over)


def _deep(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    deep = dict(base)
    for key, value in over.items():
        below = deep.get(key)
        both = isinstance(below, Mapping) and isinstance(value, Mapping)
        deep[key] = _deep(below, value) if both else value  # type: ignore[arg-type]
    return deep


def _written_out(weights: Mapping[str, Any]) -> dict[str, Any]:
    """`"int4"` as a table, and `body` as the roles that it stands for; roles named win over it."""
    tables = {role: {"precision": form} if isinstance(form, str) else form for role, form in weights.items()}
    body = tables.pop("body", None)
    return tables if body is None else _deep(dict.fromkeys(BODY, body), tables)
