"""From a profile's precision by role to how one weight is stored on one target."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from qwen_profiles.schema import Role, WeightFormat

from qwen_export.graph.targets import Target
from qwen_export.quantize import Quantization
from qwen_export.weights import Storage

_BITS = {"int4": 4, "int8": 8}
_SMALLEST_BLOCK = 16  # MatMulNBits' schema


@dataclass(frozen=True)
class Recipe:
    """The precision of each role, for one target and one activation dtype.

    `accuracy_level` is MatMulNBits' attribute: 4 lets the CPU kernel quantise activations to int8.
    """

    formats: dict[Role, WeightFormat]
    target: Target
    dtype: np.dtype
    accuracy_level: int = 0

    def storage(self, role: Role, in_features: int, whole_blocks: bool = False) -> Storage:
        """How a projection of `role` with rows of `in_features` is stored.

        Where the operator wants `whole_blocks`, or the target exact ones, the block size is halved until it
        fits; a row that no block fits stays in the activations' dtype.
        """
        form = self.formats[role]
        if form.precision == "float":
            return self.dtype
        bits = _BITS[form.precision]
        block: int = form.block_size
        if whole_blocks or self.target.exact_blocks:
            while block >= _SMALLEST_BLOCK and not self._fits(in_features, block, bits):
                block //= 2
            if block < _SMALLEST_BLOCK:
                return self.dtype
        return Quantization(
            bits=bits,
            block_size=block,
            symmetric=form.symmetric and not self.target.zero_points_required,
            scale_dtype=self.dtype,
        )

    def _fits(self, in_features: int, block: int, bits: int) -> bool:
        whole_bytes = not self.target.exact_blocks or in_features // block * bits % 8 == 0
        return in_features % block == 0 and whole_bytes
