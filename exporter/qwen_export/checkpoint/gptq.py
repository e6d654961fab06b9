"""GPTQ checkpoints: 4-bit codes of 8 consecutive input features in an int32.

AutoGPTQ stores zero points less one; GPTQModel's second version of the format does not. Sources: GPTQModel's
pack(), vLLM's gptq kernels.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from qwen_export.checkpoint.int4 import Layout, assemble
from qwen_export.checkpoint.plain import PlainTensor
from qwen_export.checkpoint.tensor import CheckpointTensor

_LAYOUTS = {
    "gptq": Layout(along_inputs=True, places=tuple(range(8)), zero_offset=1),
    "gptq_v2": Layout(along_inputs=True, places=tuple(range(8)), zero_offset=0),
}


class GptqConfig(BaseModel):
    """`quantization_config` of such a checkpoint."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    quant_method: Literal["gptq"]
    bits: Literal[4]
    sym: bool = True
    version: Literal["gptq", "gptq_v2"] = Field("gptq", validation_alias="checkpoint_format")

    def assemble(self, stored: dict[str, PlainTensor]) -> dict[str, CheckpointTensor]:
        """As `int4.assemble`."""
        return assemble(stored, _LAYOUTS[self.version], self.sym)
