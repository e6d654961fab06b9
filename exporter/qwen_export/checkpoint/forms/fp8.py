"""FP8 weights, multiplied by their scales as they are read.

Source: transformers' finegrained_fp8 and fbgemm_fp8; the published Qwen3.5-*-FP8 checkpoints.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from qwen_common.errors import UserError

from qwen_export.checkpoint.forms.scaled import E4M3_VALUES, ScaledTensor
from qwen_export.checkpoint.forms.scales import E4M3, E8M0, Scales, are_scales, kind_of
from qwen_export.checkpoint.tensors.plain import PlainTensor, take
from qwen_export.checkpoint.tensors.tensor import CheckpointTensor

_SCALES = ("_scale_inv", "_scale")


class Fp8Config(BaseModel):
    """`quantization_config` of such a checkpoint."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    quant_method: Literal["fp8", "fbgemm_fp8"]
    fmt: Literal["e4m3"] = "e4m3"
    weight_block_size: tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]] | None = None

    def assemble(self, stored: dict[str, PlainTensor]) -> dict[str, CheckpointTensor]:
        """See `Form`."""
        made: dict[str, CheckpointTensor] = {}
        for ending in _SCALES:
            for name in [name for name in stored if name.endswith(ending)]:
                weight = name.removesuffix(ending)
                scales = stored.pop(name)
                made[weight] = fp8_tensor(take(stored, weight, name), scales, self.weight_block_size)
        return made


def fp8_tensor(
    weight: PlainTensor,
    scales: PlainTensor,
    block: tuple[int, int] | None,
    bytes_are: np.dtype | None = None,
) -> ScaledTensor:
    """float8_e4m3fn [N, K] or experts' [E, N, K], and what it is multiplied by.

    Args:
        scales: one for each block of `block` of N and of K; without `block` one for each row, or one for all.
        bytes_are: what scales in uint8 are.

    Raises:
        UserError: the two do not belong together.
    """
    known = len(weight.shape) in (2, 3) and 0 not in weight.shape
    known = (
        known
        and weight.dtype == E4M3
        and (are_scales(scales, E8M0) or (bytes_are is not None and scales.dtype == np.uint8))
    )
    *experts, n, k = weight.shape if known else (1, 1)
    for height, width in [block] if block else [(1, k), (n, k)]:
        placed = scales.reshaped((*experts, -(-n // height), -(-k // width)))
        if known and placed:
            return ScaledTensor(
                "FP8", weight, Scales(placed, height, kind=kind_of(scales, bytes_are)), width, E4M3_VALUES
            )
    what = f"{block[0]} x {block[1]} blocks" if block else "rows"
    raise UserError(
        f"tensor {scales.name} ({scales.dtype} {scales.shape}) holds no scales for {what} of {weight.name} "
        f"({weight.dtype} {weight.shape}): download both again"
    )
