"""AWQ checkpoints: 4-bit codes of 8 outputs in an int32, interleaved for AWQ's GEMM kernel.

Sources: AutoAWQ's pack(), vLLM's awq kernels.
"""

from __future__ import annotations

from typing import Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from qwen_export.checkpoint.int4 import Layout, assemble
from qwen_export.checkpoint.plain import PlainTensor
from qwen_export.checkpoint.tensor import CheckpointTensor

_GEMM = Layout(along_inputs=False, places=(0, 4, 1, 5, 2, 6, 3, 7), zero_offset=0)


class AwqConfig(BaseModel):
    """`quantization_config` of such a checkpoint."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    quant_method: Literal["awq"]
    bits: Literal[4]
    sym: bool = False
    version: Literal["gemm"] = Field("gemm", validation_alias=AliasChoices("version", "checkpoint_format"))

    def assemble(self, stored: dict[str, PlainTensor]) -> dict[str, CheckpointTensor]:
        """As `int4.assemble`."""
        return assemble(stored, _GEMM, self.sym)
