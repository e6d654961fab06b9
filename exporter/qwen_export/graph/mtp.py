"""The multi-token-prediction head: from a token and what the decoder knew before it to the token after."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from qwen_export.architecture.models.qwen3_5 import TextConfig
from qwen_export.graph.attention import attention, spans
from qwen_export.graph.builder import GraphBuilder, Value
from qwen_export.graph.linear import linear, projection
from qwen_export.graph.model import feed_forward, states
from qwen_export.graph.norm import add_rms_norm, norm_weight, rms_norm
from qwen_export.graph.recipe import Recipe
from qwen_export.graph.rotary import rotation
from qwen_export.graph.tokens import last_positions
from qwen_export.graph.vocabulary import embed, vocabulary, vocabulary_logits


def mtp_head(g: GraphBuilder, config: TextConfig, recipe: Recipe) -> None:
    """Build the head into `g`.

    Inputs: input_ids int64 [batch, sequence]; hidden_states [batch, sequence, hidden], the decoder's after
    its final norm for the token *before* each of input_ids; attention_mask int64 [batch, total], all ones;
    position_ids int64 [3, batch, sequence] of those hidden states; the layer's past keys and values.
    Outputs: logits float32 [batch, 1, vocab] for the token after the last of input_ids, own_hidden_states
    [batch, 1, hidden] after the last norm, which stand for the decoder's where a further token is drafted,
    and the present keys and values.

    Source: vLLM's Qwen3_5MultiTokenPredictor, and its proposer for several tokens by one layer; transformers
    has no such class.
    """
    recipe = replace(recipe, cache_dtype=None)  # calibration text does not go through it
    int64 = np.dtype(np.int64)
    run = ("batch_size", "sequence_length")
    input_ids = g.input("input_ids", int64, run)
    hidden = g.input("hidden_states", g.dtype, (*run, config.hidden_size))
    attention_mask = g.input("attention_mask", int64, ("batch_size", "total_sequence_length"))
    position_ids = g.input("position_ids", int64, (3, *run))
    one_layer = config.model_copy(update={"num_hidden_layers": 1, "layer_types": ("full_attention",)})
    carried = states(one_layer, 0, g.dtype)
    past_key, past_value = (g.input(state.past, state.dtype, state.past_shape) for state in carried)
    table = rotation(g, config, position_ids)
    visible = spans(g, config, attention_mask, input_ids)

    lm_head, embedding = vocabulary(config, recipe)
    epsilon = config.rms_norm_eps

    def scale(name: str) -> Value:
        return norm_weight(g, recipe, name)

    embedded = rms_norm(g, embed(g, input_ids, embedding), scale("mtp.pre_fc_norm_embedding"), epsilon)
    known = rms_norm(g, hidden, scale("mtp.pre_fc_norm_hidden"), epsilon)
    fc = projection(recipe, "mtp.fc", recipe.whole("mtp.fc.weight"))
    residual = linear(g, recipe, g.op("Concat", embedded, known, axis=-1), fc)

    name = "mtp.layers.0"
    with g.scope(name):
        x = rms_norm(g, residual, scale(f"{name}.input_layernorm"), epsilon)
        with g.scope("self_attn"):
            update, (present,) = attention(
                g, config, recipe, f"{name}.self_attn", x, table, visible, (past_key, past_value)
            )
        x, residual = add_rms_norm(g, update, residual, scale(f"{name}.post_attention_layernorm"), epsilon)
        update = feed_forward(g, config, recipe, f"{name}.mlp", x)
    for state, value in zip(carried, present, strict=True):
        g.output(value, state.present, state.dtype, state.present_shape)
    x, _ = add_rms_norm(g, update, residual, scale("mtp.norm"), epsilon)
    last = last_positions(g, x, 1)
    g.output(last, "own_hidden_states", g.dtype, ("batch_size", 1, config.hidden_size))
    logits = vocabulary_logits(g, recipe, last, lm_head)
    g.output(logits, "logits", np.dtype(np.float32), ("batch_size", 1, config.vocab_size))
