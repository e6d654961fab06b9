"""From what the shards store to the model's tensors, by the form that `quantization_config` names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError
from qwen_common.errors import UserError

from qwen_export.checkpoint.awq import AwqConfig
from qwen_export.checkpoint.experts import stack_experts
from qwen_export.checkpoint.fp8 import Fp8Config
from qwen_export.checkpoint.gptq import GptqConfig
from qwen_export.checkpoint.plain import FLOATS, PlainTensor
from qwen_export.checkpoint.tensor import CheckpointTensor

_Config = Fp8Config | GptqConfig | AwqConfig
_CONFIGS: TypeAdapter[_Config] = TypeAdapter(Annotated[_Config, Field(discriminator="quant_method")])


def assemble(stored: Mapping[str, PlainTensor], quantization_config: Any) -> dict[str, CheckpointTensor]:
    """The model's tensors by name, from those of the shards; those of other dtypes stay as they are stored.

    Args:
        quantization_config: that of config.json; None if there is none.

    Raises:
        UserError: a method that is not supported, a tensor that misses its scales, shapes that do not belong
            together, or groups that are not in the order of the input features.
    """
    config = _config(quantization_config)
    rest = dict(stored)
    made = config.assemble(rest) if config else {}
    others = {name: rest.pop(name) for name, tensor in list(rest.items()) if tensor.dtype not in FLOATS}
    return {**others, **stack_experts({**rest, **made})}


def method_name(quantization_config: Any) -> str:
    """For messages: the method that config.json declares, which `assemble` takes."""
    config = _config(quantization_config)
    return config.quant_method if config else "no quantization_config"


def _config(quantization_config: Any) -> _Config | None:
    if quantization_config is None:
        return None
    try:
        return _CONFIGS.validate_python(quantization_config)
    except ValidationError as error:
        first = error.errors()[0]
        found = first["input"]
        if first["type"] == "union_tag_invalid":
            what = f"method {found['quant_method']!r}"
        else:
            what = f"{'.'.join(map(str, first['loc']))} {found!r}"
        raise UserError(
            f"config.json, quantization_config: {what} is not supported yet: give a checkpoint in bf16, "
            "FP8 (128 x 128 blocks), 4-bit GPTQ or 4-bit AWQ (gemm)"
        ) from error
