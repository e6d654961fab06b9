"""SiLU, x * sigmoid(x)."""

from __future__ import annotations

from qwen_export.graph.builder import GraphBuilder, Value


def silu(g: GraphBuilder, x: Value) -> Value:
    """One node where the target has QuickGelu, x * sigmoid(alpha * x), which is SiLU for alpha = 1."""
    if g.target.has("QuickGelu"):
        return g.op("QuickGelu", x, alpha=1.0)
    return g.op("Mul", x, g.op("Sigmoid", x))
