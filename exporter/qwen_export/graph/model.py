"""The whole decoder: token ids and past states in, logits and present states out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qwen_export.architecture.models.qwen3_5 import TextConfig
from qwen_export.architecture.models.qwen3_5_moe import MoeTextConfig
from qwen_export.graph.attention import attention, spans
from qwen_export.graph.builder import GraphBuilder, Shape, Value
from qwen_export.graph.gated_delta_net import gated_delta_net, settle, triangles
from qwen_export.graph.mlp import mlp
from qwen_export.graph.moe import mixture_of_experts
from qwen_export.graph.norm import add_rms_norm, norm_weight, rms_norm
from qwen_export.graph.pending import MOST_TOKENS, Entering, Pending, States
from qwen_export.graph.recipe import Recipe
from qwen_export.graph.rotary import rotation
from qwen_export.graph.tokens import last_positions
from qwen_export.graph.vocabulary import embed, vocabulary, vocabulary_logits


@dataclass(frozen=True)
class GraphOptions:
    """What of the graph is the profile's choice.

    Attributes:
        max_run_tokens: the longest run of tokens of the chunked Gated DeltaNet, a power of two.
        all_logits: logits for every position, for evaluation; else for the last one only.
        embeddings: the input is embeddings, which another graph makes from tokens and images.
        hidden_states: the final hidden states are an output, for the MTP head.
        pending: tokens may be taken back after a run, see `pending.py`.
    """

    max_run_tokens: int
    all_logits: bool = False
    embeddings: bool = False
    hidden_states: bool = False
    pending: bool = False


@dataclass(frozen=True)
class State:
    """One tensor carried from run to run; its input and output names follow ONNX Runtime GenAI."""

    past: str
    present: str
    dtype: np.dtype
    past_shape: Shape
    present_shape: Shape

    @property
    def settled(self) -> str:
        """The present state's name before tokens that may be taken back."""
        return self.present.replace("present", "settled", 1)


def states(
    config: TextConfig, layer: int, dtype: np.dtype, cache_dtype: np.dtype | None = None
) -> tuple[State, State]:
    """Key and value cache of a full-attention layer, conv and recurrent state of a Gated DeltaNet.

    Args:
        dtype: the activations'.
        cache_dtype: of keys and values, if it is another.
    """

    def state(kind: str, dtype: np.dtype, past: Shape, present: Shape) -> State:
        return State(f"past_key_values.{layer}.{kind}", f"present.{layer}.{kind}", dtype, past, present)

    if config.layer_types[layer] == "full_attention":
        past: Shape = ("batch_size", config.num_key_value_heads, "past_sequence_length", config.head_dim)
        present: Shape = (*past[:2], "total_sequence_length", config.head_dim)
        held = cache_dtype or dtype
        return state("key", held, past, present), state("value", held, past, present)
    conv: Shape = ("batch_size", config.conv_dim, config.linear_conv_kernel_dim - 1)
    heads = config.linear_num_value_heads
    recurrent: Shape = ("batch_size", heads, config.linear_key_head_dim, config.linear_value_head_dim)
    return (
        state("conv_state", dtype, conv, conv),
        state("recurrent_state", np.dtype(np.float32), recurrent, recurrent),
    )


def cache_bytes_per_token(config: TextConfig, dtype: np.dtype) -> int:
    """Keys and values that each token adds; only full-attention layers grow."""
    growing = (
        state
        for layer in range(config.num_hidden_layers)
        for state in states(config, layer, dtype)
        if "past_sequence_length" in state.past_shape
    )
    return sum(
        int(np.prod([size for size in state.past_shape if isinstance(size, int)])) * state.dtype.itemsize
        for state in growing
    )


