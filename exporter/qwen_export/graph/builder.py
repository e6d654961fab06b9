"""ONNX graphs as plain records: nodes by call, constants by value, weights by declaration.

No ONNX library is needed for them: building one to know its size takes a tenth of the time that onnx's own
classes would. `backends.onnx.proto` makes onnx's of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from qwen_common.errors import UserError

from qwen_export.graph.targets import CONTRIB_OPERATORS, Target
from qwen_export.graph.weights import ExternalTensor, PlacedWeight, Weight

DATA_FILE = "model.onnx.data"
CONTRIB_DOMAIN = "com.microsoft"
# onnx.TensorProto.DataType, by numpy's names.
DATA_TYPES = {
    "float32": 1,
    "uint8": 2,
    "int8": 3,
    "int32": 6,
    "int64": 7,
    "bool": 9,
    "float16": 10,
    "float64": 11,
    "float8_e4m3fn": 17,
    "float8_e8m0fnu": 24,
}
# Large tensors start on Windows' mapping granularity so that ONNX Runtime can map instead of copy them.
_SMALL_ALIGNMENT = 64
_LARGE_ALIGNMENT = 64 * 1024
_LARGE = 1024 * 1024

Shape = tuple[int | str, ...]


@dataclass(slots=True, eq=False)
class Value:
    """What a node takes and gives.

    Attributes:
        dtype, shape: None for what is between nodes, which ONNX Runtime infers.
        tensor: of an initializer: its constant, or its place in the data file.
    """

    name: str
    dtype: np.dtype | None = None
    shape: Shape | None = None
    tensor: np.ndarray | ExternalTensor | None = None


@dataclass(slots=True, eq=False)
class Node:
    """One operator; `inputs` has None for an optional one that is left out."""

    op_type: str
    domain: str
    name: str
    inputs: tuple[Value | None, ...]
    outputs: tuple[Value, ...]
    attributes: Mapping[str, Any]


@dataclass(frozen=True)
class Graph:
    """One ONNX graph, its nodes in the order in which they run."""

    name: str
    inputs: Sequence[Value]
    outputs: Sequence[Value]
    nodes: Sequence[Node]
    initializers: Sequence[Value]


@dataclass(frozen=True)
class Branch:
    """One way that an `If` may take, a graph without inputs: what it reads is the outer graph's."""

    name: str
    outputs: list[Value] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)


