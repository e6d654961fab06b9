"""What adapters do to a tensor, row by row and in float32, as the tensor is read.

Factors are read from the adapter's file when they are needed: memory holds those of one piece, whatever the
adapter's size. Source: PEFT's lora.Linear, Embedding, ParamWrapper and DoraLinearVariant, 0.21.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
from qwen_common.errors import UserError
from qwen_common.manifest import MergedAdapter

from qwen_export.checkpoint.tensors.plain import PlainTensor
from qwen_export.checkpoint.tensors.tensor import CheckpointTensor, DerivedTensor, float32

_NORM_ELEMENTS = 8 * 1024 * 1024  # of an embedding that are in memory while its columns are measured
_TILE_ROWS, _TILE_PRODUCTS = 8, 512 * 1024  # of a matrix product that BLAS does in one thread
_KEPT_FACTORS = 4  # of experts, which a piece of a few experts shares with the next

ByExpert = Callable[[PlainTensor, int], np.ndarray]


class Update(Protocol):
    """One adapter's change of one tensor."""

    @property
    def files(self) -> frozenset[Path]: ...

    def apply(self, merged: np.ndarray, base: np.ndarray, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` of axis 0, float32, after this update.

        Args:
            merged: the rows after the updates before this one.
            base: the rows before all of them.
        """


@dataclass(frozen=True)
class MergedTensor(DerivedTensor):
    """A checkpoint's tensor with the updates of adapters, one after the other; a `CheckpointTensor`."""

    name: str
    updates: tuple[Update, ...]

    @property
    def files(self) -> frozenset[Path]:
        return self.source.files.union(*(update.files for update in self.updates))

    def read(self, start: int, stop: int) -> np.ndarray:
        """float32 rows."""
        base = float32(self.source.read(start, stop))
        merged = base
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # reported below
            for update in self.updates:
                merged = update.apply(merged, base, start, stop)
        if not np.isfinite(merged).all():
            raise UserError(
                f"tensor {self.name} is not finite once the adapter is merged: is the adapter for this "
                "model, and was its training sound?"
            )
        return merged


@dataclass(frozen=True)
class LowRank:
    """W + scaling B A; with a magnitude (DoRA), rows are brought to that norm.

    Attributes:
        a: [rank, ...], what follows as the tensor's axes after the first.
        b: [rows, rank], and axes of 1 where the tensor is a convolution's.
        magnitude: [rows] in whatever shape, or None.
    """

    a: PlainTensor
    b: PlainTensor
    scaling: float
    magnitude: PlainTensor | None = None

    @property
    def files(self) -> frozenset[Path]:
        return self.a.files | self.b.files

    def delta(self, start: int, stop: int) -> np.ndarray:
        """Rows of scaling B A: float32 [stop - start, the product of the tensor's other axes]."""
        a = float32(self.a.read(0, self.a.shape[0])).reshape(self.a.shape[0], -1)
        return _product(float32(self.b.read(start, stop)).reshape(stop - start, -1), a, self.scaling)

    def apply(self, merged: np.ndarray, base: np.ndarray, start: int, stop: int) -> np.ndarray:
        delta = self.delta(start, stop).reshape(merged.shape)
        if self.magnitude is None:
            delta += merged
            return delta
        norm = np.linalg.norm((base + delta).reshape(len(base), -1), axis=1)
        factor = _all(self.magnitude)[start:stop] / norm
        return (merged + delta) * factor.reshape(-1, *[1] * (merged.ndim - 1))


@dataclass(frozen=True)
class SwitchedAdapter:
    """An adapter that is not merged: what it is, and what it adds to which tensors."""

    described: MergedAdapter
    updates: Mapping[str, LowRank]


@dataclass(frozen=True)
class EmbeddingLowRank:
    """The same for an embedding [vocabulary, hidden], whose factors are transposed.

    Attributes:
        a: [rank, vocabulary].
        b: [hidden, rank].
        magnitude: norms of the columns [hidden], or None.
        base: the embedding without any update, for the columns' norms.
    """

    a: PlainTensor
    b: PlainTensor
    scaling: float
    magnitude: PlainTensor | None
    base: CheckpointTensor
    _factor: list[np.ndarray] = field(default_factory=list, compare=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, compare=False, repr=False)

    @property
    def files(self) -> frozenset[Path]:
        return self.a.files | self.b.files

    def apply(self, merged: np.ndarray, base: np.ndarray, start: int, stop: int) -> np.ndarray:
        changed = merged + self._delta(start, stop)
        return changed if self.magnitude is None else changed * self._column_factor(self.magnitude)

    def _delta(self, start: int, stop: int) -> np.ndarray:
        b = float32(self.b.read(0, self.b.shape[0]))
        return _product(float32(self.a.columns(start, stop)).T, b.T, self.scaling)

    def _column_factor(self, magnitude: PlainTensor) -> np.ndarray:
        """[hidden]; the whole embedding is read for it, once."""
        with self._lock:
            if not self._factor:
                rows, hidden = self.base.shape
                step = max(1, _NORM_ELEMENTS // hidden)
                total = np.zeros(hidden)
                for start in range(0, rows, step):
                    stop = min(start + step, rows)
                    part = float32(self.base.read(start, stop)) + self._delta(start, stop)
                    total += np.square(part, dtype=np.float64).sum(0)
                self._factor.append((_all(magnitude) / np.sqrt(total)).astype(np.float32))
            return self._factor[0]


@dataclass(frozen=True)
class ExpertsLowRank:
    """W[e] + scaling B[e] A[e] for a stack of experts [experts, out, in], whose factors lie in two matrices.

    Attributes:
        a: [experts * rank, in], expert by expert.
        b: [out, rank * experts], rank by rank.
        by_expert: `keeping_some` of one opened adapter.
    """

    a: PlainTensor
    b: PlainTensor
    scaling: float
    experts: int
    by_expert: ByExpert = field(compare=False, repr=False)

    @property
    def files(self) -> frozenset[Path]:
        return self.a.files | self.b.files

    def apply(self, merged: np.ndarray, base: np.ndarray, start: int, stop: int) -> np.ndarray:
        rank = self.a.shape[0] // self.experts
        a = float32(self.a.read(start * rank, stop * rank)).reshape(stop - start, rank, -1)
        b = self.by_expert(self.b, self.experts)[start:stop]
        return merged + np.stack([_product(*factors, self.scaling) for factors in zip(b, a, strict=True)])


@dataclass(frozen=True)
class ExpertPart:
    """LoRA of one expert's projection, which is rows `first` to `first + rows` of that expert's matrix."""

    first: int
    rows: int
    update: LowRank


@dataclass(frozen=True)
class ExpertsApart:
    """Experts' projections with LoRA of their own, in a stack [experts, out, in]."""

    parts: Mapping[int, Sequence[ExpertPart]]

    @property
    def files(self) -> frozenset[Path]:
        return frozenset().union(*(part.update.files for parts in self.parts.values() for part in parts))

    def apply(self, merged: np.ndarray, base: np.ndarray, start: int, stop: int) -> np.ndarray:
        changed = merged.copy()
        for expert in range(start, stop):
            for part in self.parts.get(expert, ()):
                rows = expert - start, slice(part.first, part.first + part.rows)
                changed[rows] = part.update.apply(changed[rows], base[rows], 0, part.rows)
        return changed


@dataclass(frozen=True)
class Replacement:
    """A tensor that the adapter has in full (`modules_to_save`, biases)."""

    tensor: PlainTensor

    @property
    def files(self) -> frozenset[Path]:
        return self.tensor.files

    def apply(self, merged: np.ndarray, base: np.ndarray, start: int, stop: int) -> np.ndarray:
        return float32(self.tensor.read(start, stop))


@dataclass(frozen=True)
class AddedBias:
    """A bias with that of lora_B, scaled as the factors are."""

    bias: PlainTensor
    scaling: float

    @property
    def files(self) -> frozenset[Path]:
        return self.bias.files

    def apply(self, merged: np.ndarray, base: np.ndarray, start: int, stop: int) -> np.ndarray:
        return merged + float32(self.bias.read(start, stop)) * np.float32(self.scaling)


@dataclass(frozen=True)
class TokenRows:
    """Some tokens' rows of an embedding, which the adapter has in full (`trainable_token_indices`).

    Attributes:
        rows: [tokens, hidden].
        tokens: their ids, in the order of `rows`.
    """

    rows: PlainTensor
    tokens: tuple[int, ...]

    @property
    def files(self) -> frozenset[Path]:
        return self.rows.files

    def apply(self, merged: np.ndarray, base: np.ndarray, start: int, stop: int) -> np.ndarray:
        changed = merged.copy()
        for row, token in enumerate(self.tokens):
            if start <= token < stop:
                changed[token - start] = float32(self.rows.read(row, row + 1))[0]
        return changed


def _product(b: np.ndarray, a: np.ndarray, scaling: float) -> np.ndarray:
    """scaling b a of [n, rank] and [rank, k], in tiles that are too small for BLAS to start threads.

    Pieces of weights are read in threads already, and beside them BLAS's wait for each other: on a busy
    machine the product took ten to thirty times the processor time.
    """
    (n, rank), k = b.shape, a.shape[1]
    result = np.empty((n, k), np.float32)
    whole = n - n % _TILE_ROWS
    step = max(1, _TILE_PRODUCTS // (_TILE_ROWS * rank))
    rows = np.ascontiguousarray(b[:whole]).reshape(-1, _TILE_ROWS, rank)
    for start in range(0, k, step):
        columns = slice(start, min(start + step, k))
        result[:whole, columns] = (rows @ a[:, columns]).reshape(whole, columns.stop - start)
        result[whole:, columns] = b[whole:] @ a[:, columns]
    result *= np.float32(scaling)
    return result


def _all(tensor: PlainTensor) -> np.ndarray:
    """Every element, in float32 and one row."""
    return float32(tensor.read(0, tensor.shape[0])).reshape(-1)


def keeping_some() -> ByExpert:
    """Reads `ExpertsLowRank.b` expert by expert, and keeps the last few for the next pieces."""
    return lru_cache(maxsize=_KEPT_FACTORS)(_expert_by_expert)


def _expert_by_expert(b: PlainTensor, experts: int) -> np.ndarray:
    """[out, rank * experts] -> float32 [experts, out, rank]."""
    values = float32(b.read(0, b.shape[0])).reshape(b.shape[0], -1, experts)
    return np.ascontiguousarray(values.transpose(2, 0, 1))
