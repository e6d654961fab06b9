"""From config.json's model_type to the file of `models` that describes it; from any tensor to its role."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import Any

from qwen_common.errors import UserError
from qwen_profiles.schema import Role

from qwen_export.architecture import models, vision
from qwen_export.architecture.models.qwen3_5 import TextConfig

# What its blocks would need is in docs/architecture.md.
_NOT_SUPPORTED = {
    "qwen4_exp": "Qwen3.8-Flash-Next, an early Qwen4: sparse attention by an indexer, hyper-connections and "
    "hashed n-gram embeddings, for which there are no graphs here"
}
_TEXT = "_text"  # ends a text model's model_type; without it the text model is a section of config.json


def config_class(model_type: str) -> type[TextConfig]:
    """The configuration class of `model_type`, with or without `_text` at its end.

    Raises:
        UserError: the model type is not supported.
    """
    name = model_type.removesuffix(_TEXT)
    if name not in _names():
        reason = _NOT_SUPPORTED.get(name)
        raise UserError(
            f"model type '{model_type}' is not supported{f' ({reason})' if reason else ''}: supported are "
            + ", ".join(known for name in _names() for known in _spellings(name))
        )
    return _class(name)


def _spellings(name: str) -> tuple[str, ...]:
    return (name + _TEXT, name) if _class(name).has_text_section else (name,)


def _class(name: str) -> type[TextConfig]:
    found: type[TextConfig] = import_module(f"{models.__name__}.{name}").CONFIG
    return found


def text_section(content: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config.json that describes the text model: a section of it, or all. AutoRound writes the
    latter under the model_type of the whole.

    Raises:
        KeyError: there is none.
        UserError: as `config_class`.
    """
    model_type = str(content["model_type"])
    alone = model_type.endswith(_TEXT) or not config_class(model_type).has_text_section
    alone = alone or ("hidden_size" in content and "text_config" not in content)
    return dict(content if alone else content["text_config"])


def recipe_role(name: str) -> Role | None:
    """The recipe's role of the tensor `name` of any model; None where it has none.

    A tied embedding is an embedding here: only a configuration tells (`TextConfig.tensors`).
    """
    tables = (*(config_class(known).table for known in _names()), vision.TABLE)
    return next((row.recipe_role for table in tables for row in table if row.matches(name)), None)


@cache
def _names() -> tuple[str, ...]:
    return tuple(sorted(module.name for module in pkgutil.iter_modules(models.__path__)))
