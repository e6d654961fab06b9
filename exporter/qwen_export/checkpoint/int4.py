"""4-bit weights of GPTQ and AWQ: groups of input features with a scale and a zero point.

They are either dequantised as they are read, or kept: their own codes, zero points and scales, in
MatMulNBits' order. The two methods differ in how the codes lie in int32 (`Layout`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from qwen_common.errors import UserError

from qwen_export.checkpoint.plain import PlainTensor, take
from qwen_export.checkpoint.tensor import CheckpointTensor, Scheme
from qwen_export.quantize.blockwise import Quantization, pack_codes

_CODES_IN_INT32 = 8
_LARGEST_CODE, _MIDDLE_CODE = 15, 8


@dataclass(frozen=True)
class Layout:
    """How 4-bit codes of a weight [N, K] and its zero points [groups, N] lie in int32.

    Attributes:
        along_inputs: an int32 holds the codes of 8 consecutive input features of one output (int32
            [K / 8, N]); else of one input feature for 8 outputs ([K, N / 8]).
        places: at which place of 4 bits, from the lowest, each of 8 consecutive outputs stands.
        zero_offset: what is added to a stored zero point.
    """

    along_inputs: bool
    places: tuple[int, ...]
    zero_offset: int


@dataclass(frozen=True)
class Int4Tensor:
    """w = (code - zero point) * scale, for groups of input features; a `PrequantizedTensor`."""

    qweight: PlainTensor
    qzeros: PlainTensor
    scales: PlainTensor
    layout: Layout
    symmetric: bool

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.qweight.shape
        if self.layout.along_inputs:
            return columns, rows * _CODES_IN_INT32
        return columns * _CODES_IN_INT32, rows

    @property
    def nbytes(self) -> int:
        return self.qweight.nbytes + self.qzeros.nbytes + self.scales.nbytes

    @property
    def files(self) -> frozenset[Path]:
        return self.qweight.files | self.qzeros.files | self.scales.files

    @property
    def scheme(self) -> Scheme:
        return Scheme(self.shape[1] // self.scales.shape[0], self.symmetric)

    def read(self, start: int, stop: int) -> np.ndarray:
        codes, zeros, scales = self._parts(start, stop)
        group = self.scheme.group_size
        values = codes.astype(np.float32).reshape(len(codes), -1, group) - zeros.astype(np.float32)[..., None]
        values *= scales.astype(np.float32)[..., None]
        return values.reshape(codes.shape)

    def packed(self, start: int, stop: int, form: Quantization) -> list[np.ndarray]:
        codes, zeros, scales = self._parts(start, stop)
        wrong = zeros != _MIDDLE_CODE if self.symmetric else zeros > _LARGEST_CODE
        if wrong.any():
            found = zeros[wrong][0]
            reason = "config.json says sym" if self.symmetric else "4 bits do not hold that"
            raise UserError(
                f"{self.qzeros.name} has the zero point {found}, but {reason}: "
                "give the unquantised checkpoint, or one in the format gptq_v2"
            )
        repeats = self.scheme.group_size // form.block_size
        parts = [pack_codes(codes, form.bits), np.repeat(scales, repeats, axis=1).astype(form.scale_dtype)]
        if not form.symmetric:
            parts.append(pack_codes(np.repeat(zeros, repeats, axis=1), form.bits))
        return parts

    def _parts(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Codes uint8 [n, K], zero points uint8 [n, groups] and scales [n, groups] of output features."""
        if self.layout.along_inputs:
            words = self.qweight.columns(start, stop)
            codes = _places(words).swapaxes(0, 1).reshape(stop - start, -1)
        else:
            codes = self._outputs(self.qweight, start, stop).T
        zeros = self._outputs(self.qzeros, start, stop).T + np.uint8(self.layout.zero_offset)
        return codes, zeros, self.scales.columns(start, stop).T

    def _outputs(self, tensor: PlainTensor, start: int, stop: int) -> np.ndarray:
        """Columns `start` to `stop` of a tensor that holds 8 outputs in an int32: uint8 [rows, n]."""
        first = start // _CODES_IN_INT32
        words = tensor.columns(first, -(-stop // _CODES_IN_INT32))
        columns = _places(words)[..., self.layout.places].reshape(len(words), -1)
        return columns[:, start - first * _CODES_IN_INT32 : stop - first * _CODES_IN_INT32]


def assemble(stored: dict[str, PlainTensor], layout: Layout, symmetric: bool) -> dict[str, CheckpointTensor]:
    """Take the tensors that this form is made of out of `stored`; returns the model's, by name.

    Raises:
        UserError: zero points or scales miss, shapes do not belong together, or groups are not in the order
            of the input features.
    """
    made: dict[str, CheckpointTensor] = {}
    for name in [name for name in stored if name.endswith(".qweight")]:
        module = name.removesuffix("qweight")
        qweight = stored.pop(name)
        qzeros, scales = (take(stored, module + part, name) for part in ("qzeros", "scales"))
        tensor = Int4Tensor(qweight, qzeros, scales, layout, symmetric)
        _check(tensor, stored.pop(module + "g_idx", None))
        made[module + "weight"] = tensor
    return made


def _check(tensor: Int4Tensor, g_idx: PlainTensor | None) -> None:
    shapes = tensor.qweight.shape, tensor.qzeros.shape, tensor.scales.shape
    groups = tensor.scales.shape[0]
    fits = all(len(shape) == 2 for shape in shapes)
    if fits:
        n, k = tensor.shape
        fits = tensor.scales.shape[1] == n and k % groups == 0
        fits = fits and tensor.qzeros.shape == (groups, n // _CODES_IN_INT32)
        fits = fits and n % _CODES_IN_INT32 == 0
    if not fits:
        raise UserError(
            f"{tensor.qweight.name} has codes, zero points and scales of the shapes {shapes}, which do not "
            "belong together: download the checkpoint again"
        )
    if g_idx is None:
        return
    in_order = np.arange(k, dtype=np.int32) // tensor.scheme.group_size
    if g_idx.shape != (k,) or not np.array_equal(g_idx.read(0, k), in_order):
        raise UserError(
            f"{g_idx.name} is not in order: the checkpoint was quantised with desc_act, which no kernel here "
            "takes; give one made with desc_act=false, or the unquantised one"
        )


def _places(words: np.ndarray) -> np.ndarray:
    """int32 [a, b] -> uint8 [a, b, 8], the 4-bit codes from the lowest."""
    octets = np.ascontiguousarray(words).view(np.uint8).reshape(*words.shape, 4)
    return np.stack([octets & 15, octets >> 4], axis=-1).reshape(*words.shape, _CODES_IN_INT32)
