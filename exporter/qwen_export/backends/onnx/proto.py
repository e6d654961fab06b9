"""Graphs as onnx's protocol buffers, and the size of these without making them.

Source: onnx.proto for the fields, and protobuf's description of its wire format for their sizes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from qwen_export.graph.builder import CONTRIB_DOMAIN, DATA_FILE, DATA_TYPES, Branch, Graph, Node, Value

if TYPE_CHECKING:
    import onnx

_IR_VERSION = 10
_OPSETS = {"": 21, CONTRIB_DOMAIN: 1}
_PRODUCER = "qwen-edge"


def model_proto(graph: Graph) -> onnx.ModelProto:
    """The model that has `graph`; its weights are references into `DATA_FILE`."""
    import onnx

    return onnx.ModelProto(
        ir_version=_IR_VERSION,
        producer_name=_PRODUCER,
        opset_import=[
            onnx.OperatorSetIdProto(domain=domain, version=version) for domain, version in _OPSETS.items()
        ],
        graph=onnx.GraphProto(
            name=graph.name,
            input=[_value_info(value) for value in graph.inputs],
            output=[_value_info(value) for value in graph.outputs],
            node=[_node(node) for node in graph.nodes],
            initializer=[_tensor(value) for value in graph.initializers],
            value_info=[_value_info(value) for value in _described(graph)],
        ),
    )


def _described(graph: Graph) -> list[Value]:
    """Initializers that are not described among the inputs, too."""
    inputs = {value.name for value in graph.inputs}
    return [value for value in graph.initializers if value.name not in inputs]


def _value_info(value: Value) -> onnx.ValueInfoProto:
    import onnx

    assert value.dtype is not None
    return onnx.helper.make_tensor_value_info(value.name, DATA_TYPES[value.dtype.name], value.shape)


def _node(node: Node) -> onnx.NodeProto:
    import onnx

    return onnx.NodeProto(
        op_type=node.op_type,
        domain=node.domain or None,
        name=node.name,
        input=["" if value is None else value.name for value in node.inputs],
        output=[value.name for value in node.outputs],
        attribute=[
            onnx.helper.make_attribute(name, _branch(value) if isinstance(value, Branch) else value)
            for name, value in node.attributes.items()
        ],
    )


def _branch(branch: Branch) -> onnx.GraphProto:
    import onnx

    return onnx.GraphProto(
        name=branch.name,
        output=[onnx.ValueInfoProto(name=value.name) for value in branch.outputs],
        node=[_node(node) for node in branch.nodes],
    )


def _tensor(value: Value) -> onnx.TensorProto:
    import onnx

    assert value.dtype is not None and value.tensor is not None
    tensor = onnx.TensorProto(
        name=value.name, data_type=DATA_TYPES[value.dtype.name], dims=value.tensor.shape
    )
    if isinstance(value.tensor, np.ndarray):
        tensor.raw_data = value.tensor.tobytes()
    else:
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, text in _place(value):
            tensor.external_data.add(key=key, value=text)
    return tensor


def _place(value: Value) -> tuple[tuple[str, str], ...]:
    tensor = value.tensor
    assert tensor is not None and not isinstance(tensor, np.ndarray)
    return ("location", DATA_FILE), ("offset", str(tensor.offset)), ("length", str(tensor.nbytes))


def model_size(graph: Graph) -> int:
    """Bytes of `model_proto(graph)` in its file."""
    entries = sum(_field(_value_info_size(value)) for value in (*graph.inputs, *graph.outputs))
    entries += sum(_field(_node_size(node)) for node in graph.nodes)
    entries += sum(_field(_tensor_size(value)) for value in graph.initializers)
    entries += sum(_field(_value_info_size(value)) for value in _described(graph))
    opsets = sum(_field(_field(len(domain)) + 2) for domain in _OPSETS)
    return 2 + _field(len(_PRODUCER)) + opsets + _field(_field(len(graph.name)) + entries)


def _varint(value: int) -> int:
    """Bytes of an integer: 7 bits in each; a negative one has 64 bits."""
    if 0 <= value < 128:
        return 1
    return 10 if value < 0 else -(-value.bit_length() // 7)


def _field(length: int) -> int:
    """Bytes of a string or message of `length`, with its key and its length before it."""
    return length + (2 if length < 128 else 1 + _varint(length))


def _node_size(node: Node) -> int:
    lengths = [len(node.op_type), len(node.name)]
    lengths += [0 if value is None else len(value.name) for value in node.inputs]
    lengths += [len(value.name) for value in node.outputs]
    if node.domain:
        lengths.append(len(node.domain))
    # As `_field` says of short ones, which nearly all are: a planner asks for some 100,000 nodes.
    size = sum(lengths) + 2 * len(lengths) if max(lengths) < 128 else sum(map(_field, lengths))
    for name, attribute in node.attributes.items():
        size += _field(_field(len(name)) + _attribute_size(attribute))
    return size


_TYPE = 3  # of an attribute: a key of two bytes, because the field's number is 20, and the type


def _attribute_size(value: Any) -> int:
    if isinstance(value, int):
        return _TYPE + 1 + _varint(value)
    if isinstance(value, float):
        return _TYPE + 1 + 4
    if isinstance(value, str):
        return _TYPE + _field(len(value))
    if isinstance(value, Branch):
        outputs = sum(_field(_field(len(output.name))) for output in value.outputs)
        nodes = sum(_field(_node_size(node)) for node in value.nodes)
        return _TYPE + _field(_field(len(value.name)) + outputs + nodes)
    return _TYPE + sum(1 + _varint(item) for item in value)  # a list of integers


def _value_info_size(value: Value) -> int:
    assert value.shape is not None
    shape = sum(
        _field(1 + _varint(size) if isinstance(size, int) else _field(len(size))) for size in value.shape
    )
    return _field(len(value.name)) + _field(_field(2 + _field(shape)))


def _tensor_size(value: Value) -> int:
    assert value.shape is not None
    size = _field(len(value.name)) + 2 + sum(1 + _varint(int(item)) for item in value.shape)
    if isinstance(value.tensor, np.ndarray):
        return size + _field(value.tensor.nbytes)
    return size + 2 + sum(_field(_field(len(key)) + _field(len(text))) for key, text in _place(value))
