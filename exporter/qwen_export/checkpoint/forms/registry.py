"""From what the shards store to the model's tensors, by the form that `quantization_config` names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from pydantic import ValidationError
from qwen_common.errors import UserError

from qwen_export.checkpoint.forms.activations import drop_activation_scales, refuse_scaled_activations
from qwen_export.checkpoint.forms.auto_round import AutoRoundConfig
from qwen_export.checkpoint.forms.awq import AwqConfig
from qwen_export.checkpoint.forms.bitsandbytes import BitsAndBytesConfig
from qwen_export.checkpoint.forms.compressed_tensors import CompressedTensorsConfig
from qwen_export.checkpoint.forms.fp8 import Fp8Config
from qwen_export.checkpoint.forms.gptq import GptqConfig
from qwen_export.checkpoint.forms.mlx import MlxConfig
from qwen_export.checkpoint.forms.modelopt import ModelOptConfig
from qwen_export.checkpoint.forms.torchao import TorchAoConfig
from qwen_export.checkpoint.tensors.experts import stack_experts
from qwen_export.checkpoint.tensors.plain import FLOATS, PlainTensor
from qwen_export.checkpoint.tensors.tensor import CheckpointTensor


class Form(Protocol):
    """How a method stores weights: a pydantic model of its `quantization_config`."""

    def assemble(self, stored: dict[str, PlainTensor]) -> dict[str, CheckpointTensor]:
        """Take the tensors that this form is made of out of `stored`; returns the model's, by name.

        Raises:
            UserError: parts of a weight miss, have shapes that do not belong together, or the configuration
                asks for what is not supported.
        """


# By `quant_method`: a new form is a module and a line here.
_FORMS: Mapping[str, type[Any]] = {
    "auto-round": AutoRoundConfig,
    "awq": AwqConfig,
    "bitsandbytes": BitsAndBytesConfig,
    "compressed-tensors": CompressedTensorsConfig,
    "fbgemm_fp8": Fp8Config,
    "fp8": Fp8Config,
    "gptq": GptqConfig,
    "intel/auto-round": AutoRoundConfig,
    "mlx": MlxConfig,
    "modelopt": ModelOptConfig,
    "modelopt_fp4": ModelOptConfig,
    "torchao": TorchAoConfig,
}


class ModelTensors(NamedTuple):
    """The model's tensors by name, and a line for each thing that is left out."""

    tensors: dict[str, CheckpointTensor]
    notes: list[str]


def assemble(stored: Mapping[str, PlainTensor], quantization_config: Any) -> ModelTensors:
    """From the tensors of the shards; those of other dtypes stay as they are stored.

    Args:
        quantization_config: that of config.json; None if there is none.

    Raises:
        UserError: a method that is not supported, or as `Form.assemble`.
    """
    form = _form(quantization_config)
    refuse_scaled_activations(stored)
    rest = dict(stored)
    left_out = drop_activation_scales(rest) if form else []
    made = form.assemble(rest) if form else {}
    others = {name: rest.pop(name) for name, tensor in list(rest.items()) if tensor.dtype not in FLOATS}
    return ModelTensors({**others, **stack_experts({**rest, **made})}, left_out)


def method_name(quantization_config: Any) -> str:
    """For messages: the method that config.json declares, which `assemble` takes."""
    return "no quantization_config" if quantization_config is None else quantization_config["quant_method"]


def _form(quantization_config: Any) -> Form | None:
    if quantization_config is None:
        return None
    declared = quantization_config if isinstance(quantization_config, dict) else {}
    method = declared.get("quant_method")
    form = _FORMS.get(method) if isinstance(method, str) else None
    if form is None:
        raise UserError(
            f"config.json, quantization_config: method {str(method)[:60]!r} is not supported yet: give the "
            f"checkpoint in bf16, or in one of {', '.join(_FORMS)}"
        )
    try:
        return form.model_validate(declared)
    except ValidationError as error:
        first = error.errors()[0]
        field, found = ".".join(map(str, first["loc"])), repr(first["input"])
        raise UserError(
            f"config.json, quantization_config: {method}.{field} {found[:60]} is not supported yet: give a "
            "checkpoint in bf16, or one of the forms in docs/checkpoints.md"
        ) from error
