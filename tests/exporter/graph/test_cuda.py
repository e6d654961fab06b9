"""What CUDA will be asked to run: nothing that has a kernel there for another type only, or none.

By kernels.json, which was read in CUDA's library, and which the exporter takes its operators from too: this
finds a graph that asks for what is not there, not a table that is wrong. No GPU has run these graphs.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from qwen_export.backends.onnx.kernels import FLOAT, KERNELS
from qwen_profiles.schema import load_profile

from benchmarks.support.checkpoints import TINY, TINY_MOE, TINY_VL
from tests.exporter.graph.test_portable import value_types
from tests.support.exported import Exported

# Of types that are no weights' or activations': ONNX Runtime computes shapes and lengths on the CPU.
SHAPES = {"tensor(int64)", "tensor(int32)", "tensor(bool)"}


@pytest.mark.parametrize("checkpoint", [TINY, TINY_MOE, TINY_VL], ids=lambda path: path.name)
def test_every_node_of_a_step_has_a_kernel(checkpoint: Path, exported: Exported) -> None:
    kernels = KERNELS["cuda"]
    assert kernels is not None
    seen = set()
    artifact = exported(checkpoint, load_profile("nvidia-rtx-8gb"))
    for path in sorted(artifact.glob("*.onnx")):
        types = value_types(path)
        for node in onnx.load(path, load_external_data=False).graph.node:
            kind = next(types[name] for name in node.input if name)
            if kind in SHAPES:
                continue
            assert node.op_type in kernels[node.domain], node.name
            if kind in FLOAT:  # the table knows no others: codes are looked up as tensor(uint8)
                assert kind in kernels[node.domain][node.op_type], (node.name, kind)
            seen.add(node.op_type)
    assert {"LinearAttention", "GroupQueryAttention", "MatMulNBits"} <= seen
