"""An artifact's weights as the checkpoint would hold them: same names, same shapes, the stored values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from qwen_common.errors import UserError

from qwen_export.architecture.tensors import TensorSpec
from qwen_export.backends.onnx.graphs import Graphs
from qwen_export.checkpoint.tensors.plain import PlainTensor
from qwen_export.checkpoint.tensors.tensor import Assembled, Part
from qwen_export.graph.builder import DATA_FILE
from qwen_export.graph.weights import Rows, Transform, Weight, deinterleave_gate_up, interleave_gate_up
from qwen_export.quantize.blockwise import Quantization, Quantized, dequantize
from qwen_export.quantize.fp4 import Fp4, dequantize_fp4

_UNDONE: dict[Transform | None, Transform] = {
    None: lambda rows: rows,
    interleave_gate_up: deinterleave_gate_up,
}


@dataclass(frozen=True)
class _Segment:
    """Rows of the checkpoint's tensor, and where they stand in a stored weight."""

    rows: Rows
    weight: Weight
    parts: tuple[PlainTensor, ...]
    first: int

    def read(self, start: int, stop: int) -> np.ndarray:
        """float32 rows `start` to `stop` of the checkpoint's tensor, all of them in this segment."""
        first = self.first + start - self.rows.start
        values = np.concatenate(
            [self._stored_rows(row, count) for row, count in self._runs(first, stop - start)]
        )
        return _UNDONE[self.weight.transform](values.reshape(stop - start, *self.weight.row_shape))

    def _runs(self, first: int, count: int) -> Iterator[tuple[int, int]]:
        if self.weight.side_by_side:  # matrices beside each other are not one run of rows
            yield from ((first + row, 1) for row in range(count))
        else:
            yield first, count

    def _stored_rows(self, first: int, count: int) -> np.ndarray:
        """float32 [rows, K] of `count` rows of the stack, from `first` on."""
        k = self.weight.row_shape[-1]
        form = self.weight.storage
        parts = [self._read(part, first, count) for part in self.parts]
        if isinstance(form, Fp4):
            return dequantize_fp4(parts[0], parts[1], parts[2], form).reshape(-1, k)
        if not isinstance(form, Quantization):
            return parts[0].astype(np.float32).reshape(-1, k)
        rows = parts[0].size // (form.blocks(k) * form.block_size * form.bits // 8)
        packed = parts[0].reshape(form.packed_shape(rows, k))
        scales = parts[1].reshape(form.scales_shape(rows, k))
        zeros = None if form.symmetric else parts[2].reshape(form.zero_points_shape(rows, k))
        return dequantize(Quantized(packed, scales, zeros), k, form)

    def _read(self, part: PlainTensor, first: int, count: int) -> np.ndarray:
        if self.weight.side_by_side:
            width = part.shape[1] // self.weight.row_count
            return part.columns(first * width, (first + count) * width)
        lines = part.shape[0] // self.weight.row_count
        return part.read(first * lines, (first + count) * lines)


@dataclass(frozen=True)
class OnnxTensor(Assembled):
    """A tensor of the checkpoint, read from the artifact; a `CheckpointTensor`.

    Attributes:
        role: of the recipe.
        shape: the checkpoint's.
    """

    role: str
    shape: tuple[int, ...]
    segments: tuple[_Segment, ...]

    @property
    def quantised(self) -> bool:
        return not all(isinstance(segment.weight.storage, np.dtype) for segment in self.segments)

    def _parts(self) -> Iterable[Part]:
        return (part for segment in self.segments for part in segment.parts)

    def read(self, start: int, stop: int) -> np.ndarray:
        """float32 rows `start` to `stop` of axis 0."""
        found = []
        for segment in self.segments:
            first, last = max(start, segment.rows.start), min(stop, segment.rows.stop)
            if first < last:
                found.append(segment.read(first, last))
        return np.concatenate(found)


def stored_tensors(artifact: Path, graphs: Graphs, specs: Mapping[str, TensorSpec]) -> dict[str, OnnxTensor]:
    """The matrices of `artifact` by their names in the checkpoint; vectors are not among them.

    Args:
        graphs: those that the artifact was exported with.
        specs: the checkpoint's tensors.

    Raises:
        UserError: the artifact has other graphs.
    """
    places = dict(tensor_places(artifact, graphs))
    segments: dict[str, list[_Segment]] = {}
    for weight, _ in graphs.placed:
        if len(weight.row_shape) == 0 or weight.transform not in _UNDONE or weight.role == "vision":
            continue
        parts = []
        for name, dtype, shape in weight.layout():
            if name not in places or places[name][1] != shape:
                raise UserError(
                    f"{artifact} has no weight {name} of shape {shape}: it was exported by another version, "
                    "or from another checkpoint; export it again"
                )
            parts.append(PlainTensor(name, dtype, shape, artifact / DATA_FILE, places[name][0]))
        first = 0
        for rows in weight.rows:
            if rows.tensor in specs and specs[rows.tensor].shape[1:] == weight.row_shape:
                segment = _Segment(rows, weight, tuple(parts), first)
                segments.setdefault(rows.tensor, []).append(segment)
            first += rows.stop - rows.start
    return {
        name: OnnxTensor(
            specs[name].role, specs[name].shape, tuple(sorted(found, key=lambda segment: segment.rows.start))
        )
        for name, found in segments.items()
    }


def tensor_places(artifact: Path, graphs: Graphs) -> Iterator[tuple[str, tuple[int, tuple[int, ...]]]]:
    """(name, (offset in the data file, shape)) of every tensor that the artifact's graphs take from it."""
    for file in graphs.every_file:
        for tensor in onnx.load(artifact / file, load_external_data=False).graph.initializer:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            if entries.get("location") == DATA_FILE:
                yield tensor.name, (int(entries.get("offset", 0)), tuple(tensor.dims))
