"""GPTQ checkpoints: codes of consecutive input features in an int32.

AutoGPTQ stores zero points less one; GPTQModel's second version of the format does not. Sources: GPTQModel's
pack(), vLLM's gptq kernels.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from qwen_common.errors import UserError

from qwen_export.checkpoint.forms.codes import Codes
from qwen_export.checkpoint.forms.integers import IntegerTensor, check_integers
from qwen_export.checkpoint.forms.scales import Scales
from qwen_export.checkpoint.forms.targets import matches
from qwen_export.checkpoint.tensors.plain import PlainTensor, pieces, take
from qwen_export.checkpoint.tensors.tensor import CheckpointTensor

_BITS = (2, 4, 8)
_ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}


class GptqConfig(BaseModel):
    """`quantization_config` of such a checkpoint."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    quant_method: Literal["gptq"]
    bits: Literal[2, 4, 8]
    sym: bool = True
    desc_act: bool = False
    # GPTQModel's: expressions of modules that differ. Those with "-:" are not quantised.
    dynamic: dict[str, dict[str, Any]] = Field(default_factory=dict)
    version: Literal["gptq", "gptq_v2"] = Field("gptq", validation_alias="checkpoint_format")

    def assemble(self, stored: dict[str, PlainTensor]) -> dict[str, CheckpointTensor]:
        """See `Form`."""
        offset = _ZERO_OFFSETS[self.version]
        return {
            module + "weight": self._tensor(stored, module, offset) for module in pieces(stored, "qweight")
        }

    def _tensor(self, stored: dict[str, PlainTensor], module: str, zero_offset: int) -> IntegerTensor:
        """By the first expression that fits the module, or as the whole checkpoint."""
        options: dict[str, Any] = {}
        for expression, found in self.dynamic.items():
            if matches(expression.removeprefix("+:"), module.removesuffix(".")):
                options = found
                break
        if options.get("desc_act", self.desc_act) and f"{module}g_idx" not in stored:
            raise UserError(
                f"the checkpoint has {module}qweight, but no g_idx, though config.json says desc_act: is a "
                "shard missing?"
            )
        return gptq_tensor(stored, module, bool(options.get("sym", self.sym)), zero_offset)


def gptq_tensor(
    stored: dict[str, PlainTensor], module: str, symmetric: bool, zero_offset: int
) -> IntegerTensor:
    """The weight of one module (its name with the dot), its parts taken out of `stored`.

    Its bits are what its zero points take: those of config.json may be of most modules only.

    Args:
        zero_offset: what is added to a stored zero point.

    Raises:
        UserError: parts miss, or do not belong together.
    """
    qweight, qzeros, scales = (
        take(stored, module + part, module + "qweight") for part in ("qweight", "qzeros", "scales")
    )
    n = qweight.shape[-1] if len(qweight.shape) == len(qzeros.shape) == len(scales.shape) == 2 else 0
    bits = 32 * qzeros.shape[1] // n if n else 0
    if bits not in _BITS:
        raise UserError(
            f"{qweight.name} has codes, zero points and scales of the shapes "
            f"{(qweight.shape, qzeros.shape, scales.shape)}, which do not belong together for codes of "
            f"{', '.join(map(str, _BITS))} bits: download the checkpoint again, or give it in bf16"
        )
    k = qweight.shape[0] * 32 // bits
    codes = Codes(qweight, (n, k), bits, along_inputs=True, outputs_last=True)
    zeros = Codes(
        qzeros, (n, scales.shape[0]), bits, along_inputs=False, outputs_last=True, offset=zero_offset
    )
    group_of = stored.pop(module + "g_idx", None)
    in_order = group_of is None or _in_order(group_of, k, scales.shape[0])
    tensor = IntegerTensor(
        codes, bits, Scales(scales, outputs_last=True), zeros, symmetric, None if in_order else group_of
    )
    check_integers(tensor)
    return tensor


def _in_order(group_of: PlainTensor, k: int, groups: int) -> bool:
    found = group_of.read(0, k) if group_of.shape == (k,) else np.full(1, -1)
    if found.min() < 0 or found.max() >= groups:
        raise UserError(
            f"{group_of.name} does not name one of {groups} groups for each of {k} input features: "
            "download the checkpoint again"
        )
    return k % groups == 0 and np.array_equal(found, np.arange(k) // (k // groups))
