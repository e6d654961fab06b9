"""Which module a quantisation's configuration means: it has the names that its writer's model had."""

from __future__ import annotations

import re

from qwen_common.errors import UserError

from qwen_export.checkpoint.tensors.names import tensor_name

_MOST_SHOWN = 60  # characters of what somebody else's file says


def is_name_of(target: str, module: str) -> bool:
    """Whether `target`, however it is spelt, is the module that the model calls `module`."""
    return tensor_name(f"{target}.weight") == f"{module}.weight"


def matches(expression: str, module: str) -> bool:
    """Whether the regular expression fits the beginning of the module's name, in any of its spellings.

    Raises:
        UserError: it is none.
    """
    try:
        compiled = re.compile(expression)
    except re.error as error:
        shown = expression[:_MOST_SHOWN]
        raise UserError(
            f"config.json, quantization_config: {shown!r} is no regular expression ({error})"
        ) from error
    return any(compiled.match(spelling) for spelling in _spellings(module))


def _spellings(module: str) -> list[str]:
    """What other libraries' models call the module that ours calls `module`."""
    inner = module.removeprefix("model.")
    if module == "lm_head":
        return [module, f"language_model.{module}"]
    return [module, f"model.language_model.{inner}", f"language_model.model.{inner}", inner]
