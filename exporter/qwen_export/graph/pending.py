"""Runs of several tokens of which perhaps only the first ones stay.

A recurrent state cannot be cut back. So a run's tokens do not go into the states that it returns. What each
of them brings to a Gated DeltaNet is returned beside, a few thousand numbers, and the next run is given that
of the tokens that stayed: it lets them in first. The weights are not read again for it.
"""

from __future__ import annotations

import numpy as np

from qwen_export.architecture.models.qwen3_5 import TextConfig
from qwen_export.graph.builder import GraphBuilder, Value
from qwen_export.graph.tokens import last_positions

MOST_TOKENS = 8  # of a run's end may be taken back; a prompt's runs are longer, and stay
_FLOAT32 = np.dtype(np.float32)


class Pending:
    """What the layers of one graph exchange with the runs before and after.

    Input: pending float32 [layers, pending_length, width], of the Gated DeltaNets in their order; the length
    may be 0. Output: entering float32 [layers, tokens, width], the same of the last tokens of this run. One
    sequence.
    """

    def __init__(self, g: GraphBuilder, config: TextConfig) -> None:
        self._g = g
        self._widths = config.conv_dim, config.linear_num_value_heads, config.linear_num_value_heads
        self._shape = (config.layer_types.count("linear_attention"), "last_tokens", sum(self._widths))
        layers = self._shape[0]
        before = g.input("pending", _FLOAT32, (layers, "pending_length", sum(self._widths)))
        self._before = iter(g.ops("Split", before, outputs=layers, axis=0, num_outputs=layers))
        self._entering: list[Value] = []

    def exchange(self, mixed: Value, decay: Value, beta: Value) -> tuple[Value, Value, Value]:
        """Give what enters the next layer's recurrence in this run, [1, sequence, ...] each, for that of the
        tokens that are pending."""
        g = self._g
        mixed = mixed if g.dtype == _FLOAT32 else g.cast(mixed, _FLOAT32)
        entering = (last_positions(g, value, MOST_TOKENS) for value in (mixed, decay, beta))
        self._entering.append(g.op("Concat", *entering, axis=-1))
        mixed, decay, beta = g.ops("Split", next(self._before), g.ints(*self._widths), outputs=3, axis=-1)
        return mixed if g.dtype == _FLOAT32 else g.cast(mixed, g.dtype), decay, beta

    def output(self) -> None:
        """Declare the graph's output, once all layers have exchanged theirs."""
        self._g.output(self._g.op("Concat", *self._entering, axis=0), "entering", _FLOAT32, self._shape)
