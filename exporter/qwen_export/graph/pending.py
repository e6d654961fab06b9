"""Runs of several tokens of which perhaps only the first ones stay.

A recurrent state cannot be cut back. So a run's tokens do not go into the states that it returns. What each
of them brings to a Gated DeltaNet is returned beside, a few thousand numbers, and the next run is given that
of the tokens that stayed: it lets them in first. The weights are not read again for it. Where none are
pending, as in plain decoding, an `If` hands the states on, and copies nothing where a state that comes out is
given the memory of the one that went in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from qwen_export.architecture.models.qwen3_5 import TextConfig
from qwen_export.graph.builder import GraphBuilder, Value
from qwen_export.graph.tokens import last_positions

MOST_TOKENS = 8  # of a run's end may be taken back; a prompt's runs are longer, and stay
_FLOAT32 = np.dtype(np.float32)

States = tuple[Value, Value]  # of a Gated DeltaNet: the convolution's and the recurrent one


class Entering(NamedTuple):
    """Of a run's tokens, [1, tokens, width] each: the convolution's input, of which its state is made, and
    what the recurrence is given."""

    mixed: Value
    convolved: Value
    decay: Value
    beta: Value


class Pending:
    """What the layers of one graph exchange with the runs before and after.

    Input: pending float32 [layers, pending_length, width], of the Gated DeltaNets in their order; the length
    may be 0. Output: entering float32 [layers, tokens, width], the same of the last tokens of this run. One
    sequence.
    """

    def __init__(self, g: GraphBuilder, config: TextConfig) -> None:
        self._g = g
        channels, heads = config.conv_dim, config.linear_num_value_heads
        self._widths = channels, channels, heads, heads
        self._shape = (config.layer_types.count("linear_attention"), "last_tokens", sum(self._widths))
        self._entering: list[Entering] = []

    def settle(
        self, past: Sequence[States], enter: Callable[[int, Entering, States], States]
    ) -> list[States]:
        """The states of all Gated DeltaNets after the tokens that are pending.

        Args:
            enter: makes the nodes that let tokens into the states of one of them, by its place in `past`.
        """
        g, (layers, _, width) = self._g, self._shape
        pending = g.input("pending", _FLOAT32, (layers, "pending_length", width))
        there = g.cast(g.op("Squeeze", g.op("Shape", pending, start=1, end=2)), np.bool_)
        with g.branch("pending") as some:
            for index, layer in enumerate(
                g.ops("Split", pending, outputs=layers, axis=0, num_outputs=layers)
            ):
                entering = Entering(*g.ops("Split", layer, g.ints(*self._widths), outputs=4, axis=-1))
                if g.dtype != _FLOAT32:
                    entering = entering._replace(mixed=g.cast(entering.mixed, g.dtype))
                some.outputs.extend(enter(index, entering, past[index]))
        with g.branch("nothing_pending") as none:
            none.outputs.extend(g.op("Identity", state) for pair in past for state in pair)
        settled = g.ops("If", there, outputs=2 * layers, then_branch=some, else_branch=none)
        return list(zip(settled[::2], settled[1::2], strict=True))

    def enters(self, mixed: Value, convolved: Value, decay: Value, beta: Value) -> None:
        """What enters the next layer in this run."""
        # The gates are small enough to stay whole until the end of a prompt's run: fewer nodes.
        mixed, convolved = (last_positions(self._g, value, MOST_TOKENS) for value in (mixed, convolved))
        self._entering.append(Entering(mixed, convolved, decay, beta))

    def output(self) -> None:
        """Declare the graph's output, once all layers have said what enters."""
        g = self._g
        *wide, decay, beta = (g.op("Concat", *values, axis=0) for values in zip(*self._entering, strict=True))
        wide = [value if g.dtype == _FLOAT32 else g.cast(value, _FLOAT32) for value in wide]
        gates = (last_positions(g, value, MOST_TOKENS) for value in (decay, beta))
        g.output(g.op("Concat", *wide, *gates, axis=-1), "entering", _FLOAT32, self._shape)
