"""Interleaved, partial multimodal rotary embedding (mRoPE), its tables computed from the positions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qwen_export.architecture.models.qwen3_5 import TextConfig
from qwen_export.architecture.yarn import inverse_frequencies
from qwen_export.graph.builder import GraphBuilder, Value


@dataclass(frozen=True)
class Rotation:
    """cos and sin of this run's tokens, in the activations' dtype.

    With the RotaryEmbedding operator: [batch * sequence, rotary_dim / 2], and `rows` [batch, sequence]
    says which row belongs to which token. Without it: [batch, sequence, 1, rotary_dim / 2].
    """

    cos: Value
    sin: Value
    rows: Value | None


def rotation(g: GraphBuilder, config: TextConfig, position_ids: Value) -> Rotation:
    """Tables for `position_ids` int64 [3, batch, sequence] (temporal, height, width).

    Every frequency takes its angle from one of the three positions: the temporal one, but the height's at
    1, 4, 7, ... and the width's at 2, 5, 8, ..., as far as `mrope_section` reaches. Angles are float32,
    in which whole positions are exact up to 2^24.
    Source: transformers' Qwen3_5TextRotaryEmbedding.
    """
    half = config.rotary_dim // 2
    frequencies, factor = inverse_frequencies(config)
    axis = np.zeros(half, dtype=np.int64)
    for offset in (1, 2):
        axis[offset : config.mrope_section[offset] * 3 : 3] = offset
    # Chosen and multiplied one by one: a MatMul may be done in TF32, which rounds positions from 2049 on.
    positions = g.op("Transpose", g.cast(position_ids, np.float32), perm=[1, 2, 0])
    chosen = g.op("Gather", positions, g.ints(*axis.tolist()), axis=2)
    angles = g.op("Mul", chosen, g.constant(frequencies, np.float32))
    cos, sin = g.op("Cos", angles), g.op("Sin", angles)
    if factor != 1:
        cos, sin = (g.op("Mul", table, g.constant(factor, np.float32)) for table in (cos, sin))
    cos, sin = g.cast(cos, g.dtype), g.cast(sin, g.dtype)
    if not g.target.has("RotaryEmbedding"):
        axes = g.ints(2)
        return Rotation(g.op("Unsqueeze", cos, axes), g.op("Unsqueeze", sin, axes), None)
    cos, sin = g.reshape(cos, -1, half), g.reshape(sin, -1, half)
    count = g.op("Squeeze", g.op("Shape", cos, start=0, end=1))
    every_row = g.op("Range", g.constant(0, np.int64), count, g.constant(1, np.int64))
    rows = g.op("Reshape", every_row, g.op("Shape", position_ids, start=1, end=3))
    return Rotation(cos, sin, rows)


def for_rotation(g: GraphBuilder, x: Value, table: Rotation, heads: int, head_dim: int) -> Value:
    """x [batch, sequence, heads * head_dim] in the shape that `rotate` takes."""
    return x if table.rows is not None else g.reshape(x, 0, 0, heads, head_dim)


def rotate(g: GraphBuilder, x: Value, table: Rotation, heads: int, head_dim: int, rotary_dim: int) -> Value:
    """Turn the first `rotary_dim` of each head of x; the rest passes.

    x is [batch, sequence, heads * head_dim] with the RotaryEmbedding operator, else
    [batch, sequence, heads, head_dim]. Returns [batch, sequence, heads * head_dim].
    """
    width = heads * head_dim
    if table.rows is not None:
        return g.op(
            "RotaryEmbedding",
            x,
            table.rows,
            table.cos,
            table.sin,
            num_heads=heads,
            rotary_embedding_dim=rotary_dim,
        )
    half = rotary_dim // 2
    sizes = [half, half, head_dim - rotary_dim]
    parts = g.ops("Split", x, g.ints(*filter(None, sizes)), outputs=len(list(filter(None, sizes))), axis=-1)
    left, right, rest = parts[0], parts[1], parts[2:]
    turned_left = g.op("Sub", g.op("Mul", left, table.cos), g.op("Mul", right, table.sin))
    turned_right = g.op("Add", g.op("Mul", right, table.cos), g.op("Mul", left, table.sin))
    return g.reshape(g.op("Concat", turned_left, turned_right, *rest, axis=-1), 0, 0, width)
