"""Mixture of experts: a router, the experts that it chooses for each token, and one that all tokens share."""

from __future__ import annotations

import math

import onnx_ir as ir
from qwen_profiles.errors import UserError

from qwen_export.config import TextConfig
from qwen_export.graph.builder import GraphBuilder
from qwen_export.graph.linear import linear
from qwen_export.graph.mlp import mlp
from qwen_export.graph.recipe import Recipe
from qwen_export.quantize import Quantization
from qwen_export.weights import Rows, Weight, interleave_gate_up


def mixture_of_experts(
    g: GraphBuilder, config: TextConfig, recipe: Recipe, name: str, x: ir.Value
) -> ir.Value:
    """x [batch, sequence, hidden] -> the same shape. Source: transformers' Qwen3_5MoeSparseMoeBlock.

    Raises:
        UserError: the target has no operator for routed experts.
    """
    if not g.target.has("QMoE"):
        raise UserError(
            f"the {g.target.name} lowering does not run mixtures of experts yet: choose a profile with the "
            "fused one, such as cpu"
        )
    routed = _routed_experts(g, config, recipe, name, x)
    with g.scope("shared_expert"):
        hidden, inner = config.hidden_size, config.shared_expert_intermediate_size
        shared = mlp(g, recipe, f"{name}.shared_expert", "shared_expert", x, hidden, inner)
        gate = linear(g, recipe, x, _router(g, config, f"{name}.shared_expert_gate", 1))
        return g.op("Add", routed, g.op("Mul", shared, g.op("Sigmoid", gate)))


def _router(g: GraphBuilder, config: TextConfig, name: str, rows: int) -> Weight:
    """Never quantised: a wrong choice of experts costs far more than the bytes."""
    return Weight(
        f"{name}.weight", "router", (Rows(f"{name}.weight", 0, rows),), (config.hidden_size,), g.dtype
    )


def _routed_experts(g: GraphBuilder, config: TextConfig, recipe: Recipe, name: str, x: ir.Value) -> ir.Value:
    """The sum of the chosen experts' MLPs, weighted by the router's probabilities among the chosen."""
    assert config.num_experts is not None
    experts, hidden, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
    logits = linear(g, recipe, x, _router(g, config, f"{name}.gate", experts))
    # QMoE has one block size, which must divide the rows of both projections.
    storage = recipe.storage("experts", math.gcd(hidden, inner), whole_blocks=True)
    gate_up = Weight(
        f"{name}.experts.gate_up_proj",
        "experts",
        (Rows(f"{name}.experts.gate_up_proj", 0, experts),),
        (2 * inner, hidden),
        storage,
        interleave_gate_up,
    )
    down = Weight(
        f"{name}.experts.down_proj",
        "experts",
        (Rows(f"{name}.experts.down_proj", 0, experts),),
        (hidden, inner),
        storage,
    )
    # swiglu(gate, up) = gate * sigmoid(alpha * gate) * (up + beta), with the two in turn along the rows.
    common = {
        "k": config.num_experts_per_tok,
        "normalize_routing_weights": 1,
        "activation_type": "swiglu",
        "swiglu_fusion": 1,
        "activation_alpha": 1.0,
        "activation_beta": 0.0,
    }
    logits = g.reshape(logits, -1, experts)
    first, second = g.weight(gate_up), g.weight(down)
    if not isinstance(storage, Quantization):
        return g.op("MoE", x, logits, *first, None, *second, None, **common)
    inputs: list[ir.Value | None] = [x, logits, *first[:2], None, *second[:2], None]
    if not storage.symmetric:
        inputs += [None, None, None, first[2], second[2]]
    return g.op(
        "QMoE",
        *inputs,
        **common,
        expert_weight_bits=storage.bits,
        block_size=storage.block_size,
        accuracy_level=recipe.accuracy_level,
    )
