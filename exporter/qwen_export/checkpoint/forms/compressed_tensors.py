"""compressed-tensors: what LLM Compressor writes and vLLM reads, a scheme for each group of modules.

Source: compressed-tensors 0.20 (compressors/, quantization/quant_config.py, utils/match.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from qwen_common.errors import UserError

from qwen_export.checkpoint.forms.codes import Codes
from qwen_export.checkpoint.forms.fp4 import fp4_tensor
from qwen_export.checkpoint.forms.fp8 import fp8_tensor
from qwen_export.checkpoint.forms.integers import IntegerTensor, check_integers
from qwen_export.checkpoint.forms.scaled import ScaledTensor
from qwen_export.checkpoint.forms.scales import E8M0, Scales, are_scales
from qwen_export.checkpoint.forms.targets import is_name_of, matches
from qwen_export.checkpoint.tensors.plain import FLOATS, PlainTensor, pieces, take
from qwen_export.checkpoint.tensors.tensor import CheckpointTensor
from qwen_export.quantize.fp4 import NVFP4

_Size = Annotated[int, Field(gt=0)]
_REGEX = "re:"
_MXFP8 = "mxfp8-quantized"
_UINT8, _INT8, _INT32 = np.dtype(np.uint8), np.dtype(np.int8), np.dtype(np.int32)


def _from_text(value: Any) -> Any:
    """Older releases wrote a block's size as "128x128"."""
    return tuple(map(int, value.split("x"))) if isinstance(value, str) and "x" in value else value


class _Weights(BaseModel):
    """`weights` of a group: `QuantizationArgs`."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    num_bits: Literal[2, 4, 8] = 8
    type: Literal["int", "float"] = "int"
    symmetric: bool = True
    strategy: Literal["tensor", "channel", "group", "tensor_group", "block"] | None = None
    group_size: Annotated[int, Field(ge=-1)] | None = None
    block_structure: Annotated[tuple[_Size, _Size], BeforeValidator(_from_text)] | None = None
    scale_dtype: str | None = None


class _Group(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    targets: list[str]
    weights: _Weights | None = None
    format: str | None = None


class CompressedTensorsConfig(BaseModel):
    """`quantization_config` of such a checkpoint."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    quant_method: Literal["compressed-tensors"]
    format: Literal[
        "dense",
        "float-quantized",
        "int-quantized",
        "mixed-precision",
        "mxfp4-pack-quantized",
        "mxfp8-quantized",
        "naive-quantized",
        "nvfp4-pack-quantized",
        "pack-quantized",
    ]
    config_groups: dict[str, _Group]
    quantization_status: Literal["compressed"] = "compressed"
    # Rotations of activations, some of which are to be done as the model runs; and zeros left out.
    transform_config: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    sparsity_config: Annotated[dict[str, Any], Field(max_length=0)] | None = None

    def assemble(self, stored: dict[str, PlainTensor]) -> dict[str, CheckpointTensor]:
        """See `Form`."""
        modules = {*pieces(stored, "weight_packed"), *pieces(stored, "weight_scale")}
        return {module + "weight": self._tensor(stored, module) for module in sorted(modules)}

    def _tensor(self, stored: dict[str, PlainTensor], module: str) -> CheckpointTensor:
        """The weight of one module (its name with the dot), its parts taken out of `stored`."""
        weights, form = self._weights(module.removesuffix("."))
        packed = stored.get(module + "weight_packed")
        found = module + ("weight_packed" if packed else "weight_scale")
        scales = take(stored, module + "weight_scale", found)
        weight = take(stored, module + ("weight_packed" if packed else "weight"), found)
        shape = stored.pop(module + "weight_shape", None)
        zeros = stored.pop(module + "weight_zero_point", None)
        whole = stored.pop(module + "weight_global_scale", None)
        group_of = stored.pop(module + "weight_g_idx", None)
        if group_of is not None:
            raise UserError(
                f"{group_of.name}: groups out of order (actorder: group) are not supported yet, nor by the "
                "library any more: quantise again with actorder=weight"
            )
        if weights.type == "int":
            return _integers(weights, weight, scales, zeros, shape)
        if not weights.symmetric:
            raise UserError(
                f"config.json, quantization_config: floats of {weights.num_bits} bits with zero points are "
                "not supported yet: give the checkpoint in bf16"
            )
        if weights.num_bits == 4:
            if whole is None and weights.group_size == NVFP4.block_size:
                raise UserError(
                    f"the checkpoint has {weight.name}, but no weight_global_scale: is a shard missing?"
                )
            return fp4_tensor(weight, scales, weights.group_size or 0, whole, divides=True)
        powers = form == _MXFP8 or weights.scale_dtype == "torch.uint8"
        return _floats(weights, weight, scales, E8M0 if powers else None)

    def _weights(self, module: str) -> tuple[_Weights, str]:
        """And format, of the most specific group whose targets name the module: by name, by expression, by
        class."""
        kind = "Embedding" if module.endswith("embed_tokens") else "Linear"
        targets = {target: group for group in self.config_groups.values() for target in group.targets}
        named = sorted(targets, key=lambda target: (_REGEX in target, target))
        for target in (*(target for target in named if _names(target, module)), kind):
            if target in targets and (weights := targets[target].weights):
                return weights, targets[target].format or self.format
        raise UserError(
            f"config.json, quantization_config: no group has {module} among its targets, and its weight is "
            "quantised: is config.json of another checkpoint?"
        )


