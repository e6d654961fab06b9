"""torchao checkpoints in safetensors, where it lays a weight out row by row: Float8Tensor, Int8Tensor and
IntxUnpackedToInt8Tensor. Its layouts for single kernels are refused.

Source: torchao 0.18 (prototype/safetensors, quantization/quantize_/workflows).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict
from qwen_common.errors import UserError

from qwen_export.checkpoint.forms.codes import Codes
from qwen_export.checkpoint.forms.fp8 import fp8_tensor
from qwen_export.checkpoint.forms.integers import IntegerTensor, check_integers
from qwen_export.checkpoint.forms.scales import E4M3, Scales
from qwen_export.checkpoint.tensors.plain import FLOATS, PlainTensor, pieces, take
from qwen_export.checkpoint.tensors.tensor import CheckpointTensor

_INT8 = np.dtype(np.int8)
_MIDDLE = 128  # signed codes as unsigned ones


class TorchAoConfig(BaseModel):
    """`quantization_config` of such a checkpoint; each weight's tensors tell how it is stored."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    quant_method: Literal["torchao"]

    def assemble(self, stored: dict[str, PlainTensor]) -> dict[str, CheckpointTensor]:
        """See `Form`."""
        return {module + "weight": _tensor(stored, module) for module in pieces(stored, "_weight_qdata")}


def _tensor(stored: dict[str, PlainTensor], module: str) -> CheckpointTensor:
    """The weight of one module (its name with the dot), its parts taken out of `stored`."""
    codes = stored.pop(module + "_weight_qdata")
    scales = take(stored, module + "_weight_scale", codes.name)
    zeros = stored.pop(module + "_weight_zero_point", None)
    if codes.dtype == E4M3 and scales.dtype in FLOATS and zeros is None:
        return fp8_tensor(codes, scales, None)
    plain = codes.dtype == _INT8 and scales.dtype in FLOATS and len(codes.shape) == len(scales.shape) == 2
    if not plain or zeros is None or zeros.dtype != _INT8 or zeros.shape != scales.shape:
        raise UserError(
            f"{codes.name} ({codes.dtype} {codes.shape}, scales {scales.dtype}) is in a layout of torchao's "
            "that is not supported yet: give the checkpoint in bf16, or one that Float8WeightOnlyConfig, "
            "Int8WeightOnlyConfig or IntxWeightOnlyConfig made"
        )
    n, k = codes.shape
    groups = scales.shape[1]
    tensor = IntegerTensor(
        Codes(codes, (n, k), 8, along_inputs=True, offset=_MIDDLE),
        8,
        Scales(scales),
        Codes(zeros, (n, groups), 8, along_inputs=True, offset=_MIDDLE),
        symmetric=False,
    )
    check_integers(tensor)
    return tensor
