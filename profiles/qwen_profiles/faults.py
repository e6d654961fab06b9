"""What the schema refuses in a profile, said in the words of who writes TOML."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

# pydantic speaks of Python's types.
_IN_TOML = {
    "tuple_type": 'Input should be a list, such as ["a", "b"]',
    "dict_type": "Input should be a table, such as {name = value}",
    "model_type": "Input should be a table, such as {name = value}",
}


def first_fault(error: ValidationError, model: type[BaseModel]) -> tuple[str, str]:
    """The field, with dots, that `error` refuses first ("" for the whole), and why."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"] if part != "[key]"]
    if first["type"] == "extra_forbidden":
        why = f"there is no such field{_meant(path, model)}"
    else:
        why = _IN_TOML.get(first["type"], first["msg"].removeprefix("Value error, "))
    return ".".join(path), why


def _meant(path: Sequence[str], model: type[BaseModel]) -> str:
    """The field that was meant: one of the same table that reads like it, or one of another of that name."""
    name = path[-1].strip().lower()
    if near := difflib.get_close_matches(name, list(_table(path[:-1], model).model_fields), n=1, cutoff=0.5):
        return f": did you mean '{near[0]}'?"
    elsewhere = [found for found in _paths(model) if found.rpartition(".")[2] == name]
    return f": did you mean '{elsewhere[0]}'?" if elsewhere else ": `qwen-export profiles --json` shows all"


def _table(path: Sequence[str], model: type[BaseModel]) -> type[BaseModel]:
    """The model of the table at `path`; roles and layers in it stand for themselves."""
    for part in path:
        if part in model.model_fields:
            model = _below(model.model_fields[part].annotation) or model
    return model


def _paths(model: type[BaseModel], above: str = "") -> list[str]:
    found = []
    for name, field in model.model_fields.items():
        below = _below(field.annotation)
        found += _paths(below, f"{above}{name}.") if below else [above + name]
    return found


def _below(annotation: Any) -> type[BaseModel] | None:
    """The model of the table, or of the tables in a table, that a field of this type holds."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _below(part))), None)