def decoder(g: GraphBuilder, config: TextConfig, recipe: Recipe, options: GraphOptions) -> None:
    """Build the decoder into `g`.

    Inputs: input_ids int64 [batch, sequence] or inputs_embeds [batch, sequence, hidden], attention_mask int64
    [batch, total] (all ones), position_ids int64 [3, batch, sequence], and each layer's past states.
    Outputs: logits float32 [batch, sequence or 1, vocab] and each layer's present states; hidden_states
    [batch, sequence, hidden] where they are asked for. In a graph of pairs the sequence is two tokens, there
    are logits for both, and states after one token and after two, as `present.*.1` and `present.*.2`. Where
    tokens are pending there are logits for the last 8, and the states of Gated DeltaNets before this run's
    tokens too, as `settled.*`.
    """
    int64 = np.dtype(np.int64)
    tokens = ("batch_size", "sequence_length")
    if options.embeddings:
        run = g.input("inputs_embeds", g.dtype, (*tokens, config.hidden_size))
    else:
        run = g.input("input_ids", int64, tokens)
    attention_mask = g.input("attention_mask", int64, ("batch_size", "total_sequence_length"))
    position_ids = g.input("position_ids", int64, (3, "batch_size", "sequence_length"))
    carried = [
        states(config, layer, g.dtype, recipe.cache_dtype) for layer in range(config.num_hidden_layers)
    ]
    past = [tuple(g.input(state.past, state.dtype, state.past_shape) for state in pair) for pair in carried]

    lm_head, embedding = vocabulary(config, recipe)
    table = rotation(g, config, position_ids)
    visible = spans(g, config, attention_mask, run)
    masks = triangles(g, run, options.max_run_tokens)
    # Where there is no Gated DeltaNet, nothing is: keys and values are cut back.
    pending = Pending(g, config) if options.pending and "linear_attention" in config.layer_types else None
    if pending:
        past = _settled(g, config, pending, past)

    residual = run if options.embeddings else embed(g, run, embedding)
    update: Value | None = None
    for layer, layer_type in enumerate(config.layer_types):
        name = f"model.layers.{layer}"
        with g.scope(name):
            x, residual = _next_norm(g, config, recipe, f"{name}.input_layernorm", update, residual)
            first_past, second_past = past[layer]
            if layer_type == "full_attention":
                with g.scope("self_attn"):
                    update, presents = attention(
                        g, config, recipe, f"{name}.self_attn", x, table, visible, (first_past, second_past)
                    )
            else:
                with g.scope("linear_attn"):
                    update, presents = gated_delta_net(
                        g, config, recipe, f"{name}.linear_attn", x, (first_past, second_past), masks, pending
                    )
            for state, *values in zip(carried[layer], *presents, strict=True):
                for called, value in zip(_present_names(g, state, len(values)), values, strict=True):
                    g.output(value, called, state.dtype, state.present_shape)
            if pending and layer_type == "linear_attention":
                for state, value in zip(carried[layer], past[layer], strict=True):
                    g.output(value, state.settled, state.dtype, state.present_shape)
            x, residual = _next_norm(g, config, recipe, f"{name}.post_attention_layernorm", update, residual)
            update = feed_forward(g, config, recipe, f"{name}.mlp", x)

    x, _ = _next_norm(g, config, recipe, "model.norm", update, residual)
    length: int | str
    if options.hidden_states:
        g.output(x, "hidden_states", g.dtype, ("batch_size", "sequence_length", config.hidden_size))
    if pending:
        pending.output()
    if options.all_logits or g.pairs:
        length = "sequence_length"
    elif options.pending:
        x, length = last_positions(g, x, MOST_TOKENS), "last_tokens"
    else:
        x, length = last_positions(g, x, 1), 1
    logits = vocabulary_logits(g, recipe, x, lm_head)
    g.output(logits, "logits", np.dtype(np.float32), ("batch_size", length, config.vocab_size))


def _settled(
    g: GraphBuilder, config: TextConfig, pending: Pending, past: list[tuple[Value, ...]]
) -> list[tuple[Value, ...]]:
    """`past` of all layers with those tokens in the states of Gated DeltaNets that are pending."""
    recurrent = [layer for layer, kind in enumerate(config.layer_types) if kind == "linear_attention"]

    def let_in(index: int, entering: Entering, before: States) -> States:
        with g.scope(f"model.layers.{recurrent[index]}.linear_attn.pending"):
            return settle(g, config, entering, before)

    found = list(past)
    before = [(conv, state) for conv, state in (past[layer] for layer in recurrent)]
    for layer, after in zip(recurrent, pending.settle(before, let_in), strict=True):
        found[layer] = after
    return found


def _present_names(g: GraphBuilder, state: State, count: int) -> list[str]:
    """Of a state after each of `count` parts of a run."""
    if g.pairs:
        return [f"{state.present}.{number}" for number in range(1, count + 1)]
    return [state.present]


def feed_forward(g: GraphBuilder, config: TextConfig, recipe: Recipe, name: str, x: Value) -> Value:
    """A layer's second block: a mixture of experts, or one MLP."""
    with g.scope("mlp"):
        if isinstance(config, MoeTextConfig) and f"{name}.gate.weight" in recipe.specs:
            return mixture_of_experts(g, config, recipe, name, x)
        return mlp(g, recipe, name, x)


def _next_norm(
    g: GraphBuilder,
    config: TextConfig,
    recipe: Recipe,
    name: str,
    update: Value | None,
    residual: Value,
) -> tuple[Value, Value]:
    """Add a block's output to the residual and norm the sum; the first norm has nothing to add."""
    scale = norm_weight(g, recipe, name)
    if update is None:
        return rms_norm(g, residual, scale, config.rms_norm_eps), residual
    return add_rms_norm(g, update, residual, scale, config.rms_norm_eps)
