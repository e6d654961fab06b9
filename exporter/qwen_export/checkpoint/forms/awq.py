"""AWQ checkpoints: 4-bit codes of 8 outputs in an int32, interleaved for AWQ's GEMM kernel.

Sources: AutoAWQ's pack(), vLLM's awq kernels.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import AliasChoices, BaseModel, ConfigDict, Field
from qwen_common.errors import UserError

from qwen_export.checkpoint.forms.codes import Codes
from qwen_export.checkpoint.forms.integers import IntegerTensor, check_integers
from qwen_export.checkpoint.forms.scales import Scales
from qwen_export.checkpoint.tensors.plain import PlainTensor, pieces, take
from qwen_export.checkpoint.tensors.tensor import CheckpointTensor

_WORDS = np.dtype(np.int32), np.dtype(np.uint32)
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


class AwqConfig(BaseModel):
    """`quantization_config` of such a checkpoint."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    quant_method: Literal["awq"]
    bits: Literal[4]
    sym: bool = False
    version: Literal["gemm"] = Field("gemm", validation_alias=AliasChoices("version", "checkpoint_format"))

    def assemble(self, stored: dict[str, PlainTensor]) -> dict[str, CheckpointTensor]:
        """See `Form`."""
        return {
            module + "weight": awq_tensor(stored, module, self.sym) for module in pieces(stored, "qweight")
        }


def awq_tensor(stored: dict[str, PlainTensor], module: str, symmetric: bool) -> IntegerTensor:
    """The weight of one module (its name with the dot), its parts taken out of `stored`.

    Raises:
        UserError: parts miss, or do not belong together.
    """
    qweight, qzeros, scales = (
        take(stored, module + part, module + "qweight") for part in ("qweight", "qzeros", "scales")
    )
    if not len(qweight.shape) == len(qzeros.shape) == len(scales.shape) == 2:
        raise UserError(
            f"{qweight.name} has codes, zero points and scales of the shapes "
            f"{(qweight.shape, qzeros.shape, scales.shape)}, of no matrix: download the checkpoint again"
        )
    for part in (qweight, qzeros):
        if part.dtype not in _WORDS:
            raise UserError(f"{part.name} is {part.dtype}, and AWQ's are int32: download it again")
    n = 8 * qweight.shape[-1]
    shape, groups = (n, qweight.shape[0]), scales.shape[0]
    codes = Codes(qweight, shape, 4, along_inputs=False, outputs_last=True, places=_PLACES)
    zeros = Codes(qzeros, (n, groups), 4, along_inputs=False, outputs_last=True, places=_PLACES)
    tensor = IntegerTensor(codes, 4, Scales(scales, outputs_last=True), zeros, symmetric)
    check_integers(tensor)
    return tensor
