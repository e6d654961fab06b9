"""bitsandbytes checkpoints: NF4 and FP4 in blocks of the flattened weight, and INT8 by rows.

Source: bitsandbytes 0.50 (functional.py: QuantState; nn/modules.py: Linear8bitLt).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from qwen_common.errors import UserError

from qwen_export.checkpoint.forms.codes import Codes
from qwen_export.checkpoint.forms.integers import IntegerTensor, check_integers
from qwen_export.checkpoint.forms.scales import Scales
from qwen_export.checkpoint.tensors.plain import FLOATS, PlainTensor, pieces, take
from qwen_export.checkpoint.tensors.tensor import Assembled, CheckpointTensor, Part

_STATE = "weight.quant_state.bitsandbytes__"
_UINT8, _INT8, _FLOAT32 = np.dtype(np.uint8), np.dtype(np.int8), np.dtype(np.float32)
_LONGEST_STATE = 65536  # bytes
_Size = Annotated[int, Field(gt=0)]


class _State(BaseModel):
    """The JSON that is stored beside a weight."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    quant_type: Literal["nf4", "fp4"]
    blocksize: _Size
    shape: tuple[_Size, _Size]
    nested_blocksize: _Size | None = None
    nested_offset: float = 0.0


@dataclass(frozen=True)
class _Nested(Assembled):
    """Scales that are codes themselves: `offset` + values[code] times a factor for each `block`."""

    values: PlainTensor
    scales: PlainTensor
    block: int
    offset: float

    def _parts(self) -> Iterable[Part]:
        return self.values, self.scales


@dataclass(frozen=True)
class FourBitTensor(Assembled):
    """[N, K] of 4-bit codes for `values`, the first of two in a byte's upper half.

    Attributes:
        scales: one for each `block` of the weight, row after row; [blocks].
    """

    form: str
    shape: tuple[int, int]
    codes: PlainTensor
    values: PlainTensor
    scales: PlainTensor
    block: int
    nested: _Nested | None

    @property
    def forms(self) -> Counter[str]:
        return Counter([self.form])

    def _parts(self) -> Iterable[Part]:
        parts = (self.codes, self.values, self.scales)
        return (*parts, self.nested) if self.nested else parts

    def read(self, start: int, stop: int) -> np.ndarray:
        """float32 rows."""
        k = self.shape[1]
        first, last = start * k, stop * k
        octets = self.codes.read(first // 2, -(-last // 2))
        codes = np.stack([octets >> 4, octets & 15], axis=-1).reshape(-1)
        codes = codes[first % 2 : first % 2 + last - first]
        scales = self._scales(first // self.block, -(-last // self.block))
        values = self.values.read(0, 16)[codes]
        values *= scales[np.arange(first, last) // self.block - first // self.block]
        return values.reshape(stop - start, k)

    def _scales(self, first: int, last: int) -> np.ndarray:
        stored = self.scales.read(first, last)
        if self.nested is None:
            return stored.astype(np.float32)
        block = self.nested.block
        factors = self.nested.scales.read(first // block, -(-last // block))
        factors = factors[np.arange(first, last) // block - first // block]
        return self.nested.values.read(0, 256)[stored] * factors + np.float32(self.nested.offset)


class BitsAndBytesConfig(BaseModel):
    """`quantization_config` of such a checkpoint; each weight says for itself how it is stored."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    quant_method: Literal["bitsandbytes"]

    def assemble(self, stored: dict[str, PlainTensor]) -> dict[str, CheckpointTensor]:
        """See `Form`."""
        made: dict[str, CheckpointTensor] = {}
        for module in {*pieces(stored, "weight.absmax"), *pieces(stored, f"{_STATE}nf4")}:
            made[module + "weight"] = _four_bits(stored, module)
        for module in pieces(stored, "SCB"):
            made[module + "weight"] = _int8(stored, module)
        return made


def _four_bits(stored: dict[str, PlainTensor], module: str) -> FourBitTensor:
    found = module + "weight.absmax"
    kind = "fp4" if f"{module}{_STATE}fp4" in stored else "nf4"
    state = _state(take(stored, f"{module}{_STATE}{kind}", found))
    codes, values, scales = (
        take(stored, module + part, found) for part in ("weight", "weight.quant_map", "weight.absmax")
    )
    n, k = state.shape
    blocks = -(-n * k // state.blocksize)
    nested = None
    if scales.dtype == _UINT8:
        nested = _Nested(
            take(stored, module + "weight.nested_quant_map", found),
            take(stored, module + "weight.nested_absmax", found),
            state.nested_blocksize or 0,
            state.nested_offset,
        )
    octets = -(-n * k // 2)
    fits = prod(codes.shape) * codes.dtype.itemsize == octets and values.shape == (16,)
    fits = fits and codes.dtype in (_UINT8, *FLOATS)  # whatever the bytes were stored as
    fits = fits and (nested is None) == (state.nested_blocksize is None)
    fits = fits and scales.shape == (blocks,) and values.dtype == _FLOAT32
    if nested:
        fits = fits and nested.block > 0 and nested.values.shape == (256,)
        fits = fits and nested.scales.shape == (-(-blocks // nested.block),)
        fits = fits and {nested.values.dtype, nested.scales.dtype} == {_FLOAT32}
    else:
        fits = fits and scales.dtype == _FLOAT32
    if not fits:
        raise UserError(
            f"{codes.name} ({codes.dtype} {codes.shape}) and its absmax ({scales.dtype} {scales.shape}) are "
            f"no {n} x {k} weights in blocks of {state.blocksize}: download the checkpoint again"
        )
    as_octets = replace(codes, dtype=_UINT8, shape=(octets,))
    return FourBitTensor(kind.upper(), (n, k), as_octets, values, scales, state.blocksize, nested)


def _state(tensor: PlainTensor) -> _State:
    try:
        if tensor.dtype != _UINT8 or len(tensor.shape) != 1 or not 0 < tensor.shape[0] <= _LONGEST_STATE:
            raise ValueError("no bytes")
        content: Any = json.loads(tensor.read(0, tensor.shape[0]).tobytes())
        return _State.model_validate(content)
    except (ValueError, RecursionError, ValidationError) as error:
        raise UserError(
            f"{tensor.name} does not say how its weight is quantised: download the checkpoint again"
        ) from error


def _int8(stored: dict[str, PlainTensor], module: str) -> IntegerTensor:
    scales = stored.pop(module + "SCB")
    weight = take(stored, module + "weight", scales.name)
    stored.pop(module + "weight_format", None)
    n, k = weight.shape if len(weight.shape) == 2 else (0, 0)
    placed = scales.reshaped((n, 1))
    if weight.dtype != _INT8 or scales.dtype != _FLOAT32 or placed is None:
        raise UserError(
            f"tensor {scales.name} ({scales.dtype} {scales.shape}) holds no scales for rows of {weight.name} "
            f"({weight.dtype} {weight.shape}): download both again"
        )
    codes = Codes(weight, (n, k), 8, along_inputs=True, offset=128)
    # 127 is what SCB, the largest magnitude of a row, was stored as.
    tensor = IntegerTensor(codes, 8, Scales(placed, divisor=127), None, symmetric=True)
    check_integers(tensor)
    return tensor
