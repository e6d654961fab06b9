"""Decoding must keep its distance to the memory's bandwidth: a ratio within one run, never a time.

    pytest -m slow tests/benchmarks/test_speed.py

The fixed peer is the same weights as bare MatMulNBits nodes in one graph: what a decode step would take if
there were nothing around the matrix products. Both take turns in one process, on one thread, whose CPU time
other programs leave alone; the best of many turns counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from qwen_profiles.schema import load_profile

from benchmarks.geometry import GEOMETRIES, write_checkpoint
from benchmarks.support.artifacts import make_artifact
from benchmarks.support.checkpoints import TINY, copy_tokenizer
from benchmarks.support.session import Session

TURNS = 200
# Of the time of a decode step, the share that the matrix products alone need (docs/performance.md).
LEAST_SHARE = 0.5
# Four layers of the 0.8B geometry, one of them full attention, and a small vocabulary.
GEOMETRY = {**GEOMETRIES["0.8B"], "num_hidden_layers": 4, "vocab_size": 32768}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cpu", "cpu-int4"])
def test_most_of_a_decode_step_is_matrix_products(name: str, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", GEOMETRY)
    copy_tokenizer(TINY, checkpoint)
    # Of random weights any codes will do: the nearest take seconds.
    profile = load_profile(name, ["compression=data-free"])
    artifact = make_artifact(checkpoint, profile, tmp_path / "out", all_logits=False)
    session = Session(artifact, threads=1)
    session.run(np.arange(16))
    bare = bare_products(artifact, tmp_path / "bare.onnx")
    seconds: dict[str, list[float]] = {"step": [], "products": []}
    for _ in range(TURNS):
        seconds["products"].append(timed(bare))
        seconds["step"].append(timed(lambda: session.run([7])))
    share = min(seconds["products"]) / min(seconds["step"])
    assert LEAST_SHARE < share < 1.1, f"the matrix products take {share:.0%} of a decode step"


def bare_products(artifact: Path, path: Path) -> Callable[[], object]:
    """Every MatMulNBits of the artifact's decoder, each on an input of its own size, one after the other."""
    model = onnx.load(artifact / "model.onnx", load_external_data=False)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes, inputs, outputs, used = [], {}, [], {}
    for number, node in enumerate(node for node in model.graph.node if node.op_type == "MatMulNBits"):
        width = next(attribute.i for attribute in node.attribute if attribute.name == "K")
        inputs[f"x{width}"] = helper.make_tensor_value_info(f"x{width}", TensorProto.FLOAT, [1, 1, width])
        used |= {name: weights[name] for name in node.input[1:] if name}
        node.input[0], node.output[0] = f"x{width}", f"y{number}"
        # One number leaves the graph, not the product: a decode step does not copy its products either.
        last = helper.make_node("ReduceMax", [f"y{number}"], [f"z{number}"], keepdims=0)
        nodes += [node, last]
        outputs.append(helper.make_tensor_value_info(f"z{number}", TensorProto.FLOAT, []))
    graph = helper.make_graph(nodes, "products", list(inputs.values()), outputs, list(used.values()))
    bare = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    path = artifact / path.name  # beside the data file
    onnx.save(bare, path)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feeds = {name: np.ones([1, 1, int(name[1:])], np.float32) for name in inputs}
    return lambda: session.run(None, feeds)


def timed(run: Callable[[], object]) -> float:
    started = time.thread_time()
    run()
    return time.thread_time() - started
