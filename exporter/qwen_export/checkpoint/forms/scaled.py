"""Weights as 8-bit or 4-bit floats: each code stands for a number, times the factor of its block."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from qwen_common.errors import UserError

from qwen_export.checkpoint.forms.scales import E4M3, Scales, values_of
from qwen_export.checkpoint.tensors.plain import PlainTensor

E4M3_VALUES = values_of(E4M3)
# float4_e2m1fn: 0, 0.5, 1, 1.5, 2, 3, 4, 6, and the same below zero.
E2M1_VALUES = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)


@dataclass(frozen=True)
class ScaledTensor:
    """[N, K] or experts' [E, N, K], dequantised as it is read.

    Attributes:
        form: in words for a message.
        codes: a byte for each number, or for two, the first in its lower half.
        scales: of blocks of `width` columns.
        values: float32 of each code; 16 of them where a byte has two.
    """

    form: str
    codes: PlainTensor
    scales: Scales
    width: int
    values: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        *rows, columns = self.codes.shape
        return (*rows, columns if len(self.values) == 256 else 2 * columns)

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    @property
    def files(self) -> frozenset[Path]:
        return self.codes.files | self.scales.files

    def read(self, start: int, stop: int) -> np.ndarray:
        """float32 rows."""
        octets = self.codes.read(start, stop).view(np.uint8)
        if len(self.values) == 16:
            octets = np.stack([octets & 15, octets >> 4], axis=-1).reshape(*octets.shape[:-1], -1)
        values = self.values[octets]
        if not np.isfinite(values).all():
            raise UserError(f"tensor {self.codes.name} holds NaN: download the checkpoint again")
        if len(self.shape) == 3:  # a row is an expert
            scales = self.scales.read_experts(start, stop, self.shape[1])
        else:
            scales = self.scales.read(start, stop)
        if scales.shape[-1] > 1:
            scales = np.repeat(scales, self.width, axis=-1)[..., : values.shape[-1]]
        values *= scales
        return values
