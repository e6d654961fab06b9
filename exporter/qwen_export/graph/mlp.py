"""The gated MLP: down(silu(gate(x)) * up(x))."""

from __future__ import annotations

from qwen_export.graph.builder import GraphBuilder, Value
from qwen_export.graph.linear import linear, projection
from qwen_export.graph.recipe import Recipe
from qwen_export.graph.silu import silu


def mlp(g: GraphBuilder, recipe: Recipe, name: str, x: Value) -> Value:
    """x [batch, sequence, hidden] -> the same shape. Source: transformers' Qwen3_5MLP."""
    gate_up = projection(
        recipe,
        f"{name}.gate_up_proj",
        recipe.whole(f"{name}.gate_proj.weight"),
        recipe.whole(f"{name}.up_proj.weight"),
    )
    down = projection(recipe, f"{name}.down_proj", recipe.whole(f"{name}.down_proj.weight"))
    gate, up = g.ops("Split", linear(g, recipe, x, gate_up), outputs=2, axis=-1, num_outputs=2)
    return linear(g, recipe, g.op("Mul", silu(g, gate), up), down)
