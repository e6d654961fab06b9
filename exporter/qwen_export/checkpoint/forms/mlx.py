"""MLX checkpoints: groups with a scale and a bias, or FP4 and FP8; and what MLX stores differently.

MLX has the weights of RMSNorms with the 1 added, convolutions with the channels last, and the experts' gate
and up projections apart. Sources: mlx 0.32 (quantize), mlx-lm 0.32 (models/qwen3_5.py and qwen3_5_moe.py:
sanitize; utils.py: quantize_model), mlx-vlm (models/qwen3_5).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from qwen_common.errors import UserError

from qwen_export.checkpoint.forms.codes import Codes
from qwen_export.checkpoint.forms.fp4 import fp4_tensor
from qwen_export.checkpoint.forms.fp8 import fp8_tensor
from qwen_export.checkpoint.forms.scales import E4M3, E8M0, Scales
from qwen_export.checkpoint.forms.targets import is_name_of
from qwen_export.checkpoint.tensors.plain import FLOATS, PlainTensor, pieces, take
from qwen_export.checkpoint.tensors.tensor import Assembled, CheckpointTensor, Part

_UINT32, _UINT8 = np.dtype(np.uint32), np.dtype(np.uint8)
_NORM = re.compile(r"model\.norm\.weight|.*\.(?:input_layernorm|post_attention_layernorm|[qk]_norm)\.weight")
_EXPERTS = re.compile(r"(.+\.mlp)\.switch_mlp\.((?:gate|up|down)_proj\..+)")
_INSTEAD = "give the checkpoint that it was converted from"
_FLOATS = {"mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}  # group size and bits
_PATCHES = "model.visual.patch_embed.proj.weight"
_CONVOLUTION = ".conv1d.weight"


class _Scheme(BaseModel):
    """How a module is quantised; the same of the checkpoint, for those that it does not name."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    group_size: Literal[16, 32, 64, 128]
    bits: Literal[2, 3, 4, 5, 6, 8]
    mode: Literal["affine", "mxfp4", "mxfp8", "nvfp4"] = "affine"

    @model_validator(mode="after")
    def _floats_have_one_size(self) -> _Scheme:
        if self.mode in _FLOATS and (self.group_size, self.bits) != _FLOATS[self.mode]:
            raise ValueError(f"{self.mode} has another group size, or other bits")
        return self


class MlxConfig(BaseModel):
    """`quantization` of such a checkpoint, with an entry for each module that differs."""

    model_config = ConfigDict(frozen=True, extra="allow")

    quant_method: Literal["mlx"]
    group_size: Annotated[int, Field(gt=0)] | None = None
    bits: Annotated[int, Field(gt=0)] | None = None
    mode: str = "affine"

    def assemble(self, stored: dict[str, PlainTensor]) -> dict[str, CheckpointTensor]:
        """See `Form`."""
        _one_by_one(stored)
        made: dict[str, CheckpointTensor] = {}
        for name in [name for name in stored if _NORM.fullmatch(name)]:
            made[name] = _Changed(stored[name], stored.pop(name).shape, _less_one)
        if (patches := stored.get(_PATCHES)) and len(patches.shape) == 5:
            out, *sizes, channels = stored.pop(_PATCHES).shape
            made[_PATCHES] = _Changed(patches, (out, channels, *sizes), _channels_first)
        for name, tensor in stored.items():
            if name.endswith(_CONVOLUTION) and len(tensor.shape) == 3:
                channels, taps, _ = tensor.shape
                stored[name] = tensor.reshaped((channels, 1, taps)) or tensor
        for module in pieces(stored, "scales"):
            made[module + "weight"] = self._tensor(stored, module)
        return made

    def _tensor(self, stored: dict[str, PlainTensor], module: str) -> CheckpointTensor:
        """The weight of one module (its name with the dot), its parts taken out of `stored`."""
        scales = stored.pop(module + "scales")
        words = take(stored, module + "weight", scales.name)
        biases = stored.pop(module + "biases", None)
        if (whole := stored.get(module + "global_scale")) is not None:
            raise UserError(
                f"{whole.name}: NVFP4 of MLX with a global scale is not supported yet: {_INSTEAD}"
            )
        scheme = self._scheme(module.removesuffix("."))
        if len(words.shape) != 2 or words.dtype != _UINT32:
            raise UserError(
                f"{words.name} ({words.dtype} {words.shape}) holds no codes: download the checkpoint again"
            )
        if scheme.mode == "affine":
            if biases is None:
                raise UserError(
                    f"the checkpoint has {scales.name}, but no {module}biases: is a shard missing?"
                )
            return _affine(scheme, words, scales, biases)
        rows, columns = words.shape
        octets = replace(words, dtype=_UINT8, shape=(rows, 4 * columns))
        if scales.dtype != _UINT8:
            raise UserError(
                f"{scales.name} is {scales.dtype}, and scales of {scheme.mode} are bytes: download it again"
            )
        if scheme.mode == "mxfp8":
            values = replace(octets, dtype=E4M3)
            return fp8_tensor(values, scales, (1, scheme.group_size), bytes_are=E8M0)
        return fp4_tensor(octets, scales, scheme.group_size)

    def _scheme(self, module: str) -> _Scheme:
        """Of the module's own entry, or of the checkpoint."""
        path = re.sub(r"\.experts\.\d+\.", ".switch_mlp.", module)
        own = (value for name, value in (self.model_extra or {}).items() if is_name_of(name, path))
        found = next((value for value in own if isinstance(value, dict)), None)
        common = {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}
        try:
            return _Scheme.model_validate(common if found is None else found)
        except ValidationError as error:
            raise UserError(
                f"config.json, quantization: {found or common} of {module} is not supported yet: {_INSTEAD}"
            ) from error


