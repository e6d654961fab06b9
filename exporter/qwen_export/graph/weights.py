"""What each weight of the graph is made of, and how it will be stored.

A `Weight` is declared while the graph is built, from the config alone. It says which rows of which
checkpoint tensors it stacks, what is done to them, and in which form they are stored, so that every
shape, byte count and file offset is known before the first weight is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from qwen_export.quantize.blockwise import Quantization
from qwen_export.quantize.fp4 import Fp4

Transform = Callable[[np.ndarray], np.ndarray]
Storage = np.dtype | Quantization | Fp4


@dataclass(frozen=True)
class Rows:
    """Rows `start` to `stop` (exclusive) of axis 0 of one checkpoint tensor."""

    tensor: str
    start: int
    stop: int


@dataclass(frozen=True)
class ExternalTensor:
    """One tensor of the external-data file: name, element type, shape, and where its bytes lie."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Weight:
    """One weight of the graph: `rows` stacked along axis 0, transformed, stored.

    Attributes:
        name: initializer name; a quantised weight adds `.scales` and `.zero_points` to it, 4-bit floats
            `.scales` and `.factors`.
        role: as in the model's table of tensors (`mlp`, `attention`, `norm`, ...), for sizes by role.
        rows: runs of rows, in the order in which they are stacked.
        row_shape: shape of one row; `(in_features,)` for a projection, `()` for a vector,
            `(out_features, in_features)` for fused experts, of which each is a row.
        storage: a float dtype, a `Quantization` of the last axis, or 4-bit floats of experts.
        transform: what is done to rows before they are stored; gives them `row_shape`. None: nothing.
        reshaped: the shape it is stored in, where that is not rows by row; same number of elements.
        side_by_side: rows that are matrices [N, K] are put beside each other, as one [N, rows * K].
    """

    name: str
    role: str
    rows: tuple[Rows, ...]
    row_shape: tuple[int, ...]
    storage: Storage
    transform: Transform | None = None
    reshaped: tuple[int, ...] | None = None
    side_by_side: bool = False

    @property
    def row_count(self) -> int:
        return sum(part.stop - part.start for part in self.rows)

    @property
    def of_experts(self) -> bool:
        """Each row is an expert's quantised matrix."""
        return not isinstance(self.storage, np.dtype) and len(self.row_shape) == 2

    @property
    def prequantized(self) -> bool:
        """Stored with the checkpoint's own codes and scales."""
        return isinstance(self.storage, Fp4) or (
            isinstance(self.storage, Quantization) and self.storage.prequantized
        )

    @property
    def shape(self) -> tuple[int, ...]:
        if self.side_by_side:
            n, k = self.row_shape
            return n, self.row_count * k
        return self.reshaped or (self.row_count, *self.row_shape)

    def layout(self) -> list[tuple[str, np.dtype, tuple[int, ...]]]:
        """(initializer name, dtype, shape) of each tensor that this weight is stored as, in file order."""
        if isinstance(self.storage, np.dtype):
            return [(self.name, self.storage, self.shape)]
        *experts, n, k = self.shape
        form = self.storage
        uint8 = np.dtype(np.uint8)
        if isinstance(form, Fp4):
            return [
                (self.name, uint8, (*experts, n, k // 2)),
                (f"{self.name}.scales", form.scale_dtype, (*experts, n, k // form.block_size)),
                (f"{self.name}.factors", np.dtype(np.float32), tuple(experts)),
            ]
        packed: tuple[int, ...] = form.packed_shape(n, k)
        if experts:  # com.microsoft::QMoE has no axis of blocks
            packed = (n, packed[1] * packed[2])
        tensors = [
            (self.name, uint8, (*experts, *packed)),
            (f"{self.name}.scales", form.scale_dtype, (*experts, *form.scales_shape(n, k))),
        ]
        if not form.symmetric:
            tensors.append((f"{self.name}.zero_points", uint8, (*experts, *form.zero_points_shape(n, k))))
        return tensors


class PlacedWeight(NamedTuple):
    """A weight, and the tensors of the data file that it is stored as."""

    weight: Weight
    tensors: list[ExternalTensor]


def one_plus(weight: np.ndarray) -> np.ndarray:
    """Qwen3.5's RMSNorm multiplies by 1 + weight; the operators multiply by what they are given."""
    return 1.0 + weight.astype(np.float32)


def flatten_rows(weight: np.ndarray) -> np.ndarray:
    """[N, ...] -> [N, K]: a convolution whose stride is its kernel, as a projection."""
    return weight.reshape(len(weight), -1)


def negative_exp(weight: np.ndarray) -> np.ndarray:
    """A_log -> -exp(A_log), the decay's scale (LinearAttentionGate's `decay_scale`)."""
    return -np.exp(weight.astype(np.float32))


def interleave_gate_up(experts: np.ndarray) -> np.ndarray:
    """[E, 2 I, K] with I gate rows before I up rows -> gate and up in turn, as QMoE's swiglu wants them."""
    count, rows, k = experts.shape
    return experts.reshape(count, 2, rows // 2, k).swapaxes(1, 2).reshape(count, rows, k)


def deinterleave_gate_up(experts: np.ndarray) -> np.ndarray:
    """What `interleave_gate_up` was given, from what it gave."""
    count, rows, k = experts.shape
    return experts.reshape(count, rows // 2, 2, k).swapaxes(1, 2).reshape(count, rows, k)
