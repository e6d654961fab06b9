"""NVIDIA ModelOpt checkpoints: FP8, NVFP4, MXFP4 and MXFP8, which its unified export writes.

Source: nvidia-modelopt 0.47 (torch/export/quant_utils.py, convert_hf_config.py).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict
from qwen_common.errors import UserError

from qwen_export.checkpoint.forms.fp4 import fp4_tensor
from qwen_export.checkpoint.forms.fp8 import fp8_tensor
from qwen_export.checkpoint.forms.scales import E4M3, E8M0
from qwen_export.checkpoint.tensors.plain import PlainTensor, pieces, take
from qwen_export.checkpoint.tensors.tensor import CheckpointTensor

_UINT8 = np.dtype(np.uint8)
_MX_GROUP, _NV_GROUP = 32, 16
_FP8_BLOCK = 128


class ModelOptConfig(BaseModel):
    """`quantization_config` of such a checkpoint, or `quantization` of its hf_quant_config.json.

    Which modules are quantised, and which of a mixture each is, their tensors tell.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    quant_method: Literal["modelopt", "modelopt_fp4"]
    quant_algo: (
        Literal[
            "FP8",
            "FP8_PB_WO",
            "FP8_PER_CHANNEL_PER_TOKEN",
            "MIXED_PRECISION",
            "MXFP4",
            "MXFP8",
            "NVFP4",
            "W4A16_NVFP4",
            "W4A8_MXFP4_FP8",
            "W4A8_NVFP4_FP8",
        ]
        | None  # the KV cache alone is quantised
    )

    def assemble(self, stored: dict[str, PlainTensor]) -> dict[str, CheckpointTensor]:
        """See `Form`."""
        return {module + "weight": _tensor(stored, module) for module in pieces(stored, "weight_scale")}


def _tensor(stored: dict[str, PlainTensor], module: str) -> CheckpointTensor:
    """The weight of one module (its name with the dot), its parts taken out of `stored`."""
    scales = stored.pop(module + "weight_scale")
    weight = take(stored, module + "weight", scales.name)
    whole = stored.pop(module + "weight_scale_2", None)
    if len(weight.shape) != 2:
        raise UserError(f"{weight.name} has the shape {weight.shape}, of no weight that has scales")
    if weight.dtype == _UINT8:
        group = _MX_GROUP if whole is None and scales.dtype != E4M3 else _NV_GROUP
        if group == _NV_GROUP and whole is None:
            raise UserError(f"the checkpoint has {scales.name}, but no weight_scale_2: is a shard missing?")
        return fp4_tensor(weight, scales, group, whole)
    n, k = weight.shape
    if scales.dtype in (_UINT8, E8M0):
        return fp8_tensor(weight, scales, (1, _MX_GROUP), bytes_are=E8M0)
    in_blocks = scales.reshaped((-(-n // _FP8_BLOCK), -(-k // _FP8_BLOCK)))
    by_block = in_blocks is not None and np.prod(scales.shape) > 1
    return fp8_tensor(weight, scales, (_FP8_BLOCK, _FP8_BLOCK) if by_block else None)
