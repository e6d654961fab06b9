"""An ONNX artifact's weights, read back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from qwen_export.backends.onnx.graphs import build_graphs
from qwen_export.backends.onnx.stored import stored_tensors
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.checkpoint.tensors.tensor import float32
from qwen_profiles.schema import load_profile

from benchmarks.support.artifacts import make_artifact
from benchmarks.support.checkpoints import TINY, TINY_MOE, TINY_VL


@pytest.mark.parametrize("checkpoint", [TINY, TINY_MOE, TINY_VL], ids=lambda path: path.name)
@pytest.mark.parametrize("profile", ["cpu", "strix-halo"])
def test_stored_weights_are_the_checkpoints(checkpoint: Path, profile: str, tmp_path: Path) -> None:
    """Every matrix under its own name, row for row, within what its precision allows."""
    source, chosen = Checkpoint.open(str(checkpoint)), load_profile(profile)
    artifact = make_artifact(checkpoint, chosen, tmp_path / "artifact", all_logits=False)
    specs = source.config.tensors()
    stored = stored_tensors(artifact, build_graphs(source, chosen), specs)
    assert stored.keys() == {name for name, spec in specs.items() if len(spec.shape) > 1}
    for name, tensor in stored.items():
        rows = tensor.shape[0]
        expected, found = float32(source.tensors[name].read(0, rows)), tensor.read(0, rows)
        bits = {"mlp": 0.1, "experts": 0.1}.get(tensor.role, 0.01)
        assert np.linalg.norm(found - expected) < bits * np.linalg.norm(expected), name
        np.testing.assert_array_equal(tensor.read(rows // 2, rows), found[rows // 2 :])
