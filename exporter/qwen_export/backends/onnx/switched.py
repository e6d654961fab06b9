"""Adapters that are switched at run time, in ONNX Runtime's format: factors that are inputs of projections.

A projection may be rows of several tensors: its A has the factors of all, and its B has theirs where their
rows are, and zeros elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from qwen_common.errors import UserError

from qwen_export.adapters.switched import adapter_file
from qwen_export.adapters.updates import SwitchedAdapter
from qwen_export.backends.onnx.files import MODEL_FILE
from qwen_export.backends.onnx.graphs import Graphs
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.checkpoint.tensors.tensor import float32
from qwen_export.graph.linear import factor_names
from qwen_export.graph.weights import Weight

_VERSION = 1


def check_switched(checkpoint: Checkpoint, graphs: Graphs) -> None:
    """Raises:
    UserError: an adapter changes a tensor for which the graph has no inputs.
    """
    taken = {part.tensor for weight in _weights(graphs) for part in weight.rows}
    for adapter in checkpoint.switched_adapters:
        for tensor in adapter.updates:
            if tensor not in taken:
                raise UserError(
                    f"adapter {adapter.described['name']} changes {tensor}, which is no projection of the "
                    "graph: merge the adapter with --adapter"
                )


def write_switched(checkpoint: Checkpoint, graphs: Graphs, folder: Path) -> None:
    """One file for each adapter."""
    import onnxruntime as ort

    for adapter in checkpoint.switched_adapters:
        parameters = {}
        for weight in _weights(graphs):
            for name, factor in zip(factor_names(weight), _factors(adapter, weight), strict=False):
                parameters[name] = ort.OrtValue.ortvalue_from_numpy(factor)
        file = ort.AdapterFormat()
        file.set_adapter_version(_VERSION)
        file.set_model_version(_VERSION)
        file.set_parameters(parameters)
        file.export_adapter(str(folder / adapter_file(adapter.described["name"])))


def _weights(graphs: Graphs) -> Iterator[Weight]:
    """Those whose projections take factors."""
    inputs = {value.name for value in graphs.by_file[MODEL_FILE].inputs}
    return (weight for weight, _ in graphs.placed if factor_names(weight)[0] in inputs)


def _factors(adapter: SwitchedAdapter, weight: Weight) -> list[np.ndarray]:
    """A [K, rank] and B [rank, N] in float32, scaled in B; [] where the adapter does not change `weight`."""
    tensors = dict.fromkeys(part.tensor for part in weight.rows if part.tensor in adapter.updates)
    if not tensors:
        return []
    n, k = weight.shape
    a, columns, rank = [], {}, 0
    for tensor in tensors:
        factor = adapter.updates[tensor].a
        a.append(float32(factor.read(0, factor.shape[0])).reshape(-1, k))
        columns[tensor] = slice(rank, rank + len(a[-1]))
        rank += len(a[-1])
    b, row = np.zeros((n, rank), np.float32), 0
    for part in weight.rows:
        stop = row + part.stop - part.start
        if part.tensor in columns:
            update = adapter.updates[part.tensor]
            b[row:stop, columns[part.tensor]] = float32(update.b.read(part.start, part.stop)) * np.float32(
                update.scaling
            )
        row = stop
    return [np.ascontiguousarray(np.concatenate(a).T), np.ascontiguousarray(b.T)]
