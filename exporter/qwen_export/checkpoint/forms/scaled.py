"""Weights as 8-bit or 4-bit floats: each code stands for a number, times the factor of its block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from qwen_common.errors import UserError

from qwen_export.checkpoint.forms.scales import E4M3, Scales, values_of
from qwen_export.checkpoint.tensors.plain import PlainTensor
from qwen_export.checkpoint.tensors.tensor import Assembled, Part
from qwen_export.quantize.fp4 import Fp4, unpack

E4M3_VALUES = values_of(E4M3)


@dataclass(frozen=True)
class ScaledTensor(Assembled):
    """[N, K] or experts' [E, N, K], dequantised as it is read; an `Fp4Tensor`.

    Attributes:
        form: in words for a message.
        codes: a byte for each number, or for two, the first in its lower half.
        scales: of blocks of `width` columns.
        values: float32 of each code; 16 of them where a byte has two.
        fp4: the form of a matrix [N, K] whose codes the CPU's QMoE takes; None for others.
    """

    form: str
    codes: PlainTensor
    scales: Scales
    width: int
    values: np.ndarray
    fp4: Fp4 | None = None

    @property
    def forms(self) -> Counter[str]:
        return Counter([self.form])

    @property
    def shape(self) -> tuple[int, ...]:
        *rows, columns = self.codes.shape
        return (*rows, columns if len(self.values) == 256 else 2 * columns)

    def _parts(self) -> Iterable[Part]:
        return self.codes, self.scales

    def read(self, start: int, stop: int) -> np.ndarray:
        """float32 rows."""
        octets = self.codes.read(start, stop).view(np.uint8)
        if len(self.values) == 16:
            octets = unpack(octets)
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

    def packed_fp4(self) -> tuple[np.ndarray, np.ndarray]:
        """See `Fp4Tensor`."""
        n = self.shape[0]
        return self.codes.read(0, n), self.scales.stored(0, n)

    def fp4_factor(self) -> float:
        """See `Fp4Tensor`."""
        return self.scales.factor()
