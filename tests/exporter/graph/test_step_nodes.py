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


@pytest.mark.parametrize(
    ("checkpoint", "feed_forward", "layers"), [(TINY, MLP, (6, 2)), (TINY_MOE, EXPERTS, (3, 1))]
)
def test_a_step_has_no_more_nodes_than_its_layers_need(
    exported: Exported, checkpoint: Path, feed_forward: int, layers: tuple[int, int]
) -> None:
    kinds = step_nodes(exported(checkpoint, load_profile("cpu")), past=4, steps=1)
    needed = layers[0] * GATED_DELTA_NET + layers[1] * ATTENTION + sum(layers) * feed_forward + ONCE
    assert sum(kind.nodes for kind in kinds.values()) <= needed, kinds
