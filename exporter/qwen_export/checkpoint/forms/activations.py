"""Scales of activations and of the KV cache, which a quantised checkpoint has beside its weights."""

from __future__ import annotations

import re
from collections.abc import Iterable

from qwen_common.errors import UserError

from qwen_export.checkpoint.tensors.plain import PlainTensor

_NAMES = re.compile(
    r".*\.(?:(?:gate_up_proj_|down_proj_)?(?:input|output|activation)|query|[qkv]|kv|kv_cache|[kv]_cache)"
    r"(?:_global)?_(?:scale|zero_point)"
)


def refuse_scaled_activations(stored: Iterable[str]) -> None:
    """Raises:
    UserError: inputs would have to be multiplied by something before the weights (AWQ's and SVDQuant's).
    """
    for name in stored:
        if name.endswith((".pre_quant_scale", ".weight_quantizer.svdquant_lora_a")):
            raise UserError(
                f"tensor {name} scales a projection's inputs, which is not supported yet: give the "
                "checkpoint in bf16"
            )


def drop_activation_scales(stored: dict[str, PlainTensor]) -> list[str]:
    """Take them out of `stored`; returns a note if there were any."""
    names = [name for name in stored if _NAMES.fullmatch(name)]
    for name in names:
        del stored[name]
    if not names:
        return []
    first = names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
    return [f"left out, because activations and KV cache are as the profile says: their scales {first}"]
