"""What DirectML will be asked to run: every node in its kernel table, no control flow, safe MatMulNBits."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime as ort
import pytest
from qwen_export.backends.onnx.kernels import KERNELS

from benchmarks.support.artifacts import directml_profile, make_artifact
from benchmarks.support.checkpoints import TINY
from tests.support.random_checkpoints import write_random_checkpoint, write_vision_checkpoint


@pytest.fixture(scope="module", params=["trained", "random", "experts", "model", "embedding", "vision"])
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, onnx.ModelProto]:
    """A graph's path and content; the last three are those of one vision-language artifact."""
    folder = tmp_path_factory.mktemp("portable")
    profile = directml_profile()
    if request.param in ("model", "embedding", "vision"):
        tower = {"hidden_size": 64, "num_heads": 2}
        checkpoint = write_vision_checkpoint(folder / "c", hidden_size=128, vision=tower)
        int8 = profile.weights["embedding"]
        profile = profile.model_copy(update={"weights": {**profile.weights, "vision": int8}})
        artifact = make_artifact(checkpoint, profile, folder / "artifact", all_logits=False)
        graph = artifact / f"{request.param}.onnx"
        return graph, onnx.load(graph, load_external_data=False)
    shapes: dict[str, dict[str, int]] = {"random": {"hidden_size": 72}, "experts": {"num_experts": 8}}
    shape = shapes.get(request.param)
    checkpoint = TINY if shape is None else write_random_checkpoint(folder / "c", **shape)
    graph = make_artifact(checkpoint, profile, folder / "artifact", all_logits=False) / "model.onnx"
    return graph, onnx.load(graph, load_external_data=False)


def value_types(path: Path) -> dict[str, str]:
    """The type that ONNX Runtime itself infers for every value of the graph."""
    proto = onnx.load(path)
    graph = proto.graph
    declared = {output.name for output in graph.output}
    for node in graph.node:
        for name in node.output:
            if name and name not in declared:
                graph.output.add().name = name
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    types = {value.name: value.type for value in [*session.get_inputs(), *session.get_outputs()]}
    for tensor in graph.initializer:
        types[tensor.name] = {
            onnx.TensorProto.FLOAT: "tensor(float)",
            onnx.TensorProto.FLOAT16: "tensor(float16)",
            onnx.TensorProto.INT32: "tensor(int32)",
            onnx.TensorProto.INT64: "tensor(int64)",
            onnx.TensorProto.UINT8: "tensor(uint8)",
        }[tensor.data_type]
    return types


def test_every_node_has_a_kernel_for_its_type(model: tuple[Path, onnx.ModelProto]) -> None:
    path, proto = model
    types, directml = value_types(path), KERNELS["dml"]
    assert directml is not None
    known = {kind for operators in directml.values() for kinds in operators.values() for kind in kinds}
    for node in proto.graph.node:
        assert node.op_type in directml[node.domain], node.name
        assert types[node.input[0]] in directml[node.domain][node.op_type], node.name
        assert all(types[name] in known for name in node.output if name), node.name


def test_there_is_no_control_flow(model: tuple[Path, onnx.ModelProto]) -> None:
    for node in model[1].graph.node:
        assert not any(attribute.type == onnx.AttributeProto.GRAPH for attribute in node.attribute), node.name


def test_quantised_products_are_as_directml_reads_them(model: tuple[Path, onnx.ModelProto]) -> None:
    """Zero points present, blocks that divide K, and an even number of them in each row."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model[1].graph.initializer}
    # Experts gathered for one token come from the initializers of a product over all of them.
    products = [
        node
        for node in model[1].graph.node
        if node.op_type == "MatMulNBits" and all(name in shapes for name in node.input[1:])
    ]
    assert products or model[0].name == "embedding.onnx"  # which looks rows up, and multiplies nothing
    for node in products:
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        bits, block = attributes["bits"], attributes["block_size"]
        n, blocks = shapes[node.input[2]]
        assert attributes["K"] == blocks * block
        assert len(node.input) == 4
        assert shapes[node.input[3]] == (n, blocks * bits // 8)
        assert blocks % 2 == 0


def test_operator_set_is_one_that_onnxruntime_1_24_has(model: tuple[Path, onnx.ModelProto]) -> None:
    versions = {entry.domain: entry.version for entry in model[1].opset_import}
    assert versions == {"": 21, "com.microsoft": 1}
