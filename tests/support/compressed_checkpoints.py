"""Checkpoints as compressed-tensors writes them: its own compressors, its own config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from compressed_tensors.compressors import BaseCompressor, ModelCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

from benchmarks.support.checkpoints import TINY, copy_tokenizer
from tests.support.fitting_tokenizer import fit_tokenizer
from tests.support.quantized_checkpoints import GEOMETRY, Method
from tests.support.random_checkpoints import random_model


def scheme(**weights: Any) -> dict[str, Any]:
    """A group of modules, all that are linear."""
    return {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "symmetric": True, **weights}}


def parameters(weight: torch.Tensor, args: QuantizationArgs) -> dict[str, torch.Tensor]:
    """The smallest scales and zero points that hold `weight` [N, K]; the arithmetic is the library's."""
    n, k = weight.shape
    strategy = str(args.strategy)
    if strategy == "block":
        height, width = args.block_structure
        padded = torch.nn.functional.pad(weight, (0, -k % width, 0, -n % height))
        blocks = padded.unflatten(0, (-1, height)).unflatten(2, (-1, width)).transpose(1, 2).flatten(2)
    elif args.group_size and args.group_size > 0:
        blocks = weight.unflatten(1, (-1, args.group_size))
    else:
        blocks = weight.reshape(1, 1, -1) if strategy == "tensor" else weight[:, None]
    found, whole = {}, None
    if strategy == "tensor_group":
        whole = generate_gparam(weight.min(), weight.max())
        found["weight_global_scale"] = whole.reshape(1)
    scale, zero = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args, global_scale=whole)
    if strategy == "tensor":
        scale, zero = scale.reshape(1), zero.reshape(1)
    return {**found, "weight_scale": scale, "weight_zero_point": zero}


def fp4_in_float32(
    compressor: Any, scheme: QuantizationScheme, state: dict[str, torch.Tensor]
) -> torch.Tensor:
    """The steps of NVFP4PackedCompressor.decompress, by the library's own functions."""
    packed = state["weight_packed"]
    rows, half = packed.shape
    return dequantize(
        unpack_fp4_from_uint8(packed, rows, 2 * half, dtype=torch.float32),
        compressor._decompress_scale(state["weight_scale"], torch.float32),
        args=scheme.weights,
        global_scale=state.get("weight_global_scale"),
        dtype=torch.float32,
    )


def compressed(format: str, group: dict[str, Any], **config: Any) -> Method:
    """Weights by the library's own compressor; what they mean is what it decompresses."""
    parsed = QuantizationScheme.model_validate({**group, "format": format})
    compressor = BaseCompressor.get_value_from_registry(format)

    def pack(weight: np.ndarray) -> tuple[dict[str, torch.Tensor], np.ndarray]:
        values = torch.from_numpy(weight)
        state = compressor.compress({"weight": values, **parameters(values, parsed.weights)}, parsed)
        if "fp4" in format:  # decompress() rounds to bfloat16
            meaning = fp4_in_float32(compressor, parsed, state).numpy()
        else:
            meaning = compressor.decompress({**state}, parsed)["weight"].float().numpy()
        return {name: tensor.contiguous() for name, tensor in state.items()}, meaning

    declared = {"config_groups": {"group_0": group}, "format": format, "quantization_status": "compressed"}
    return Method({"quant_method": "compressed-tensors", **declared, "ignore": ["lm_head"], **config}, pack)


def write_compressed_model(
    folder: Path,
    config: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> tuple[Path, torch.nn.Module]:
    """A whole model, quantised by rounding and saved as LLM Compressor saves it.

    Returns:
        The folder, and the model that the library decompresses, in float32.
    """
    model = random_model(**{**GEOMETRY, **overrides}).to(dtype)
    apply_quantization_config(model, QuantizationConfig.model_validate(config))
    for module in model.modules():
        if (found := getattr(module, "quantization_scheme", None)) and found.weights:
            for name, value in parameters(module.weight.data, found.weights).items():
                held = getattr(module, name, None)
                if held is not None:
                    held.data = value.reshape(held.shape).to(held.dtype)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    copy_tokenizer(TINY, folder)
    fit_tokenizer(folder, model.config.vocab_size)
    compressor.decompress_model(model)
    return folder, model.float()
