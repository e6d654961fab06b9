"""Mixture of experts: a router, the experts that it chooses for each token, and one that all tokens share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from qwen_export.architecture.models.qwen3_5_moe import MoeTextConfig
from qwen_export.graph.builder import GraphBuilder, Value
from qwen_export.graph.linear import linear, product
from qwen_export.graph.mlp import mlp
from qwen_export.graph.recipe import Recipe
from qwen_export.graph.silu import silu
from qwen_export.graph.tokens import each_token, joined
from qwen_export.graph.weights import Storage, Weight, interleave_gate_up
from qwen_export.quantize.fp4 import Fp4


def mixture_of_experts(g: GraphBuilder, config: MoeTextConfig, recipe: Recipe, name: str, x: Value) -> Value:
    """x [batch, sequence, hidden] -> the same shape. Source: transformers' Qwen3_5MoeSparseMoeBlock."""
    logits = linear(g, recipe, x, recipe.floats(f"{name}.gate.weight"))
    routed_experts = _fused_experts if g.target.has("QMoE") else _portable_experts
    routed = joined(
        g,
        [routed_experts(g, config, recipe, f"{name}.experts", *run) for run in each_token(g, x, logits)],
    )
    if not config.norm_topk_prob:
        routed = g.op("Mul", routed, _chosen_mass(g, config, logits))
    with g.scope("shared_expert"):
        shared = mlp(g, recipe, f"{name}.shared_expert", x)
        gate = linear(g, recipe, x, recipe.floats(f"{name}.shared_expert_gate.weight"))
        return g.op("Add", routed, g.op("Mul", shared, g.op("Sigmoid", gate)))


def _chosen_mass(g: GraphBuilder, config: MoeTextConfig, logits: Value) -> Value:
    """How much of the router's probability the chosen experts have, [batch, sequence, 1].

    The experts' weights add up to 1 in every lowering; QMoE's attribute for it was tried on no provider.
    """
    probabilities = g.op("Softmax", g.cast(logits, np.float32), axis=-1)
    chosen, _ = g.ops("TopK", probabilities, g.ints(config.num_experts_per_tok), outputs=2, axis=-1)
    return g.cast(g.op("ReduceSum", chosen, g.ints(-1), keepdims=1), g.dtype)


def _fused_experts(
    g: GraphBuilder, config: MoeTextConfig, recipe: Recipe, name: str, x: Value, logits: Value
) -> Value:
    """The chosen experts' MLPs, weighted by the router's probabilities among the chosen, as one operator.

    logits [batch, sequence, experts].
    """
    hidden, inner = config.hidden_size, config.moe_intermediate_size
    # QMoE has one block size, which must divide the rows of both projections.
    stacks = first, second = f"{name}.gate_up_proj", f"{name}.down_proj"
    storage = recipe.fp4_experts(stacks) or recipe.storage(
        recipe.role(first), math.gcd(hidden, inner), stacks, whole_blocks=True
    )
    gate_up = replace(_stack(recipe, first, storage), transform=interleave_gate_up)
    down = _stack(recipe, second, storage)
    # swiglu(gate, up) = gate * sigmoid(alpha * gate) * (up + beta), with the two in turn along the rows.
    common = {
        "k": config.num_experts_per_tok,
        "normalize_routing_weights": 1,
        "activation_type": "swiglu",
        "swiglu_fusion": 1,
        "activation_alpha": 1.0,
        "activation_beta": 0.0,
    }
    logits = g.reshape(logits, -1, config.num_experts)
    rows, columns = g.weight(gate_up), g.weight(down)
    if isinstance(storage, np.dtype):
        return g.op("MoE", x, logits, *rows, None, *columns, None, **common)
    inputs: list[Value | None] = [x, logits, *rows[:2], None, *columns[:2], None]
    if isinstance(storage, Fp4):
        return g.op(
            "QMoE",
            *inputs,
            *[None] * 7,
            rows[2],
            columns[2],
            **common,
            expert_weight_bits=4,
            block_size=storage.block_size,
            quant_type=storage.quant_type,
            weights_prepacked=1,  # along K, which is the only layout that the CPU takes
        )
    if not storage.symmetric:
        inputs += [None, None, None, rows[2], columns[2]]
    return g.op(
        "QMoE",
        *inputs,
        **common,
        expert_weight_bits=storage.bits,
        block_size=storage.block_size,
        accuracy_level=recipe.accuracy_level,
    )


