"""What codes are multiplied by: one factor for each block of a matrix."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from qwen_common.errors import UserError

from qwen_export.checkpoint.tensors.plain import FLOATS, PlainTensor
from qwen_export.checkpoint.tensors.tensor import Assembled, Part

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)


def values_of(dtype: np.dtype) -> np.ndarray:
    """float32 of each byte, taken as the 8-bit type `dtype`."""
    return np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)


_BYTES = {dtype: values_of(dtype) for dtype in (E4M3, E8M0)}


@dataclass(frozen=True)
class Scales(Assembled):
    """Factors of blocks of a matrix [N, K], or of as many matrices as there are experts.

    Attributes:
        tensor: [N / height, columns], where the columns share K evenly; [E, N / height, columns] of experts.
        height: rows that share a factor.
        outputs_last: `tensor` is [columns, N] instead.
        kind: what bytes are: E4M3 or E8M0; None where they are floats already.
        whole: a factor for the whole matrix, [1], or [E] of experts.
        divides: the factors are divided by `whole`, not multiplied.
        divisor: what floats are divided by.
    """

    tensor: PlainTensor
    height: int = 1
    outputs_last: bool = False
    kind: np.dtype | None = None
    whole: PlainTensor | None = None
    divides: bool = False
    divisor: float = 1

    @property
    def columns(self) -> int:
        return self.tensor.shape[0 if self.outputs_last else -1]

    def _parts(self) -> Iterable[Part]:
        return (self.tensor, self.whole) if self.whole else (self.tensor,)

    def read(self, start: int, stop: int) -> np.ndarray:
        """float32 [n, columns] for rows `start` to `stop` of the matrix."""
        if self.outputs_last:
            return self._floats(self.tensor.columns(start, stop).T, 0, 1)
        first = start // self.height
        found = self._floats(self.tensor.read(first, -(-stop // self.height)), 0, 1)
        return found if self.height == 1 else found[np.arange(start, stop) // self.height - first]

    def read_experts(self, start: int, stop: int, n: int) -> np.ndarray:
        """float32 [experts, n, columns] for experts `start` to `stop`, of `n` rows each."""
        found = self._floats(self.tensor.read(start, stop), start, stop)
        return np.repeat(found, self.height, axis=1)[:, :n] if self.height > 1 else found

    def _floats(self, stored: np.ndarray, start: int, stop: int) -> np.ndarray:
        if self.kind is None:
            factors = stored.astype(np.float32) / np.float32(self.divisor)
        else:
            factors = self._of_bytes(stored)
        if self.whole is not None:
            whole = self.whole.read(start, stop).astype(np.float32)
            whole = whole.reshape(-1, *[1] * (factors.ndim - 1))
            with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
                factors = factors / whole if self.divides else factors * whole
            self._check_finite(factors)
        return factors

    def stored(self, start: int, stop: int) -> np.ndarray:
        """[n, columns] as they are stored, in `kind`, for rows `start` to `stop` of a matrix whose rows share
        no factor."""
        assert self.kind is not None and self.height == 1 and not self.outputs_last
        stored = self.tensor.read(start, stop)
        self._of_bytes(stored)
        return stored.view(self.kind)

    def factor(self) -> float:
        """That of the whole matrix, to multiply by."""
        if self.whole is None:
            return 1.0
        (whole,) = self.whole.read(0, 1).astype(np.float64)
        with np.errstate(divide="ignore"):
            factor = 1 / whole if self.divides else whole
        self._check_finite(factor.astype(np.float32))
        return float(factor)

    def _of_bytes(self, stored: np.ndarray) -> np.ndarray:
        """float32."""
        assert self.kind is not None
        factors = _BYTES[self.kind][stored.view(np.uint8)]
        if not np.isfinite(factors).all():
            raise UserError(f"tensor {self.tensor.name} holds NaN: download the checkpoint again")
        return factors

    def _check_finite(self, factors: np.ndarray) -> None:
        assert self.whole is not None
        if not np.isfinite(factors).all():
            raise UserError(f"tensor {self.whole.name} makes scales infinite: download the checkpoint again")


def are_scales(tensor: PlainTensor, *bytes_may_be: np.dtype) -> bool:
    """Whether its dtype is a float's, or one byte of those that are allowed."""
    return tensor.dtype in (*FLOATS, *bytes_may_be)


def kind_of(tensor: PlainTensor, of_bytes: np.dtype | None = None) -> np.dtype | None:
    """For `Scales`: what the bytes of `tensor` are; `of_bytes` is for plain uint8."""
    if tensor.dtype in FLOATS:
        return None
    return tensor.dtype if tensor.dtype in _BYTES else of_bytes
