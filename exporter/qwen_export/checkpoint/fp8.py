"""FP8 weights, multiplied by their block scales as they are read.

Source: transformers' finegrained_fp8; the published Qwen3.5-*-FP8 checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import ml_dtypes
import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from qwen_common.errors import UserError

from qwen_export.checkpoint.plain import FLOATS, PlainTensor, take
from qwen_export.checkpoint.tensor import CheckpointTensor

_FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
_VALUES = np.arange(256, dtype=np.uint8).view(_FP8).astype(np.float32)
_SCALE_INV = "_scale_inv"


@dataclass(frozen=True)
class Fp8Tensor:
    """float8_e4m3fn [N, K] or experts' [E, N, K], and one factor for each block of `block` of N and of K."""

    weight: PlainTensor
    scale_inv: PlainTensor
    block: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + self.scale_inv.nbytes

    @property
    def files(self) -> frozenset[Path]:
        return self.weight.files | self.scale_inv.files

    def read(self, start: int, stop: int) -> np.ndarray:
        """float32 rows: the product of an FP8 value and a bfloat16 factor is exact."""
        height, width = self.block
        values = _VALUES[self.weight.read(start, stop).view(np.uint8)]
        if not np.isfinite(values).all():
            raise UserError(f"tensor {self.weight.name} holds NaN: download the checkpoint again")
        if len(self.shape) == 3:  # a row is an expert
            scales = self.scale_inv.read(start, stop).astype(np.float32)
            scales = np.repeat(scales, height, axis=1)[:, : values.shape[1]]
        else:
            scales = self.scale_inv.read(start // height, -(-stop // height)).astype(np.float32)
            scales = scales[np.arange(start, stop) // height - start // height]
        values *= np.repeat(scales, width, axis=-1)[..., : values.shape[-1]]
        return values


class Fp8Config(BaseModel):
    """`quantization_config` of such a checkpoint."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    quant_method: Literal["fp8"]
    fmt: Literal["e4m3"] = "e4m3"
    weight_block_size: tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]]

    def assemble(self, stored: dict[str, PlainTensor]) -> dict[str, CheckpointTensor]:
        """Take the tensors that this form is made of out of `stored`; returns the model's, by name.

        Raises:
            UserError: a weight misses, or its scales have another shape.
        """
        made: dict[str, CheckpointTensor] = {}
        for name in [name for name in stored if name.endswith(_SCALE_INV)]:
            weight = name.removesuffix(_SCALE_INV)
            made[weight] = self._tensor(take(stored, weight, name), stored.pop(name))
        return made

    def _tensor(self, weight: PlainTensor, scale_inv: PlainTensor) -> Fp8Tensor:
        block = self.weight_block_size
        *experts, n, k = weight.shape if len(weight.shape) in (2, 3) else (0, 0)
        expected = (*experts, -(-n // block[0]), -(-k // block[1]))
        if weight.dtype != _FP8 or scale_inv.dtype not in FLOATS or scale_inv.shape != expected:
            raise UserError(
                f"tensor {scale_inv.name} ({scale_inv.dtype} {scale_inv.shape}) holds no scales for "
                f"{block[0]} x {block[1]} blocks of {weight.name} ({weight.dtype} {weight.shape}): download "
                "both again"
            )
        return Fp8Tensor(weight, scale_inv, block)
