"""Two tokens in one run, each with the bits that a run of its own would give it.

A kernel may add up one row in another order than several. In a graph of `pairs` the operators that carry a
state, or round by row, are there once for each token. Products with weights, which are most of the time, take
both rows at once where the machine's kernel rounds them as it rounds one: the runtime finds out, and says so
through an input.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from qwen_export.graph.builder import GraphBuilder, Value

PAIR = 2


def each_token(g: GraphBuilder, *values: Value) -> list[tuple[Value, ...]]:
    """`values` [batch, sequence, ...] token by token in a graph of pairs, else as they are."""
    if not g.pairs:
        return [values]
    cut = (g.ops("Split", value, outputs=PAIR, axis=1, num_outputs=PAIR) for value in values)
    return list(zip(*cut, strict=True))


def joined(g: GraphBuilder, parts: list[Value]) -> Value:
    """The opposite of `each_token`, for one value."""
    return parts[0] if len(parts) == 1 else g.op("Concat", *parts, axis=1)


def last_positions(g: GraphBuilder, x: Value, count: int) -> Value:
    """x [batch, sequence, ...] -> its last `count` positions, or all where there are fewer."""
    return g.op("Slice", x, g.ints(-count), g.constant([np.iinfo(np.int64).max], np.int64), g.ints(1))


def by_rows(g: GraphBuilder, kernel: str, x: Value, multiply: Callable[[Value], Value]) -> Value:
    """multiply(x) for x [batch, sequence, K].

    In a graph of pairs the input `rows.<kernel>` int64 [2] says how many of the rows are multiplied at once,
    and how many after them: 2 and 0, or 1 and 1.
    """
    if not g.pairs:
        return multiply(x)
    counts = g.input(f"rows.{kernel}", np.dtype(np.int64), (2,))
    first, rest = g.ops("Split", x, counts, outputs=2, axis=1)
    return g.op("Concat", multiply(first), multiply(rest), axis=1)
