"""RMSNorm in its three Qwen3.5 forms: plain with 1 + weight, with a residual, and gated."""

from __future__ import annotations

import numpy as np

from qwen_export.graph.builder import GraphBuilder, Value
from qwen_export.graph.recipe import Recipe
from qwen_export.graph.silu import silu
from qwen_export.graph.weights import Weight, one_plus


def norm_weight(g: GraphBuilder, recipe: Recipe, name: str) -> Value:
    """1 + weight of one RMSNorm, in the activations' dtype."""
    return g.weight(recipe.floats(f"{name}.weight", transform=one_plus))[0]


def rms_norm(g: GraphBuilder, x: Value, scale: Value, epsilon: float) -> Value:
    """x / sqrt(mean(x^2) + epsilon) * scale over the last axis."""
    return g.op("SimplifiedLayerNormalization", x, scale, axis=-1, epsilon=epsilon)


def rms_norm_by_head(g: GraphBuilder, x: Value, scale: Value, heads: int, epsilon: float) -> Value:
    """rms_norm of each head of x [batch, sequence, heads * head_dim], scale [head_dim] -> the same shape."""
    # BranchwiseRMSNorm does it in one node, for a thousandth of a decode step; onnxruntime 1.30 has none.
    assert scale.shape is not None
    (head_dim,) = scale.shape
    assert isinstance(head_dim, int)
    normed = rms_norm(g, g.reshape(x, 0, 0, heads, head_dim), scale, epsilon)
    return g.reshape(normed, 0, 0, heads * head_dim)


def add_rms_norm(
    g: GraphBuilder, x: Value, residual: Value, scale: Value, epsilon: float
) -> tuple[Value, Value]:
    """(rms_norm(x + residual), x + residual)."""
    normed, mean, deviation, total = g.ops(
        "SkipSimplifiedLayerNormalization", x, residual, scale, outputs=4, epsilon=epsilon
    )
    mean.name = deviation.name = ""  # optional outputs that nobody reads
    return normed, total


def gated_rms_norm(
    g: GraphBuilder, x: Value, scale: Weight, gate: Value, heads: int, epsilon: float
) -> Value:
    """rms_norm(x) * silu(gate) per head, for x and gate [batch, sequence, heads * head_dim].

    x has the dtype of `scale`, which may be float32 where the activations are float16; the result has theirs.
    Source: transformers' Qwen3_5RMSNormGated; com.microsoft::GatedRMSNorm.
    """
    (weight,) = g.weight(scale)
    wider = scale.storage != g.dtype
    if g.target.has("GatedRMSNorm") and g.target.silu_inside:
        gate = g.cast(gate, np.float32) if wider else gate
        # SiLU is the default of its attribute `activation`, which onnxruntime 1.30 does not know.
        gated = g.op("GatedRMSNorm", x, weight, gate, epsilon=epsilon)
        return g.cast(gated, g.dtype) if wider else gated
    normed = rms_norm_by_head(g, x, weight, heads, epsilon)
    if wider:
        gate = g.cast(gate, np.float32)
    gated = g.op("Mul", normed, silu(g, gate))
    return g.cast(gated, g.dtype) if wider else gated
