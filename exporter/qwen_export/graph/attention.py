"""Full attention: grouped queries, q/k norm, partial rotary embedding, and an output gate."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from qwen_common.errors import UserError

from qwen_export.architecture.models.qwen3_5 import TextConfig
from qwen_export.graph.builder import GraphBuilder, Value
from qwen_export.graph.kv_cache import scaled_norm, value_scale
from qwen_export.graph.linear import linear, projection
from qwen_export.graph.norm import rms_norm, rms_norm_by_head
from qwen_export.graph.recipe import Recipe
from qwen_export.graph.rotary import Rotation, rotate
from qwen_export.graph.targets import Target
from qwen_export.graph.tokens import each_token, joined
from qwen_export.graph.weights import Rows, Weight, one_plus

_HEAD_MULTIPLE = 8  # GroupQueryAttention's
_NO_ROTATION_BIAS_SINK = (None,) * 5  # inputs between the lengths and the scales
_MASKED = -1e30  # added to float32 scores


def check_heads(config: TextConfig, target: Target) -> None:
    """Refuse a size of heads that the kernels of `target` do not take.

    Measured on the CPU, onnxruntime 1.32, for 4 to 1024 and every rotary dimension: nothing else is refused.

    Raises:
        UserError: it is one.
    """
    if target.has("GroupQueryAttention") and config.head_dim % _HEAD_MULTIPLE:
        raise UserError(
            f"config.json: head_dim is {config.head_dim}, and the fused lowering's GroupQueryAttention takes "
            f"multiples of {_HEAD_MULTIPLE}: export with --set lowering=portable"
        )


@dataclass(frozen=True)
class Span:
    """Which keys the queries of one of `each_token` may see; made once for all layers.

    GroupQueryAttention takes two lengths; without it `mask` float32 [1, 1, groups * sequence, total] is
    added to the scores, where row g * sequence + t belongs to token t.
    """

    last_key: Value | None = None
    total_length: Value | None = None
    mask: Value | None = None


def spans(g: GraphBuilder, config: TextConfig, attention_mask: Value, run: Value) -> list[Span]:
    """From `attention_mask` int64 [batch, total], all ones: one sequence, without padding.

    `run` [batch, sequence, ...] is this run's input.
    """
    if g.target.has("GroupQueryAttention"):
        count = g.op("ReduceSum", attention_mask, g.ints(1), keepdims=0)
        last_key = g.cast(g.op("Sub", count, g.constant(1, np.int64)), np.int32)
        total = g.cast(g.op("Squeeze", g.op("Shape", attention_mask, start=1, end=2)), np.int32)
        last = Span(last_key=last_key, total_length=total)
        if not g.pairs:
            return [last]
        one = g.constant(1, np.int32)
        return [Span(last_key=g.op("Sub", last_key, one), total_length=g.op("Sub", total, one)), last]
    groups = config.num_attention_heads // config.num_key_value_heads
    zero, one = g.constant(0, np.int64), g.constant(1, np.int64)
    total = g.op("Squeeze", g.op("Shape", attention_mask, start=1, end=2))
    sequence = g.op("Squeeze", g.op("Shape", run, start=1, end=2))
    keys = g.op("Range", zero, total, one)
    queries = g.op("Tile", g.op("Range", g.op("Sub", total, sequence), total, one), g.ints(groups))
    hidden = g.op("Greater", keys, g.op("Unsqueeze", queries, g.ints(1)))
    mask = g.op("Mul", g.cast(hidden, np.float32), g.constant(_MASKED, np.float32))
    return [Span(mask=g.op("Unsqueeze", mask, g.ints(0, 1)))]


def attention(
    g: GraphBuilder,
    config: TextConfig,
    recipe: Recipe,
    name: str,
    x: Value,
    table: Rotation,
    visible: list[Span],
    past: tuple[Value, Value],
) -> tuple[Value, list[tuple[Value, Value]]]:
    """x [batch, sequence, hidden], past key and value [batch, kv_heads, past, head_dim].

    Returns the output, and the present key and value after each of `each_token`. Source: transformers'
    Qwen3_5Attention.
    """
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    projected = linear(g, recipe, x, _query_key_value_gate(config, recipe, name))
    queries_keys, value, gate = g.ops(
        "Split",
        projected,
        g.ints((heads + kv_heads) * dim, kv_heads * dim, heads * dim),
        outputs=3,
        axis=-1,
    )
    # One norm and one rotation for queries and keys: their scales stand side by side, head by head.
    coded = recipe.cache_dtype == np.int8
    (scales,) = g.weight(_scaled_head_norms(recipe, name) if coded else _head_norms(config, recipe, name))
    normed = _normed_heads(g, queries_keys, scales, heads + kv_heads, dim, config.rms_norm_eps)
    turned = rotate(g, normed, table, heads + kv_heads, dim, config.rotary_dim)
    query, key = g.ops("Split", turned, g.ints(heads * dim, kv_heads * dim), outputs=2, axis=-1)

    if coded:
        value = g.op("Mul", value, *g.weight(_value_scale(config, recipe, name, inverse=True)))

    attend = _explicit_attention
    if g.target.has("GroupQueryAttention"):
        attend = partial(_grouped_query_attention, coded=coded)
    outputs, presents = [], []
    for (queries, keys, values), seen in zip(each_token(g, query, key, value), visible, strict=True):
        output, *present = attend(g, config, queries, keys, values, past, seen)
        past = present[0], present[1]
        outputs.append(output)
        presents.append(past)
    attended = joined(g, outputs)
    if coded:
        attended = g.op("Mul", attended, *g.weight(_value_scale(config, recipe, name, inverse=False)))
    gated = g.op("Mul", attended, g.op("Sigmoid", gate))
    out = projection(recipe, f"{name}.o_proj", recipe.whole(f"{name}.o_proj.weight"))
    return linear(g, recipe, gated, out), presents


def _query_key_value_gate(config: TextConfig, recipe: Recipe, name: str) -> Weight:
    """One projection [q | k | v | gate]; the checkpoint's q_proj alternates query and gate by head."""
    dim = config.head_dim
    starts = [2 * dim * head for head in range(config.num_attention_heads)]
    return projection(
        recipe,
        f"{name}.qkv_gate_proj",
        *(Rows(f"{name}.q_proj.weight", start, start + dim) for start in starts),
        recipe.whole(f"{name}.k_proj.weight"),
        recipe.whole(f"{name}.v_proj.weight"),
        *(Rows(f"{name}.q_proj.weight", start + dim, start + 2 * dim) for start in starts),
    )


