"""Sizes of graphs are those of onnx's own protocol buffers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from qwen_export.backends.onnx.graphs import build_graphs
from qwen_export.backends.onnx.proto import model_proto, model_size
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.graph.builder import DATA_TYPES
from qwen_profiles.schema import load_profile

from benchmarks.support.checkpoints import TINY, TINY_MOE, TINY_VL


@pytest.mark.parametrize("checkpoint", [TINY, TINY_MOE, TINY_VL], ids=lambda path: path.name)
@pytest.mark.parametrize("profile", ["cpu", "cpu-int4", "strix-halo", "nvidia-rtx-8gb"])
def test_the_predicted_size_of_a_graph_is_its_size(checkpoint: Path, profile: str) -> None:
    opened, mtp = Checkpoint.open(str(checkpoint)), profile == "cpu"
    config = opened.config.model_copy(update={"mtp_num_hidden_layers": int(mtp)})
    graphs = build_graphs(replace(opened, config=config), load_profile(profile), mtp=mtp)
    speculative = profile in {"cpu", "cpu-int4"}
    assert len(graphs.by_file) == 1 + 2 * speculative + mtp + 2 * (opened.vision is not None)
    for graph in graphs.every_file.values():
        assert model_size(graph) == len(model_proto(graph).SerializeToString())


@pytest.mark.parametrize("name", DATA_TYPES)
def test_data_types_are_onnxs(name: str) -> None:
    assert onnx.helper.np_dtype_to_tensor_dtype(np.dtype(name)) == DATA_TYPES[name]
