"""Which ONNX Runtime an artifact's graphs ask for."""

from __future__ import annotations

from pathlib import Path

import pytest
from qwen_export.backends.onnx.graphs import build_graphs
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_profiles.schema import load_profile

from benchmarks.support.checkpoints import TINY, TINY_MOE


@pytest.mark.parametrize(
    ("checkpoint", "profile", "expected"),
    [
        (TINY, "cpu", ">=1.30"),
        (TINY_MOE, "cpu", ">=1.31"),  # 1.30 refuses QMoE's accuracy_level (test_directml.py)
        (TINY_MOE, "strix-halo", ">=1.30"),  # its experts are MatMulNBits
    ],
)
def test_the_oldest_onnxruntime(checkpoint: Path, profile: str, expected: str) -> None:
    graphs = build_graphs(Checkpoint.open(str(checkpoint)), load_profile(profile))
    assert graphs.onnxruntime() == expected
    found = {other.target.name: other.onnxruntime() for other in graphs.further}
    assert found == ({"fused": ">=1.30", "portable": ">=1.24"} if profile == "strix-halo" else {})
