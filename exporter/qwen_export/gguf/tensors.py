"""Tensors of a GGUF file in the model's shape and order, whatever type they are stored in.

Source of the types' layouts: ggml-common.h; those that are not kept are dequantised by the package gguf.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache, cached_property

import ml_dtypes
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from qwen_common.errors import UserError

from qwen_export.checkpoint.tensors.plain import PlainTensor
from qwen_export.checkpoint.tensors.tensor import (
    Assembled,
    CheckpointTensor,
    DerivedTensor,
    Part,
    PrequantizedTensor,
    Scheme,
    common_scheme,
    float32,
    forms_of,
)
from qwen_export.gguf.file import Stored
from qwen_export.quantize.blockwise import Quantization, pack_codes
from qwen_export.quantize.fp4 import MXFP4, Fp4

FLOATS = {
    GGMLQuantizationType.F32: np.dtype("<f4"),
    GGMLQuantizationType.F16: np.dtype("<f2"),
    GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}
# Blocks of 32 with a float16 scale in front: the bits of their codes.
KEPT = {GGMLQuantizationType.Q4_0: 4, GGMLQuantizationType.Q4_1: 4, GGMLQuantizationType.Q8_0: 8}
_BLOCK = 32
_SCANNED_BYTES = 4 * 1024 * 1024  # of a Q4_1 tensor at a time


@dataclass(frozen=True)
class GgufTensor(Assembled):
    """Floats, or blocks of codes that are dequantised as they are read.

    Attributes:
        kind: how the numbers are stored.
        shape: the model's.
        words: their bytes, uint8 [..., bytes of a row], or the floats themselves.
        heads: where each of the equal parts of the last axis stands in the file; (): in order.
    """

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    words: PlainTensor
    heads: tuple[int, ...] = ()

    @property
    def forms(self) -> Counter[str]:
        return Counter() if self.kind in FLOATS else Counter([self.kind.name])

    def _parts(self) -> Iterable[Part]:
        return (self.words,)

    def read(self, start: int, stop: int) -> np.ndarray:
        stored = self.words.read(start, stop)
        if self.kind in FLOATS:
            return self._ordered(stored)
        with np.errstate(all="ignore"):  # reported below
            values = dequantize(stored, self.kind).reshape(stop - start, *self.shape[1:])
        if not np.isfinite(values).all():
            raise UserError(
                f"tensor {self.words.name} in {self.words.file.name} holds NaN or Inf: download it again"
            )
        return self._ordered(values)

    def _ordered(self, values: np.ndarray) -> np.ndarray:
        if not self.heads:
            return values
        parts = values.reshape(*values.shape[:-1], len(self.heads), -1)
        return parts[..., self.heads, :].reshape(values.shape)


@dataclass(frozen=True)
class BlockTensor(GgufTensor):
    """Q4_0, Q4_1 or Q8_0 of a matrix [N, K]; a `PrequantizedTensor`."""

    @cached_property
    def scheme(self) -> Scheme | None:
        """None if parts of a row that must be put in order are no whole blocks, or a block of Q4_1 has a
        minimum that is no multiple of its scale: the kernels' zero points are integers. That is looked up in
        the file, up to the first such block."""
        if self.heads and self.shape[1] % (_BLOCK * len(self.heads)):
            return None
        if self.kind is not GGMLQuantizationType.Q4_1:
            return Scheme(_BLOCK, True, KEPT[self.kind])
        start, step = 0, 1  # most files' first block tells
        while start < self.shape[0]:
            stop = min(start + step, self.shape[0])
            if self._blocks(start, stop) is None:
                return None
            start, step = stop, max(1, _SCANNED_BYTES // self.words.shape[1])
        return Scheme(_BLOCK, False, KEPT[self.kind])

    def packed(self, start: int, stop: int, form: Quantization) -> list[np.ndarray]:
        found = self._blocks(start, stop)
        assert found, "scheme is None"
        codes, scales, zeros = (self._ordered(part) for part in found)
        if not np.isfinite(scales).all():
            raise UserError(
                f"tensor {self.words.name} in {self.words.file.name} holds NaN or Inf: download it again"
            )
        repeats = _BLOCK // form.block_size
        parts = [pack_codes(codes, form.bits), np.repeat(scales.astype(form.scale_dtype), repeats, axis=1)]
        if not form.symmetric:
            parts.append(pack_codes(np.repeat(zeros, repeats, axis=1), form.bits))
        return parts

    def _blocks(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """Codes uint8 [n, K], scales float16 and zero points uint8 [n, blocks] in the file's order; None
        where a minimum is no multiple."""
        blocks = self.words.read(start, stop).reshape(stop - start, -1, GGML_QUANT_SIZES[self.kind][1])
        scales = np.ascontiguousarray(blocks[..., :2]).view("<f2")[..., 0]
        middle = np.full(scales.shape, 1 << (KEPT[self.kind] - 1), np.uint8)
        if self.kind is GGMLQuantizationType.Q8_0:
            return (blocks[..., 2:] + np.uint8(128)).reshape(stop - start, -1), scales, middle
        # The low halves of the bytes come first, then the high ones.
        halves = blocks[..., -_BLOCK // 2 :]
        codes = np.concatenate([halves & np.uint8(15), halves >> np.uint8(4)], axis=-1)
        codes = codes.reshape(stop - start, -1)
        if self.kind is GGMLQuantizationType.Q4_0:
            return codes, scales, middle
        minima = np.ascontiguousarray(blocks[..., 2:4]).view("<f2")[..., 0].astype(np.float32)
        wide = scales.astype(np.float32)
        with np.errstate(all="ignore"):
            zeros = np.rint(-minima / np.where(wide == 0, np.float32(1), wide))
            fits = (zeros >= 0) & (zeros <= 15) & (zeros * wide == -minima)
        return (codes, scales, zeros.astype(np.uint8)) if fits.all() else None


@dataclass(frozen=True)
class Mxfp4Tensor(GgufTensor):
    """MXFP4 of a matrix [N, K]: blocks with the scale in front; an `Fp4Tensor`."""

    @property
    def fp4(self) -> Fp4 | None:
        return None if self.heads else MXFP4

    def packed_fp4(self) -> tuple[np.ndarray, np.ndarray]:
        n, k = self.shape
        blocks = self.words.read(0, n).reshape(n, k // _BLOCK, GGML_QUANT_SIZES[self.kind][1])
        scales = np.ascontiguousarray(blocks[..., 0]).view(MXFP4.scale_dtype)
        if not np.isfinite(scales.astype(np.float32)).all():
            raise UserError(
                f"tensor {self.words.name} in {self.words.file.name} holds NaN or Inf: download it again"
            )
        # The low halves of the bytes come first, then the high ones.
        codes = np.concatenate([blocks[..., 1:] & np.uint8(15), blocks[..., 1:] >> np.uint8(4)], axis=-1)
        return pack_codes(codes.reshape(n, k), 4), scales

    def fp4_factor(self) -> float:
        return 1.0


@dataclass(frozen=True)
class Joined(Assembled):
    """Tensors one after the other along axis 0."""

    parts: tuple[CheckpointTensor, ...]

    @cached_property
    def shape(self) -> tuple[int, ...]:
        return sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:]

    def _parts(self) -> Iterable[Part]:
        return self.parts

    @property
    def forms(self) -> Counter[str]:
        return sum((forms_of(part) for part in self.parts), Counter())

    def read(self, start: int, stop: int) -> np.ndarray:
        return np.concatenate([part.read(first, last) for part, first, last in self._inside(start, stop)])

    def _inside(self, start: int, stop: int) -> list[tuple[CheckpointTensor, int, int]]:
        """The parts that have rows `start` to `stop`, and which of their own rows these are."""
        found, before = [], 0
        for part in self.parts:
            first, last = max(start - before, 0), min(stop - before, part.shape[0])
            if first < last:
                found.append((part, first, last))
            before += part.shape[0]
        return found


@dataclass(frozen=True)
class JoinedBlocks(Joined):
    """The same of blocks in one scheme; a `PrequantizedTensor`."""

    scheme: Scheme

    def packed(self, start: int, stop: int, form: Quantization) -> list[np.ndarray]:
        found = [
            part.packed(first, last, form)
            for part, first, last in self._inside(start, stop)
            if isinstance(part, PrequantizedTensor)
        ]
        return [np.concatenate(arrays) for arrays in zip(*found, strict=True)]


@dataclass(frozen=True)
class Mapped(DerivedTensor):
    """A tensor of floats whose file has a function of its numbers: `undo` gives them back, in float32."""

    undo: Callable[[np.ndarray], np.ndarray]

    def read(self, start: int, stop: int) -> np.ndarray:
        values = self.undo(float32(self.source.read(start, stop)))
        if not np.isfinite(values).all():
            name = min(file.name for file in self.files)
            raise UserError(f"{name} has numbers that no model of this architecture has: download it again")
        return values


def tensor(stored: Stored, shape: tuple[int, ...], heads: tuple[int, ...] = ()) -> CheckpointTensor:
    """All of a stored tensor, in the model's `shape`, which has the same last axis unless it is of floats.

    Raises:
        UserError: its type is none that can be dequantised, or none of a vector's.
    """
    if stored.kind in FLOATS:
        words = PlainTensor(stored.name, FLOATS[stored.kind], shape, stored.file, stored.offset)
        return GgufTensor(stored.kind, shape, words, heads) if heads else words
    if len(shape) < 2:
        raise UserError(
            f"{stored.file}: tensor {stored.name} is a vector in {stored.kind.name}, which llama.cpp keeps "
            "in F32: download it again"
        )
    if not _dequantisable(stored.kind):
        raise UserError(
            f"{stored.file}: tensor {stored.name} is {stored.kind.name}, which is not supported yet: give a "
            "file in F16, BF16, Q8_0, Q4_0, or one of llama.cpp's K-quants"
        )
    words = PlainTensor(
        stored.name, np.dtype(np.uint8), (*shape[:-1], stored.row_bytes), stored.file, stored.offset
    )
    matrix = _MATRICES.get(stored.kind, GgufTensor) if len(shape) == 2 else GgufTensor
    return matrix(stored.kind, shape, words, heads)


def rows(stored: Stored, start: int, stop: int) -> Stored:
    """Rows `start` to `stop` of axis 0."""
    each = stored.nbytes // stored.shape[0]
    return replace(stored, shape=(stop - start, *stored.shape[1:]), offset=stored.offset + start * each)


def joined(parts: list[CheckpointTensor]) -> CheckpointTensor:
    """One after the other along axis 0; codes stay codes where all have one scheme."""
    if len(parts) == 1:
        return parts[0]
    scheme = common_scheme(parts)
    return JoinedBlocks(tuple(parts), scheme) if scheme else Joined(tuple(parts))


_MATRICES = {**dict.fromkeys(KEPT, BlockTensor), GGMLQuantizationType.MXFP4: Mxfp4Tensor}


@cache
def _dequantisable(kind: GGMLQuantizationType) -> bool:
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True