def _names(target: str, module: str) -> bool:
    if target.startswith(_REGEX):
        return matches(target.removeprefix(_REGEX), module)
    return is_name_of(target, module)


def _integers(
    weights: _Weights,
    weight: PlainTensor,
    scales: PlainTensor,
    zeros: PlainTensor | None,
    shape: PlainTensor | None,
) -> IntegerTensor:
    bits, middle = weights.num_bits, 1 << (weights.num_bits - 1)
    if weight.dtype == _INT8:  # a byte for each code
        n, k = weight.shape if len(weight.shape) == 2 else (0, 0)
        codes = Codes(weight, (n, k), 8, along_inputs=True, offset=middle)
    else:
        n, k = _packed_shape(weight, shape)
        codes = Codes(weight, (n, k), bits, along_inputs=True)
    groups = next(_group_counts(weights, k), 0) if n else 0
    rows = 1 if weights.strategy == "tensor" else n
    placed = scales.reshaped((rows, groups))
    if placed is None or not groups or not are_scales(scales) or weight.dtype not in (_INT8, _INT32):
        raise UserError(
            f"{scales.name} ({scales.dtype} {scales.shape}) holds no scales for {n} x {k} weights "
            f"({weight.name}, {weight.dtype}) with strategy {weights.strategy} and group_size "
            f"{weights.group_size}: download the checkpoint again"
        )
    zero_points = None
    if zeros is None and not weights.symmetric:
        raise UserError(f"the checkpoint has {weight.name}, but no weight_zero_point: is a shard missing?")
    if zeros and zeros.dtype not in (_INT8, _INT32):
        raise UserError(f"{zeros.name} is {zeros.dtype}, and holds no zero points: download it again")
    if weights.symmetric and rows != n:  # all of them have one, of which nothing is to be said
        zeros = None
    if zeros and zeros.dtype == _INT8:
        zeros = zeros.reshaped((rows, groups)) or zeros
        zero_points = Codes(zeros, (n, groups), 8, along_inputs=True, offset=middle)
    elif zeros:
        zero_points = Codes(zeros, (n, groups), bits, along_inputs=False)
    tensor = IntegerTensor(
        codes, bits, Scales(placed, height=n if rows == 1 else 1), zero_points, weights.symmetric
    )
    check_integers(tensor)
    return tensor


def _group_counts(weights: _Weights, k: int) -> Iterator[int]:
    """How many groups a row of `k` has, if its scheme says so."""
    if weights.strategy in ("channel", "tensor") or weights.group_size == -1:
        yield 1
    elif weights.group_size and k % weights.group_size == 0:
        yield k // weights.group_size


def _packed_shape(weight: PlainTensor, shape: PlainTensor | None) -> tuple[int, int]:
    if shape is None or shape.shape != (2,) or shape.dtype.kind != "i":
        raise UserError(f"the checkpoint has {weight.name}, but no weight_shape: is a shard missing?")
    n, k = map(int, shape.read(0, 2))
    return n, k


def _floats(
    weights: _Weights, weight: PlainTensor, scales: PlainTensor, bytes_are: np.dtype | None
) -> ScaledTensor:
    """Args:
    bytes_are: what scales are, if they are bytes.
    """
    if weight.dtype in FLOATS:
        raise UserError(
            f"{weight.name} is {weight.dtype} and has scales: the checkpoint was saved before it was "
            "compressed; save it again with save_compressed=True"
        )
    if weights.strategy == "block" and weights.block_structure:
        return fp8_tensor(weight, scales, weights.block_structure)
    if weights.strategy in ("group", "tensor_group") and weights.group_size:
        if bytes_are and scales.dtype not in (_UINT8, bytes_are):
            raise UserError(
                f"{scales.name} is {scales.dtype}, and scales of MXFP8 are bytes: download it again"
            )
        return fp8_tensor(weight, scales, (1, weights.group_size), bytes_are)
    return fp8_tensor(weight, scales, None)