def _head_norms(config: TextConfig, recipe: Recipe, name: str) -> Weight:
    """q_norm once per query head, then k_norm once per key head: [heads + kv_heads, head_dim]."""
    query = recipe.floats(f"{name}.q_norm.weight", transform=one_plus, name=f"{name}.qk_norm.weight")
    rows = query.rows * config.num_attention_heads
    rows += (recipe.whole(f"{name}.k_norm.weight"),) * config.num_key_value_heads
    shape = (config.num_attention_heads + config.num_key_value_heads, config.head_dim)
    return replace(query, rows=rows, reshaped=shape)


def _scaled_head_norms(recipe: Recipe, name: str) -> Weight:
    """The same, with queries and keys scaled for codes."""
    return recipe.floats(scaled_norm(name), name=f"{name}.qk_norm.weight")


def _value_scale(config: TextConfig, recipe: Recipe, name: str, inverse: bool) -> Weight:
    """[kv_heads * head_dim], what values are multiplied with to be codes; or, not `inverse`, [heads *
    head_dim], what gives the outputs back their sizes."""
    scale = recipe.floats(value_scale(name))
    kv_heads, dim = config.num_key_value_heads, config.head_dim
    if inverse:
        return replace(
            scale, name=f"{name}.v_cache.inverse_scale", transform=np.reciprocal, reshaped=(kv_heads * dim,)
        )
    groups = config.num_attention_heads // kv_heads
    rows = tuple(Rows(value_scale(name), head, head + 1) for head in range(kv_heads) for _ in range(groups))
    return replace(scale, name=f"{name}.v_cache.scale", rows=rows, reshaped=(len(rows) * dim,))


