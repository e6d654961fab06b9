"""How many nodes a decode step runs on the CPU: each costs microseconds, whatever it computes."""

from __future__ import annotations

from pathlib import Path

import pytest
from qwen_profiles.schema import load_profile

from benchmarks.nodes import step_nodes
from benchmarks.support.checkpoints import TINY, TINY_MOE
from tests.support.exported import Exported

# By layer, with the two norms around it; then what there is once: embedding, positions, last norm, lm_head.
GATED_DELTA_NET, ATTENTION, ONCE = 23, 14, 32
MLP, EXPERTS = 5, 12
# What a step by the graph for several tokens has besides, where none are pending: its states go on as they
# are, and what of the token enters them is kept.
HANDED_ON, HANDED_ON_ONCE = 4, 12


@pytest.mark.parametrize(
    ("checkpoint", "feed_forward", "layers"), [(TINY, MLP, (6, 2)), (TINY_MOE, EXPERTS, (3, 1))]
)
def test_a_step_has_no_more_nodes_than_its_layers_need(
    exported: Exported, checkpoint: Path, feed_forward: int, layers: tuple[int, int]
) -> None:
    artifact = exported(checkpoint, load_profile("cpu"))
    kinds = step_nodes(artifact, past=4, steps=1)
    needed = layers[0] * GATED_DELTA_NET + layers[1] * ATTENTION + sum(layers) * feed_forward + ONCE
    assert sum(kind.nodes for kind in kinds.values()) <= needed, kinds
    several = step_nodes(artifact, past=4, steps=1, file="speculative.onnx")
    assert several["LinearAttention"].nodes == several["Identity"].nodes / 2 == layers[0]
    needed += layers[0] * HANDED_ON + HANDED_ON_ONCE
    assert sum(kind.nodes for kind in several.values()) <= needed, several
