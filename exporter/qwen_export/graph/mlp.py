"""The gated MLP: down(silu(gate(x)) * up(x))."""

from __future__ import annotations

import onnx_ir as ir

from qwen_export.config import TextConfig
from qwen_export.graph.builder import GraphBuilder
from qwen_export.graph.linear import linear, projection
from qwen_export.graph.recipe import Recipe
from qwen_export.weights import Rows


def mlp(g: GraphBuilder, config: TextConfig, recipe: Recipe, name: str, x: ir.Value) -> ir.Value:
    """x [batch, sequence, hidden] -> the same shape. Source: transformers' Qwen3_5MLP."""
    hidden, inner = config.hidden_size, config.intermediate_size
    gate_up = projection(
        recipe,
        f"{name}.gate_up_proj",
        "mlp",
        hidden,
        Rows(f"{name}.gate_proj.weight", 0, inner),
        Rows(f"{name}.up_proj.weight", 0, inner),
    )
    down = projection(recipe, f"{name}.down_proj", "mlp", inner, Rows(f"{name}.down_proj.weight", 0, hidden))
    gate, up = g.ops("Split", linear(g, recipe, x, gate_up), outputs=2, axis=-1, num_outputs=2)
    # QuickGelu(x) = x * sigmoid(alpha * x), which is SiLU for alpha = 1.
    return linear(g, recipe, g.op("Mul", g.op("QuickGelu", gate, alpha=1.0), up), down)