@dataclass(frozen=True)
class AffineTensor(Assembled):
    """w = code * scale + bias, for groups of input features; [N, K]."""

    codes: Codes
    scales: Scales
    biases: Scales

    @property
    def forms(self) -> Counter[str]:
        return Counter([f"MLX's {self.codes.width}-bit groups of {self._group}"])

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape

    def _parts(self) -> Iterable[Part]:
        return self.codes.words, self.scales, self.biases

    @property
    def _group(self) -> int:
        return self.shape[1] // self.scales.columns

    def read(self, start: int, stop: int) -> np.ndarray:
        """float32 rows."""
        values = self.codes.read(start, stop).astype(np.float32)
        groups = values.reshape(len(values), -1, self._group)
        groups *= self.scales.read(start, stop)[..., None]
        groups += self.biases.read(start, stop)[..., None]
        return values


@dataclass(frozen=True)
class _Changed(Assembled):
    """Rows of a stored tensor, as transformers has them."""

    stored: PlainTensor
    shape: tuple[int, ...]
    change: Callable[[np.ndarray], np.ndarray]

    def _parts(self) -> Iterable[Part]:
        return (self.stored,)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.change(self.stored.read(start, stop))


def _less_one(rows: np.ndarray) -> np.ndarray:
    """transformers' RMSNorm adds it again."""
    return rows.astype(np.float32) - np.float32(1)


def _channels_first(rows: np.ndarray) -> np.ndarray:
    return np.moveaxis(rows, -1, 1)


def _affine(scheme: _Scheme, words: PlainTensor, scales: PlainTensor, biases: PlainTensor) -> AffineTensor:
    n, columns = words.shape
    k = 32 * columns // scheme.bits
    expected = (n, k // scheme.group_size)
    whole = 32 * columns % scheme.bits == 0 and k % scheme.group_size == 0 and k > 0
    if not whole or any(part.shape != expected or part.dtype not in FLOATS for part in (scales, biases)):
        shapes = words.shape, scales.shape, biases.shape
        raise UserError(
            f"{words.name} has codes, scales and biases of the shapes {shapes}, which do not belong together "
            f"for {scheme.bits} bits in groups of {scheme.group_size}: download the checkpoint again"
        )
    return AffineTensor(Codes(words, (n, k), scheme.bits, along_inputs=True), Scales(scales), Scales(biases))


def _one_by_one(stored: dict[str, PlainTensor]) -> None:
    """The stacks of a mixture's experts as tensors of each."""
    for name in list(stored):
        match = _EXPERTS.fullmatch(name)
        if match and len(stored[name].shape) > 1 and stored[name].nbytes:
            tensor = stored.pop(name)
            for expert in range(tensor.shape[0]):
                stored[f"{match[1]}.experts.{expert}.{match[2]}"] = tensor.entry(expert)


def is_mlx(quantization: Any) -> bool:
    """Whether that is what MLX writes as `quantization` and again as `quantization_config`."""
    return isinstance(quantization, dict) and {"group_size", "bits"} <= quantization.keys()
