"""Gated DeltaNet: causal convolution, gates, the delta rule's recurrence, gated norm.

Shapes: B batch, T this run's tokens, Hk/Hv key and value heads, dk/dv their sizes, C = 2 Hk dk + Hv dv.
Source: transformers' Qwen3_5GatedDeltaNet; Yang et al., Gated Delta Networks (2024).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qwen_export.architecture.models.qwen3_5 import TextConfig
from qwen_export.graph.builder import GraphBuilder, Value
from qwen_export.graph.linear import linear, projection
from qwen_export.graph.norm import gated_rms_norm, rms_norm, rms_norm_by_head
from qwen_export.graph.pending import Entering, Pending, States
from qwen_export.graph.recipe import Recipe
from qwen_export.graph.silu import silu
from qwen_export.graph.tokens import each_token, joined
from qwen_export.graph.weights import negative_exp

_L2_EPSILON = 1e-6  # transformers' l2norm
_FLOAT32 = np.dtype(np.float32)


@dataclass(frozen=True)
class Triangles:
    """Constant masks cut to this run's T tokens, made once for all layers; only for the chunked form.

    Attributes:
        later: float32 [T, T], -1e30 where j > i, else 0.
        identity: float32 [T, T].
        corners: float32 [T, T] each; mask n is 1 where i lies in the second and j in the first half of
            the same run of 2^(n+1) tokens.
    """

    later: Value
    identity: Value
    corners: tuple[Value, ...]


def triangles(g: GraphBuilder, run: Value, max_tokens: int) -> Triangles | None:
    """Masks for runs of up to `max_tokens` (a power of two); None where LinearAttention does the work.

    `run` [batch, sequence, ...] is this run's input.

    A longer run is refused: its last index lies outside of the tables, and the node that fails is named
    after the reason.
    """
    if g.target.has("LinearAttention"):
        return None
    index = np.arange(max_tokens)
    tables = [np.where(index > index[:, None], -1e30, 0), np.eye(max_tokens)]
    half = 1
    while half < max_tokens:
        block = index // half
        tables.append((block[:, None] % 2 == 1) & (block[:, None] == block + 1))
        half *= 2
    count = g.op("Squeeze", g.op("Shape", run, start=1, end=2))
    one = g.constant(1, np.int64)
    # The refusal must not depend on a provider's handling of bad indices: this gather is one of shape
    # arithmetic, which every provider leaves to the CPU.
    with g.scope(f"a_run_takes_at_most_{max_tokens}_tokens__set_search_chunk_size"):
        last = g.op("Gather", g.constant(np.arange(max_tokens), np.int64), g.op("Sub", count, one))
    length = g.op("Unsqueeze", g.op("Add", last, one), g.ints(0))
    ends = g.op("Concat", length, length, axis=0)
    later, identity, *corners = (
        g.op("Slice", g.constant(table, _FLOAT32), g.ints(0, 0), ends, g.ints(0, 1)) for table in tables
    )
    return Triangles(later, identity, tuple(corners))


def gated_delta_net(
    g: GraphBuilder,
    config: TextConfig,
    recipe: Recipe,
    name: str,
    x: Value,
    past: States,
    masks: Triangles | None,
    pending: Pending | None = None,
) -> tuple[Value, list[States]]:
    """x [B, T, hidden], past conv state [B, C, kernel - 1] and recurrent state float32 [B, Hv, dk, dv].

    Returns the output [B, T, hidden], and both present states after each of `each_token`.
    """
    in_proj = projection(
        recipe,
        f"{name}.in_proj_qkvz",
        recipe.whole(f"{name}.in_proj_qkv.weight"),
        recipe.whole(f"{name}.in_proj_z.weight"),
    )
    mixed, z = g.ops(
        "Split",
        linear(g, recipe, x, in_proj),
        g.ints(config.conv_dim, config.value_dim),
        outputs=2,
        axis=-1,
    )
    decay, beta = _gates(g, recipe, name, x)
    recurrence = _linear_attention if g.target.has("LinearAttention") else chunked_delta_rule
    outputs, presents = [], []
    past_conv, past_state = past
    for entering, decays, betas in each_token(g, mixed, decay, beta):
        convolved, past_conv = _causal_conv(g, config, recipe, name, entering, past_conv)
        output, past_state = recurrence(g, config, convolved, decays, betas, past_state, masks)
        outputs.append(output)
        presents.append((past_conv, past_state))
        if pending:
            pending.enters(entering, convolved, decays, betas)
    output = joined(g, outputs)

    # In float32, as the recurrence before it gives it.
    norm = recipe.floats(f"{name}.norm.weight", _FLOAT32)
    normed = gated_rms_norm(g, output, norm, z, config.linear_num_value_heads, config.rms_norm_eps)
    out_proj = projection(recipe, f"{name}.out_proj", recipe.whole(f"{name}.out_proj.weight"))
    return linear(g, recipe, normed, out_proj), presents


def settle(g: GraphBuilder, config: TextConfig, entering: Entering, past: States) -> States:
    """The states after tokens of one sequence that a run before has convolved."""
    past_conv, past_state = past
    # Flat, token by token: kernels that join or cut along a short last axis go number by number, and ONNX
    # Runtime would move the transpositions so that they do.
    rows, channels = config.linear_conv_kernel_dim - 1, config.conv_dim
    before = g.reshape(g.op("Transpose", past_conv, perm=[0, 2, 1]), -1)
    seen = g.op("Concat", before, g.reshape(entering.mixed, -1), axis=0)
    end = g.constant([np.iinfo(np.int64).max], np.int64)
    last = g.reshape(g.op("Slice", seen, g.ints(-rows * channels), end, g.ints(0)), 1, rows, channels)
    conv = g.op("Transpose", last, perm=[0, 2, 1])
    _, state = _linear_attention(
        g, config, entering.convolved, entering.decay, entering.beta, past_state, None
    )
    return conv, state


def _causal_conv(
    g: GraphBuilder, config: TextConfig, recipe: Recipe, name: str, mixed: Value, past: Value
) -> tuple[Value, Value]:
    """Depthwise causal convolution and SiLU: [B, T, C] -> [B, T, C], and the last kernel - 1 inputs."""
    channels, kernel = config.conv_dim, config.linear_conv_kernel_dim
    (weight,) = g.weight(recipe.floats(f"{name}.conv1d.weight"))
    mixed = g.op("Transpose", mixed, perm=[0, 2, 1])
    if g.target.has("CausalConvWithState"):
        # The schema says that the bias may be absent; the CPU kernel wants it.
        bias = g.constant(np.zeros(channels))
        activation = "silu" if g.target.silu_inside else "none"
        convolved, present = g.ops(
            "CausalConvWithState", mixed, weight, bias, past, outputs=2, activation=activation
        )
        if not g.target.silu_inside:
            convolved = silu(g, convolved)
    else:
        seen = g.op("Concat", past, mixed, axis=2)
        convolved = silu(g, g.op("Conv", seen, weight, group=channels))
        end = g.constant([np.iinfo(np.int64).max], np.int64)
        present = g.op("Slice", seen, g.ints(1 - kernel), end, g.ints(2))
    return g.op("Transpose", convolved, perm=[0, 2, 1]), present


def _gates(g: GraphBuilder, recipe: Recipe, name: str, x: Value) -> tuple[Value, Value]:
    """decay = -exp(A_log) softplus(a + dt_bias), in log space, and beta = sigmoid(b): [B, T, Hv] each."""
    in_proj = projection(
        recipe,
        f"{name}.in_proj_ab",
        recipe.whole(f"{name}.in_proj_a.weight"),
        recipe.whole(f"{name}.in_proj_b.weight"),
    )
    a, b = g.ops("Split", linear(g, recipe, x, in_proj), outputs=2, axis=-1, num_outputs=2)
    (dt_bias,) = g.weight(recipe.floats(f"{name}.dt_bias", _FLOAT32))
    (scale,) = g.weight(recipe.floats(f"{name}.A_log", _FLOAT32, negative_exp, f"{name}.decay_scale"))
    a, b = _float32(g, a), _float32(g, b)
    if g.target.has("LinearAttentionGate"):
        decay, beta = g.ops("LinearAttentionGate", a, dt_bias, scale, b, outputs=2)
        return decay, beta
    return g.op("Mul", scale, g.op("Softplus", g.op("Add", a, dt_bias))), g.op("Sigmoid", b)


def _linear_attention(
    g: GraphBuilder,
    config: TextConfig,
    mixed: Value,
    decay: Value,
    beta: Value,
    past: Value,
    masks: Triangles | None,
) -> tuple[Value, Value]:
    """In float32, as the state: with float16 activations the kernels want a float16 state, which each token
    would round. The casts are of one token's values, nothing beside the state that it reads and writes.
    """
    key_heads, key_size = config.linear_num_key_heads, config.linear_key_head_dim
    query_key, value = g.ops(
        "Split", _float32(g, mixed), g.ints(2 * config.key_dim, config.value_dim), outputs=2, axis=-1
    )
    scale, epsilon = _l2_norm(g, key_size)
    normed = rms_norm_by_head(g, query_key, scale, 2 * key_heads, epsilon)
    query, key = g.ops("Split", normed, outputs=2, axis=-1, num_outputs=2)
    output, present = g.ops(
        "LinearAttention",
        query,
        key,
        value,
        past,
        decay,
        beta,
        outputs=2,
        q_num_heads=key_heads,
        kv_num_heads=config.linear_num_value_heads,
        update_rule="gated_delta",
        scale=key_size**-0.5,
    )
    return output, present


def chunked_delta_rule(
    g: GraphBuilder,
    config: TextConfig,
    mixed: Value,
    decay: Value,
    beta: Value,
    past: Value,
    masks: Triangles | None,
) -> tuple[Value, Value]:
    """The recurrence of one run in closed form, in float32, with products of T x T matrices and no loop.

    With G the running sum of the decays and P_ij = exp(G_i - G_j) for j <= i, else 0:
        A = tril(beta k k^T * P, -1)                       what token j's write changes in token i's
        V = (I + A)^-1 (beta v - beta exp(G) k S)          the values really written
        O = exp(G) q S + (q k^T * P) V
        S' = exp(G_T) S + (P_T k)^T V                      P_T is P's last row
    """
    assert masks is not None
    heads, key_size = config.linear_num_value_heads, config.linear_key_head_dim
    query_key, value = g.ops(
        "Split", _float32(g, mixed), g.ints(2 * config.key_dim, config.value_dim), outputs=2, axis=-1
    )
    by_head = g.reshape(query_key, 0, 0, 2 * config.linear_num_key_heads, key_size)
    normed = _heads_first(g, rms_norm(g, by_head, *_l2_norm(g, key_size)))
    if config.linear_num_key_heads != heads:
        repeats = heads // config.linear_num_key_heads
        order = np.repeat(np.arange(2 * config.linear_num_key_heads), repeats)
        normed = g.op("Gather", normed, g.constant(order, np.int64), axis=1)
    query, key = g.ops("Split", normed, outputs=2, axis=1, num_outputs=2)
    query = g.op("Mul", query, g.constant(key_size**-0.5, _FLOAT32))
    value = _heads_first(g, g.reshape(value, 0, 0, heads, config.linear_value_head_dim))
    beta = g.op("Unsqueeze", g.op("Transpose", beta, perm=[0, 2, 1]), g.ints(3))
    total = g.op("CumSum", g.op("Transpose", decay, perm=[0, 2, 1]), g.constant(2, np.int64))

    row, column = g.op("Unsqueeze", total, g.ints(3)), g.op("Unsqueeze", total, g.ints(2))
    # Masked before exp, so that no exponent is positive.
    pairwise = g.op("Exp", g.op("Add", g.op("Sub", row, column), masks.later))
    since_start = g.op("Exp", row)

    key_transposed = g.op("Transpose", key, perm=[0, 1, 3, 2])
    key_beta = g.op("Mul", key, beta)
    system = g.op("Mul", g.op("MatMul", key_beta, key_transposed), pairwise)
    old = g.op("MatMul", g.op("Mul", key_beta, since_start), past)
    written = _solve(g, system, g.op("Sub", g.op("Mul", value, beta), old), masks)

    within = g.op("Mul", g.op("MatMul", query, key_transposed), pairwise)
    output = g.op(
        "Add",
        g.op("MatMul", g.op("Mul", query, since_start), past),
        g.op("MatMul", within, written),
    )
    last = g.ints(-1), g.constant([np.iinfo(np.int64).max], np.int64), g.ints(2)
    present = g.op(
        "Add",
        g.op("Mul", past, g.op("Slice", since_start, *last)),
        g.op("MatMul", g.op("Mul", key_transposed, g.op("Slice", pairwise, *last)), written),
    )
    output = g.op("Transpose", output, perm=[0, 2, 1, 3])
    return g.reshape(output, 0, 0, config.value_dim), present


def _solve(g: GraphBuilder, system: Value, right: Value, masks: Triangles) -> Value:
    """(I + A)^-1 `right`, where A is the strict lower triangle of `system` [B, Hv, T, T].

    Runs of 1, 2, 4, ... tokens are inverted in turn: with X the inverse of the two halves on the diagonal
    and N the corner between them, the inverse of the whole is X - X N X. The shorter product
    (I - A)(I + A^2)(I + A^4)... is the same in exact arithmetic, but powers of A grow like binomial
    coefficients where keys repeat, and float32 loses the answer by T = 64.
    """
    inverse: Value | None = None  # the identity, until the first corners are in
    for mask in masks.corners[:-1]:
        corner = g.op("Mul", system, mask)
        if inverse is None:
            inverse = g.op("Sub", masks.identity, corner)
        else:
            inverse = g.op("Sub", inverse, g.op("MatMul", g.op("MatMul", inverse, corner), inverse))
    # The last corner meets the right-hand side itself: (X - X N X) R = Y - X N Y with Y = X R.
    halves = right if inverse is None else g.op("MatMul", inverse, right)
    rest = g.op("MatMul", g.op("Mul", system, masks.corners[-1]), halves)
    return g.op("Sub", halves, rest if inverse is None else g.op("MatMul", inverse, rest))


def _float32(g: GraphBuilder, x: Value) -> Value:
    """`x` in the activations' dtype, widened if that is narrower."""
    return x if g.dtype == _FLOAT32 else g.cast(x, _FLOAT32)


def _l2_norm(g: GraphBuilder, size: int) -> tuple[Value, float]:
    """Scale float32 [size] and epsilon with which RMSNorm is x / sqrt(sum(x^2) + 1e-6).

    Its mean is the sum / size: scale 1 / sqrt(size) and epsilon / size.
    """
    return g.constant(np.full(size, size**-0.5), _FLOAT32), _L2_EPSILON / size


def _heads_first(g: GraphBuilder, x: Value) -> Value:
    """[B, T, H, d] -> [B, H, T, d]."""
    return g.op("Transpose", x, perm=[0, 2, 1, 3])