def _stack(recipe: Recipe, tensor: str, storage: Storage | None = None) -> Weight:
    """The matrices [N, K] of all experts; without `storage` in a form whose rows can stand side by side."""
    role, (_, n, k) = recipe.role(tensor), recipe.specs[tensor].shape
    return Weight(
        tensor,
        role,
        (recipe.whole(tensor),),
        (n, k),
        storage or recipe.storage(role, k, [tensor], even_blocks=True),
    )


def _portable_experts(
    g: GraphBuilder, config: MoeTextConfig, recipe: Recipe, name: str, x: Value, logits: Value
) -> Value:
    """The same without an operator for it: all experts are one wide MLP, in which a token's unchosen ones
    weigh nothing.

    The first token of a run goes through the chosen experts' part of that MLP, gathered; the others go
    through all of it, which for many tokens is quicker than gathering for each. While decoding there are no
    others, and no kernel runs for tensors without elements, so only the chosen experts' weights are read.
    """
    experts, chosen = config.num_experts, config.num_experts_per_tok
    hidden, inner = config.hidden_size, config.moe_intermediate_size
    gate_up = replace(_stack(recipe, f"{name}.gate_up_proj"), reshaped=(experts * 2 * inner, hidden))
    down = replace(_stack(recipe, f"{name}.down_proj"), side_by_side=True)
    rows, columns = g.weight(gate_up), g.weight(down)

    def wide_mlp(
        tokens: Value, weights: Value, rows: Sequence[Value], columns: Sequence[Value], count: int
    ) -> Value:
        """tokens [n, hidden], weights [n, count] of `count` experts -> [n, hidden]."""
        both = product(g, recipe, tokens, rows, gate_up.storage, count * 2 * inner, hidden)
        gate, up = g.ops("Split", g.reshape(both, -1, count, 2 * inner), outputs=2, axis=-1, num_outputs=2)
        inside = g.op("Mul", silu(g, gate), up)
        inside = g.op("Mul", inside, g.op("Unsqueeze", weights, g.ints(-1)))
        inside = g.reshape(inside, -1, count * inner)
        return product(g, recipe, inside, columns, down.storage, hidden, count * inner)

    probabilities = g.op("Softmax", g.reshape(g.cast(logits, np.float32), -1, experts), axis=-1)
    weights, choices = g.ops("TopK", probabilities, g.ints(chosen), outputs=2, axis=-1)
    # WebGPU computes no int64: the places of the chosen rows would go to the CPU and back in every layer.
    choices = g.cast(choices, np.int32)
    weights = g.op("Div", weights, g.op("ReduceSum", weights, g.ints(-1), keepdims=1))
    # The others' weights for every expert, by comparing: DirectML has a kernel for ScatterElements of older
    # operator sets only, and it would run on the CPU (measured).
    each = g.constant(np.arange(experts), np.float32)
    one_hot = g.op("Equal", g.op("Unsqueeze", g.cast(_others(g, choices), np.float32), g.ints(-1)), each)
    spread = g.op("Mul", g.op("Unsqueeze", _others(g, weights), g.ints(-1)), g.cast(one_hot, np.float32))
    everywhere = g.op("ReduceSum", spread, g.ints(1), keepdims=0)  # [n, experts]

    tokens = g.reshape(x, -1, hidden)
    first_choices = g.reshape(_first(g, choices), chosen, 1)
    first = wide_mlp(
        _first(g, tokens),
        g.cast(_first(g, weights), g.dtype),
        [_gather(g, tensor, first_choices, experts, axis=0) for tensor in rows],
        [_gather(g, tensor, first_choices, experts, axis=1) for tensor in columns],
        chosen,
    )
    others = wide_mlp(_others(g, tokens), g.cast(everywhere, g.dtype), rows, columns, experts)
    return g.op("Reshape", g.op("Concat", first, others, axis=0), g.op("Shape", x))


def _gather(g: GraphBuilder, tensor: Value, choices: Value, experts: int, axis: int) -> Value:
    """The parts of `tensor` that belong to the experts `choices` [chosen, 1], each as wide along `axis`."""
    assert tensor.shape is not None
    width = tensor.shape[axis]
    assert isinstance(width, int)
    width //= experts
    first = g.op("Mul", choices, g.constant(width, np.int32))
    places = g.op("Add", first, g.constant(np.arange(width), np.int32))
    return g.op("Gather", tensor, g.reshape(places, -1), axis=axis)


def _first(g: GraphBuilder, value: Value) -> Value:
    return g.op("Slice", value, g.ints(0), g.ints(1), g.ints(0))


def _others(g: GraphBuilder, value: Value) -> Value:
    return g.op("Slice", value, g.ints(1), g.constant([np.iinfo(np.int64).max], np.int64), g.ints(0))
