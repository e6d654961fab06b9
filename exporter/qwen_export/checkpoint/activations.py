"""Scales of activations and of the KV cache, which a quantised checkpoint has beside its weights."""

from __future__ import annotations

import re

from qwen_export.checkpoint.plain import PlainTensor

_NAMES = re.compile(
    r".*\.(?:input|output|query|[qkv]|kv|kv_cache|[kv]_cache|[qkv]_proj\.output)(?:_global)?_(?:scale|zero_point)"
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
