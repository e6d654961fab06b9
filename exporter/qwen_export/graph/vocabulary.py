"""Embedding and lm_head: one row for each token, in one matrix, or in two where frequent tokens have a form.

Byte-pair encoding numbers its tokens as it merges them, the most frequent first: the frequent tokens are the
first rows, so that ids need no other order and the logits of both matrices stand one after the other.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from qwen_export.architecture.models.qwen3_5 import EMBEDDING, LM_HEAD, TextConfig
from qwen_export.graph.builder import GraphBuilder, Value
from qwen_export.graph.linear import linear, projection, take_rows
from qwen_export.graph.recipe import Recipe
from qwen_export.graph.weights import Rows, Weight

# Matrices whose rows, in the order in which they stand, are those of all tokens.
Table = tuple[Weight, ...]

_ROWS_TOGETHER = 64  # the kernels of MatMulNBits take rows in groups of at most so many


def vocabulary(config: TextConfig, recipe: Recipe) -> tuple[Table, Table]:
    """lm_head and embedding; the same weights when the checkpoint ties them."""
    if config.tie_word_embeddings:
        tied = _by_frequency(recipe, "lm_head", EMBEDDING)
        return tied, tied
    return _by_frequency(recipe, "lm_head", LM_HEAD), _by_frequency(recipe, "model.embed_tokens", EMBEDDING)


def vocabulary_logits(g: GraphBuilder, recipe: Recipe, x: Value, lm_head: Table) -> Value:
    """x [batch, sequence, hidden] -> float32 [batch, sequence, vocab]."""
    parts = [linear(g, recipe, x, weight) for weight in lm_head]
    logits = parts[0] if len(parts) == 1 else g.op("Concat", *parts, axis=-1)
    # A cast to the same dtype would copy all of them at every token: a graph's output keeps it alive.
    return logits if g.dtype == np.float32 else g.cast(logits, np.float32)


def embed(g: GraphBuilder, ids: Value, table: Table) -> Value:
    """ids int64 [batch, sequence] -> [batch, sequence, hidden]."""
    if len(table) == 1:
        return take_rows(g, ids, table[0])
    frequent, other = table
    first, zero = g.constant(frequent.row_count, np.int64), g.constant(0, np.int64)
    inside = g.op("Greater", first, ids)
    # Each id is looked up in both, in row 0 of the one that has it not.
    of_frequent = take_rows(g, g.op("Where", inside, ids, zero), frequent)
    of_other = take_rows(g, g.op("Where", inside, zero, g.op("Sub", ids, first)), other)
    return g.op("Where", g.op("Unsqueeze", inside, g.ints(-1)), of_frequent, of_other)


def _by_frequency(recipe: Recipe, name: str, tensor: str) -> Table:
    whole = projection(recipe, name, recipe.whole(tensor))
    form, rows = recipe.frequent_tokens, whole.row_count
    first = 0 if form is None else int(form.share * rows) // _ROWS_TOGETHER * _ROWS_TOGETHER
    if form is None or whole.prequantized or not first:
        return (whole,)
    (in_features,) = whole.row_shape
    storage = recipe.quantized(form, in_features)
    frequent = replace(whole, name=f"{name}.frequent", rows=(Rows(tensor, 0, first),), storage=storage)
    return frequent, replace(whole, rows=(Rows(tensor, first, rows),))