def _normed_heads(g: GraphBuilder, x: Value, scales: Value, heads: int, dim: int, epsilon: float) -> Value:
    """rms_norm of each head of x [batch, sequence, heads * dim], scales [heads, dim], in the shape that
    `rotate` takes.
    """
    # The operators take one scale for all heads.
    ones = g.constant(np.ones(dim))
    if not g.target.has("RotaryEmbedding"):
        return g.op("Mul", rms_norm(g, g.reshape(x, 0, 0, heads, dim), ones, epsilon), scales)
    # ONNX Runtime reshapes constants once, at load.
    return g.op("Mul", rms_norm_by_head(g, x, ones, heads, epsilon), g.reshape(scales, -1))


def _grouped_query_attention(
    g: GraphBuilder,
    config: TextConfig,
    query: Value,
    key: Value,
    value: Value,
    past: tuple[Value, Value],
    visible: Span,
    coded: bool,
) -> tuple[Value, Value, Value]:
    """Args:
    coded: the cache holds INT8 codes. Keys and values come scaled for them.
    """
    one = g.constant([1], np.float32)
    scales = (*_NO_ROTATION_BIAS_SINK, one, one) if coded else ()
    coding = {"k_quant_type": "PER_TENSOR", "v_quant_type": "PER_TENSOR", "kv_cache_bit_width": 8}
    output, present_key, present_value = g.ops(
        "GroupQueryAttention",
        query,
        key,
        value,
        *past,
        visible.last_key,
        visible.total_length,
        *scales,
        outputs=3,
        num_heads=config.num_attention_heads,
        kv_num_heads=config.num_key_value_heads,
        scale=config.head_dim**-0.5,
        **(coding if coded else {}),
    )
    return output, present_key, present_value


def _explicit_attention(
    g: GraphBuilder,
    config: TextConfig,
    query: Value,
    key: Value,
    value: Value,
    past: tuple[Value, Value],
    visible: Span,
) -> tuple[Value, Value, Value]:
    """Softmax(q k^T / sqrt(head_dim) + mask) v, the queries of one key head stacked along the sequence."""
    kv_heads, dim = config.num_key_value_heads, config.head_dim
    groups = config.num_attention_heads // kv_heads
    # Scaled before the product so that float16 scores stay in range.
    query = g.op("Mul", query, g.constant(dim**-0.5))
    query = g.op("Transpose", g.reshape(query, 0, 0, kv_heads, groups, dim), perm=[0, 2, 3, 1, 4])
    query = g.reshape(query, 0, kv_heads, -1, dim)
    key, value = (
        g.op("Transpose", g.reshape(new, 0, 0, kv_heads, dim), perm=[0, 2, 1, 3]) for new in (key, value)
    )
    present_key = g.op("Concat", past[0], key, axis=2)
    present_value = g.op("Concat", past[1], value, axis=2)
    scores = g.op("MatMul", query, g.op("Transpose", present_key, perm=[0, 1, 3, 2]))
    scores = g.op("Add", g.cast(scores, np.float32), visible.mask)
    weights = g.cast(g.op("Softmax", scores, axis=-1), g.dtype)
    output = g.reshape(g.op("MatMul", weights, present_value), 0, kv_heads, groups, -1, dim)
    output = g.op("Transpose", output, perm=[0, 3, 1, 2, 4])
    return g.reshape(output, 0, 0, config.num_attention_heads * dim), present_key, present_value
