"""The real weights into a traced model, one at a time: read by rows, compressed by NNCF, kept on disk.

What NNCF's data-free compression makes of a row depends on that row alone, so the constants are those that it
makes of the whole model, bit by bit, in the memory of some rows. They are appended to a scratch file, and the
model's constants are that file's pages, which the system may drop until the IR is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from qwen_common.errors import UserError
from qwen_profiles.schema import Role, WeightFormat

from qwen_export.backends.openvino.compress import nncf_mode
from qwen_export.backends.openvino.placeholder import Placeholders, TensorSlice

_ELEMENTS = 1024 * 1024  # compressed at a time
_LEAST_GROUP = 32  # what NNCF falls back to where a row is no multiple of the recipe's block
_ALIGNMENT = 64  # bytes
_TYPES = {  # of codes and zero points, as OpenVINO calls them
    ("int4", True): "i4",
    ("int4", False): "u4",
    ("int8", True): "i8",
    ("int8", False): "u8",
}


class Filler:
    """Fills the models of one export, which it must outlive; `scratch` is the file that has the weights.

    Raises:
        UserError: a weight cannot be stored as the recipe says, or holds NaN or Inf.
    """

    def __init__(
        self, placeholders: Placeholders, recipe: Mapping[Role, WeightFormat], scratch: Path
    ) -> None:
        self._placeholders, self._recipe, self._scratch = placeholders, recipe, scratch
        self._pages: list[np.ndarray] = []  # OpenVINO does not keep what it is given alive
        scratch.write_bytes(b"")

    def fill(self, model: Any) -> None:
        """Put the real weights into an openvino.Model."""
        for node in model.get_ordered_ops():
            if node.get_type_name() != "Constant":
                continue
            weight = self._placeholders.find(node.data.ctypes.data)
            if weight is None:
                continue
            users = node.output(0).get_target_inputs()
            element = node.get_element_type().get_type_name()
            # A 16-bit constant is followed by a conversion to float32, which stays.
            filled = self._compressed(weight, node.get_friendly_name(), convert=element == "f32")
            for user in users:
                user.replace_source_output(filled.output(0))

    def _compressed(self, weight: TensorSlice, name: str, convert: bool) -> Any:
        """The nodes that give `weight` back, as NNCF makes them."""
        from openvino import opset13 as op

        form = self._recipe[weight.role]
        codes, scales, zeros = self._constants(weight, name, form)
        value = op.convert(codes, "f16")
        if zeros is not None:
            value = op.subtract(value, op.convert(zeros, "f16"), name=f"{name}/zero_point/subtract")
        value = op.multiply(value, scales, name=f"{name}/fq_weights_1")
        if form.precision == "int4":
            value = op.reshape(value, np.array(weight.shape, np.int64), special_zero=False)
        return op.convert(value, "f32", name=f"{name}/fq_weights_1/convert") if convert else value

    def _constants(self, weight: TensorSlice, name: str, form: WeightFormat) -> tuple[Any, Any, Any]:
        """Codes [..., N, K] or [..., N, groups, group], scales and zero points with 1 for their last axis."""
        from nncf.quantization.algorithms.weight_compression.config import WeightCompressionConfig
        from nncf.quantization.algorithms.weight_compression.weight_lowering import compress_weight
        from nncf.tensor import Tensor

        group = _group(weight, form)
        config = WeightCompressionConfig(mode=nncf_mode(form), group_size=group)
        start = self._end()
        scales, zeros = [], []
        with self._scratch.open("ab") as file:
            for rows in weight.rows(_ELEMENTS):
                made = compress_weight(Tensor(rows), (1,), config)
                file.write(_packed(made.tensor.data, form).data)
                scales.append(made.scale.data.astype(np.float16))
                if made.zero_point is not None:
                    zeros.append(made.zero_point.data.astype(np.uint8))
        width = weight.shape[-1]
        cut = (width,) if group < 0 else (width // group, group)
        outer, kind = weight.shape[:-1], _TYPES[form.precision, form.symmetric]
        codes = self._mapped(start, (*outer, *cut), kind, name)
        per_scale = (*outer, *cut[:-1], 1)
        scale = self._mapped(self._append(np.concatenate(scales)), per_scale, "f16", f"{name}/scale")
        if not zeros:
            return codes, scale, None
        at = self._append(_packed(np.concatenate(zeros), form))
        return codes, scale, self._mapped(at, per_scale, kind, f"{name}/zero_point")

    def _end(self) -> int:
        """Where the next constant begins."""
        with self._scratch.open("ab") as file:
            file.write(b"\0" * (-file.tell() % _ALIGNMENT))
            return file.tell()

    def _append(self, values: np.ndarray) -> int:
        start = self._end()
        with self._scratch.open("ab") as file:
            file.write(np.ascontiguousarray(values).data)
        return start

    def _mapped(self, start: int, shape: tuple[int, ...], kind: str, name: str) -> Any:
        """A constant over the scratch file's pages."""
        import openvino

        element = getattr(openvino.Type, kind)
        count = int(np.prod(shape, dtype=np.int64)) * element.bitwidth // 8
        pages = np.memmap(self._scratch, np.uint8, "r", start, (count,))
        self._pages.append(pages)
        tensor = openvino.Tensor(pages, openvino.Shape(shape), element)
        constant = openvino.op.Constant(tensor, shared_memory=True)
        constant.set_friendly_name(name)
        return constant


def _group(weight: TensorSlice, form: WeightFormat) -> int:
    """Input features that share a scale; -1 for all of a row, as 8-bit weights have it."""
    if form.precision == "int8":
        return -1
    size = int(form.block_size)
    while weight.shape[-1] % size and size > _LEAST_GROUP:
        size //= 2
    if weight.shape[-1] % size:
        raise UserError(
            f"{weight.name} has rows of {weight.shape[-1]}, which no blocks of {_LEAST_GROUP} or more make "
            f"up, where the recipe says int4 for {weight.role}: choose --set weights.{weight.role}=int8"
        )
    return size


def _packed(codes: np.ndarray, form: WeightFormat) -> np.ndarray:
    """Codes or zero points int8 or uint8 as they are stored: 4-bit ones in pairs, low half first."""
    codes = np.ascontiguousarray(codes).view(np.uint8).reshape(-1)
    if form.precision == "int8":
        return codes
    if codes.size % 2:
        codes = np.append(codes, np.uint8(0))
    return (codes[::2] & 15) | (codes[1::2] << np.uint8(4))