class DataLayout:
    """The places of weights in the data file that all graphs of an artifact share.

    Attributes:
        placed: each weight with the tensors that it is stored as, in file order.
        end: bytes laid out so far.
    """

    def __init__(self) -> None:
        self.placed: list[PlacedWeight] = []
        self.end = 0
        self._placed: dict[str, PlacedWeight] = {}

    def place(self, weight: Weight) -> list[ExternalTensor]:
        """Where `weight` lies; one that several graphs use is stored once.

        Raises:
            UserError: a graph before stores what has its name in another form.
        """
        if weight.name not in self._placed:
            tensors = [self._append(*tensor) for tensor in weight.layout()]
            self._placed[weight.name] = placed = PlacedWeight(weight, tensors)
            self.placed.append(placed)
        placed = self._placed[weight.name]
        if placed.weight != weight:
            raise UserError(
                f"graphs of two providers store {weight.name} in two forms, so one folder cannot serve both: "
                "export for one of them, with --set fallbacks=[]"
            )
        return placed.tensors

    def _append(self, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> ExternalTensor:
        size = ExternalTensor(name, dtype, shape, offset=0).nbytes
        alignment = _LARGE_ALIGNMENT if size >= _LARGE else _SMALL_ALIGNMENT
        offset = -(-self.end // alignment) * alignment
        self.end = offset + size
        return ExternalTensor(name, dtype, shape, offset)


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
        self._inputs: dict[str, Value] = {}
        self._defaults: dict[str, Value] = {}
        self._outputs: list[Value] = []
        self._nodes: list[Node] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], Value] = {}
        self._weights: dict[str, tuple[Value, ...]] = {}
        self._scope = ""
        self._names: Counter[str] = Counter()

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Prefix the names of the nodes made inside, as modules nest in the checkpoint."""
        outer = self._scope
        self._scope = f"{outer}{name}."
        try:
            yield
        finally:
            self._scope = outer

    def input(self, name: str, dtype: np.dtype, shape: Sequence[int | str]) -> Value:
        """The graph's input `name`; asked for again, it is the same."""
        if name not in self._inputs:
            self._inputs[name] = Value(name, np.dtype(dtype), tuple(shape))
        return self._inputs[name]

    def optional_input(self, name: str, dtype: np.dtype, shape: Sequence[int | str]) -> Value:
        """An input that need not be given: it is empty then, along its axes without a size."""
        found = self.input(name, dtype, shape)
        empty = np.zeros([size if isinstance(size, int) else 0 for size in shape], dtype)
        self._defaults[name] = Value(name, empty.dtype, empty.shape, empty)
        return found

    def output(self, value: Value, name: str, dtype: np.dtype, shape: Sequence[int | str]) -> None:
        """Declare `value` a graph output called `name`. It must be the output of a node."""
        value.name = name
        value.dtype = np.dtype(dtype)
        value.shape = tuple(shape)
        self._outputs.append(value)

    def op(self, op_type: str, *inputs: Value | None, **attributes: Any) -> Value:
        """Add a node with one output."""
        return self.ops(op_type, *inputs, outputs=1, **attributes)[0]

    def ops(self, op_type: str, *inputs: Value | None, outputs: int, **attributes: Any) -> tuple[Value, ...]:
        """Add a node with several outputs."""
        name = self._scope + op_type
        self._names[name] = count = self._names[name] + 1
        if count > 1:
            name = f"{name}_{count}"
        domain = CONTRIB_DOMAIN if op_type in CONTRIB_OPERATORS else ""
        made = tuple([Value(f"{name}/{index}") for index in range(outputs)])
        self._nodes.append(Node(op_type, domain, name, inputs, made, attributes))
        return made

    @contextmanager
    def branch(self, name: str) -> Iterator[Branch]:
        """Nodes made inside go to a branch of an `If`; they may use all that was made before."""
        outer, branch = self._nodes, Branch(name)
        self._nodes = branch.nodes
        try:
            yield branch
        finally:
            self._nodes = outer

    def constant(self, value: Any, dtype: np.dtype | type | None = None) -> Value:
        """A constant stored in the graph file itself; equal constants are stored once."""
        array = np.asarray(value, dtype=dtype if dtype is not None else self.dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"constant.{len(self._constants)}"
            self._constants[key] = Value(name, array.dtype, array.shape, array)
        return self._constants[key]

    def ints(self, *values: int) -> Value:
        """A 1-D int64 constant: shapes, axes, slice bounds."""
        return self.constant(values, np.int64)

    def reshape(self, value: Value, *shape: int) -> Value:
        """0 keeps the axis that stands in that place, -1 takes what is left (ONNX Reshape)."""
        return self.op("Reshape", value, self.ints(*shape))

    def cast(self, value: Value, dtype: np.dtype | type) -> Value:
        return self.op("Cast", value, to=DATA_TYPES[np.dtype(dtype).name])

    def weight(self, weight: Weight) -> tuple[Value, ...]:
        """The initializers that `weight` is stored as; a weight used twice is stored once."""
        if weight.name not in self._weights:
            tensors = self.layout.place(weight)
            self._weights[weight.name] = tuple(
                Value(tensor.name, tensor.dtype, tensor.shape, tensor) for tensor in tensors
            )
        return self._weights[weight.name]

    def graph(self, name: str) -> Graph:
        """The finished graph; its weights are places in `DATA_FILE`."""
        weights = [value for values in self._weights.values() for value in values]
        return Graph(
            name,
            list(self._inputs.values()),
            self._outputs,
            self._nodes,
            [*weights, *self._constants.values(), *self._defaults.values()],
        )
