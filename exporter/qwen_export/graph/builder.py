"""A thin layer over onnx_ir: nodes by call, constants by value, weights by declaration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx_ir as ir

from qwen_export.graph.targets import CONTRIB_OPERATORS, Target
from qwen_export.graph.weights import StoredTensor, Weight

OPSET = 21
IR_VERSION = 10
DATA_FILE = "model.onnx.data"
# Large tensors start on Windows' mapping granularity so that ONNX Runtime can map instead of copy them.
_SMALL_ALIGNMENT = 64
_LARGE_ALIGNMENT = 64 * 1024
_LARGE = 1024 * 1024

_CONTRIB = "com.microsoft"


class DataLayout:
    """The places of weights in the data file that all graphs of an artifact share.

    Attributes:
        stored: each weight with the tensors that it is stored as, in file order.
        end: bytes laid out so far.
    """

    def __init__(self) -> None:
        self.stored: list[tuple[Weight, list[StoredTensor]]] = []
        self.end = 0
        self._tensors: dict[str, list[StoredTensor]] = {}

    def place(self, weight: Weight) -> list[StoredTensor]:
        """Where `weight` lies; one that several graphs use is stored once."""
        if weight.name not in self._tensors:
            self._tensors[weight.name] = [self._append(*tensor) for tensor in weight.layout()]
            self.stored.append((weight, self._tensors[weight.name]))
        return self._tensors[weight.name]

    def _append(self, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> StoredTensor:
        tensor = StoredTensor(name, dtype, shape, offset=0)
        alignment = _LARGE_ALIGNMENT if tensor.nbytes >= _LARGE else _SMALL_ALIGNMENT
        offset = -(-self.end // alignment) * alignment
        self.end = offset + tensor.nbytes
        return StoredTensor(name, dtype, shape, offset)


class GraphBuilder:
    """Collects the nodes of one ONNX graph and the weights that it needs.

    Attributes:
        target: which operators may be used.
        dtype: dtype of the activations.
        layout: the data file that the weights go to.
        pairs: a run is two tokens, see `tokens.py`.
    """

    def __init__(self, target: Target, dtype: np.dtype, layout: DataLayout, pairs: bool = False) -> None:
        self.target = target
        self.dtype = dtype
        self.layout = layout
        self.pairs = pairs
        self._inputs: dict[str, ir.Value] = {}
        self._outputs: list[ir.Value] = []
        self._nodes: list[ir.Node] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._weights: dict[str, tuple[ir.Value, ...]] = {}
        self._scope: list[str] = []
        self._names: Counter[str] = Counter()

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Prefix the names of the nodes made inside, as modules nest in the checkpoint."""
        self._scope.append(name)
        try:
            yield
        finally:
            self._scope.pop()

    def input(self, name: str, dtype: np.dtype, shape: Sequence[int | str]) -> ir.Value:
        """The graph's input `name`; asked for again, it is the same."""
        if name not in self._inputs:
            self._inputs[name] = _typed(name, dtype, shape)
        return self._inputs[name]

    def output(self, value: ir.Value, name: str, dtype: np.dtype, shape: Sequence[int | str]) -> None:
        """Declare `value` a graph output called `name`. It must be the output of a node."""
        value.name = name
        value.dtype = ir.DataType.from_numpy(dtype)
        value.shape = ir.Shape(shape)
        self._outputs.append(value)

    def op(self, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """Add a node with one output."""
        return self.ops(op_type, *inputs, outputs=1, **attributes)[0]

    def ops(
        self, op_type: str, *inputs: ir.Value | None, outputs: int, **attributes: Any
    ) -> tuple[ir.Value, ...]:
        """Add a node with several outputs."""
        name = ".".join([*self._scope, op_type])
        self._names[name] += 1
        if self._names[name] > 1:
            name = f"{name}_{self._names[name]}"
        domain = _CONTRIB if op_type in CONTRIB_OPERATORS else ""
        node = ir.node(
            op_type, list(inputs), attributes=attributes, domain=domain, name=name, num_outputs=outputs
        )
        for index, value in enumerate(node.outputs):
            value.name = f"{name}/{index}"
        self._nodes.append(node)
        return tuple(node.outputs)

    def constant(self, value: Any, dtype: np.dtype | type | None = None) -> ir.Value:
        """A constant stored in the graph file itself; equal constants are stored once."""
        array = np.asarray(value, dtype=dtype if dtype is not None else self.dtype)
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = _initializer(ir.Tensor(array, name=f"constant.{len(self._constants)}"))
        return self._constants[key]

    def ints(self, *values: int) -> ir.Value:
        """A 1-D int64 constant: shapes, axes, slice bounds."""
        return self.constant(values, np.int64)

    def reshape(self, value: ir.Value, *shape: int) -> ir.Value:
        """0 keeps the axis that stands in that place, -1 takes what is left (ONNX Reshape)."""
        return self.op("Reshape", value, self.ints(*shape))

    def cast(self, value: ir.Value, dtype: np.dtype | type) -> ir.Value:
        return self.op("Cast", value, to=int(ir.DataType.from_numpy(np.dtype(dtype))))

    def weight(self, weight: Weight) -> tuple[ir.Value, ...]:
        """The initializers that `weight` is stored as; a weight used twice is stored once."""
        if weight.name not in self._weights:
            tensors = self.layout.place(weight)
            self._weights[weight.name] = tuple(_initializer(_external(tensor)) for tensor in tensors)
        return self._weights[weight.name]

    def model(self, name: str) -> ir.Model:
        """The finished model; its weights are references into `DATA_FILE`."""
        weights = [value for values in self._weights.values() for value in values]
        graph = ir.Graph(
            list(self._inputs.values()),
            self._outputs,
            nodes=self._nodes,
            initializers=[*weights, *self._constants.values()],
            opset_imports={"": OPSET, _CONTRIB: 1},
            name=name,
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="qwen-edge")


def _typed(name: str, dtype: np.dtype, shape: Sequence[int | str]) -> ir.Value:
    return ir.Value(
        name=name, type=ir.TensorType(ir.DataType.from_numpy(np.dtype(dtype))), shape=ir.Shape(shape)
    )


def _initializer(tensor: ir.Tensor[Any] | ir.ExternalTensor) -> ir.Value:
    return ir.Value(
        name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape), const_value=tensor
    )


def _external(tensor: StoredTensor) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        DATA_FILE,
        tensor.offset,
        tensor.nbytes,
        ir.DataType.from_numpy(tensor.dtype),
        shape=ir.Shape(tensor.shape),
        name=tensor.name,
    )
