"""AutoRound checkpoints: GPTQ's or AWQ's packing, its own, or floats as compressed-tensors has them.

Source: auto-round 0.16 (export/export_to_autoround, inference/backend.py).
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, field_validator
from qwen_common.errors import UserError

from qwen_export.checkpoint.forms.awq import awq_tensor
from qwen_export.checkpoint.forms.fp4 import fp4_tensor
from qwen_export.checkpoint.forms.fp8 import fp8_tensor
from qwen_export.checkpoint.forms.gptq import gptq_tensor
from qwen_export.checkpoint.forms.scales import E8M0
from qwen_export.checkpoint.forms.targets import is_name_of, matches
from qwen_export.checkpoint.tensors.plain import PlainTensor, pieces, take
from qwen_export.checkpoint.tensors.tensor import CheckpointTensor

_MX_GROUP = 32
_INSTEAD = "save it again with --format auto_round, or give the checkpoint in bf16"


class AutoRoundConfig(BaseModel):
    """`quantization_config` of such a checkpoint."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    quant_method: Literal["auto-round", "intel/auto-round"]
    packing: Literal["gptq", "own", "awq", "floats"] = Field(
        validation_alias=AliasChoices("packing_format", "backend")
    )
    sym: bool = True
    extra_config: dict[str, dict[str, Any]] = Field(default_factory=dict)

    @field_validator("packing", mode="before")
    @classmethod
    def _packing(cls, value: object) -> object:
        """As the library chooses what packs a layer; older releases wrote more than the packing."""
        if not isinstance(value, str) or not value.startswith("auto_round") or "e5m3" in value:
            return value
        if any(part in value for part in ("llm_compressor", "fp8", "mx_fp", "nv_fp")):
            return "floats"
        if "awq" in value:
            return "awq"
        return "gptq" if "gptq" in value and "gptqmodel" not in value else "own"

    def assemble(self, stored: dict[str, PlainTensor]) -> dict[str, CheckpointTensor]:
        """See `Form`."""
        if self.packing == "floats":
            modules = {*pieces(stored, "weight_packed"), *pieces(stored, "weight_scale")}
            return {module + "weight": _floats(stored, module) for module in sorted(modules)}
        return {module + "weight": self._integers(stored, module) for module in pieces(stored, "qweight")}

    def _integers(self, stored: dict[str, PlainTensor], module: str) -> CheckpointTensor:
        symmetric = self._symmetric(module.removesuffix("."))
        if self.packing == "awq":
            return awq_tensor(stored, module, symmetric)
        return gptq_tensor(stored, module, symmetric, zero_offset=1 if self.packing == "gptq" else 0)

    def _symmetric(self, module: str) -> bool:
        """Of the first that says so: the module's own entry, an expression's, the whole checkpoint's."""
        for name, options in self.extra_config.items():
            if "sym" in options and is_name_of(name, module):
                return bool(options["sym"])
        for name, options in self.extra_config.items():
            if "sym" in options and any(sign in name for sign in "*+?[(|^$\\") and matches(name, module):
                return bool(options["sym"])
        return self.sym


def _floats(stored: dict[str, PlainTensor], module: str) -> CheckpointTensor:
    packed = stored.get(module + "weight_packed")
    found = module + ("weight_packed" if packed else "weight_scale")
    scales = take(stored, module + "weight_scale", found)
    weight = take(stored, module + ("weight_packed" if packed else "weight"), found)
    if (zeros := stored.get(module + "weight_zp")) is not None:
        raise UserError(f"{zeros.name}: floats with zero points are not supported yet: {_INSTEAD}")
    if packed:
        whole = stored.pop(module + "weight_global_scale", None)
        return fp4_tensor(weight, scales, 16 if whole else _MX_GROUP, whole, divides=True)
    return fp8_tensor(weight, scales, (1, _MX_GROUP) if scales.dtype == np.uint8 else None, bytes_are=E8M0)
