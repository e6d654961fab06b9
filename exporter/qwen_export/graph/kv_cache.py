"""What a KV cache in INT8 takes of the graph: tensors that are no checkpoint's, found on calibration text.

Codes are keys and values divided by a scale for each channel. GroupQueryAttention takes one scale for all, as
its kernels for a scale a channel are slower (docs/kernels.md), so that the graph divides: keys by what their
norm multiplies with anyway, queries times the same; values and the output by a product of their own.
"""

from __future__ import annotations

from qwen_export.architecture.models.qwen3_5 import TextConfig
from qwen_export.architecture.tensors import TensorSpec


def attention_blocks(config: TextConfig) -> dict[int, str]:
    """Names of full attention, by layer."""
    kinds = enumerate(config.layer_types)
    return {layer: f"model.layers.{layer}.self_attn" for layer, kind in kinds if kind == "full_attention"}


def scaled_norm(attention: str) -> str:
    """Of the block `attention`: q_norm's scale of each query head times that of the key's channel, then
    k_norm's of each key head divided by it, [heads + kv_heads, head_dim]."""
    return f"{attention}.scaled_qk_norm"


def value_scale(attention: str) -> str:
    """Of the values' channels, [kv_heads, head_dim]."""
    return f"{attention}.value_scale"


def cache_specs(config: TextConfig) -> dict[str, TensorSpec]:
    """All of them."""
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    specs = {}
    for name in attention_blocks(config).values():
        specs[scaled_norm(name)] = TensorSpec((heads + kv_heads, dim), "norm", None)
        specs[value_scale(name)] = TensorSpec((kv_heads, dim), "norm", None)
    return specs
