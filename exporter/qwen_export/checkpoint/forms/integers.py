"""Weights as integers: groups of input features with a scale, and perhaps a zero point.

They are either dequantised as they are read, or kept: their own codes, zero points and scales, in
MatMulNBits' order. How the codes lie in words is each method's own (`Codes`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from qwen_common.errors import UserError

from qwen_export.checkpoint.forms.codes import Codes
from qwen_export.checkpoint.forms.scales import Scales, are_scales
from qwen_export.checkpoint.tensors.plain import PlainTensor
from qwen_export.checkpoint.tensors.tensor import Assembled, Part, Scheme
from qwen_export.quantize.blockwise import Quantization, pack_codes

_KEPT_BITS = (4, 8)  # MatMulNBits' and QMoE's on every provider
_SMALLEST_GROUP = 16  # MatMulNBits' smallest block


@dataclass(frozen=True)
class IntegerTensor(Assembled):
    """w = (code - zero point) * scale, for groups of input features; a `PrequantizedTensor`.

    Attributes:
        bits: of a code; its largest is 2^bits - 1.
        scales: [N, groups].
        zeros: [N, groups]; None where every zero point is the middle code, 2^(bits - 1).
        symmetric: every zero point is the middle code, stored or not.
        group_of: the group of each input feature, [K]; None: they are in order, and equally large.
    """

    codes: Codes
    bits: int
    scales: Scales
    zeros: Codes | None
    symmetric: bool
    group_of: PlainTensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape

    def _parts(self) -> Iterable[Part]:
        parts = (self.codes.words, self.scales, self.zeros and self.zeros.words, self.group_of)
        return (part for part in parts if part)

    @property
    def _group(self) -> int:
        return self.shape[1] // self.scales.columns

    @property
    def scheme(self) -> Scheme | None:
        group = self._group
        if self.bits not in _KEPT_BITS or self.group_of is not None or group & -group < _SMALLEST_GROUP:
            return None
        return Scheme(group, self.symmetric, self.bits)

    @property
    def forms(self) -> Counter[str]:
        how = f"of {self._group}" if self.group_of is None else "out of order (desc_act)"
        return Counter([f"{self.bits}-bit integers in groups {how}"])

    def read(self, start: int, stop: int) -> np.ndarray:
        values = self.codes.read(start, stop).astype(np.float32)
        zeros, scales = self._zeros(start, stop).astype(np.float32), self.scales.read(start, stop)
        if self.group_of is not None:
            order = self.group_of.read(0, self.shape[1])
            return (values - zeros[:, order]) * scales[:, order]
        groups = values.reshape(len(values), -1, self._group)
        groups -= zeros[..., None]
        groups *= scales[..., None]
        return values

    def packed(self, start: int, stop: int, form: Quantization) -> list[np.ndarray]:
        codes, zeros = self.codes.read(start, stop), self._zeros(start, stop)
        wrong = zeros != self._middle if self.symmetric else zeros > 2**self.bits - 1
        if wrong.any():
            assert self.zeros
            reason = "config.json says sym" if self.symmetric else f"{self.bits} bits do not hold that"
            raise UserError(
                f"{self.zeros.words.name} has the zero point {zeros[wrong][0]}, but {reason}: "
                "give the unquantised checkpoint, or one in the format gptq_v2"
            )
        scales = self.scales.read(start, stop)
        with np.errstate(over="ignore"):  # reported below
            stored = scales.astype(form.scale_dtype)
        if not np.isfinite(stored).all():
            raise UserError(
                f"{self.scales.tensor.name} reaches {np.abs(scales).max():.3g}, more than float16 holds: "
                "choose a profile with float32 activations"
            )
        repeats = self._group // form.block_size
        parts = [pack_codes(codes, form.bits), np.repeat(stored, repeats, axis=1)]
        if not form.symmetric:
            parts.append(pack_codes(np.repeat(zeros, repeats, axis=1), form.bits))
        return parts

    @property
    def _middle(self) -> int:
        return 1 << (self.bits - 1)

    def _zeros(self, start: int, stop: int) -> np.ndarray:
        """uint8 [n, groups]."""
        if self.zeros is None:
            return np.full((stop - start, self.scales.columns), self._middle, np.uint8)
        return self.zeros.read(start, stop)


def check_integers(tensor: IntegerTensor) -> None:
    """Raises:
    UserError: shapes do not belong together, or the groups do not divide the input features.
    """
    n, k = tensor.shape
    scales, groups = tensor.scales, tensor.scales.columns
    shapes = [tensor.codes.words.shape, scales.tensor.shape]
    rows = -(-n // scales.height)
    words = [tensor.codes.words, tensor.zeros and tensor.zeros.words, tensor.group_of]
    for part in [part for part in words if part and part.dtype.kind not in "iu"]:
        raise UserError(f"{part.name} is {part.dtype}, and holds no integers: download it again")
    if not are_scales(part := scales.tensor):
        raise UserError(f"{part.name} is {part.dtype}, and holds no scales: download it again")
    fits = tensor.codes.words.shape == tensor.codes.stored_shape
    fits = fits and scales.tensor.shape == ((groups, n) if scales.outputs_last else (rows, groups))
    fits = fits and groups > 0 and (k % groups == 0 or tensor.group_of is not None)
    if tensor.zeros:
        shapes.insert(1, tensor.zeros.words.shape)
        fits = fits and tensor.zeros.shape == (n, groups)
        fits = fits and tensor.zeros.words.shape == tensor.zeros.stored_shape
    if not fits:
        named = "codes, zero points and scales" if tensor.zeros else "codes and scales"
        raise UserError(
            f"{tensor.codes.words.name} has {named} of the shapes {tuple(shapes)}, which do not "
            f"belong together for {n} x {k} weights of {tensor.bits} bits: download the checkpoint again"
        )
