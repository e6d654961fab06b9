"""The forms in which checkpoints keep a weight, each read as rows of the tensor that the model knows.

A float tensor is itself. FP8 weights are multiplied by their block scales as they are read. GPTQ and AWQ
weights are either dequantised as they are read or carried over: their own codes, zero points and scales, in
MatMulNBits' order. Experts that are stored one by one are read as one stack.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import ml_dtypes
import numpy as np
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from qwen_common.errors import UserError

from qwen_export.quantize.blockwise import Quantization, pack_codes

_FLOATS = (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32))
_FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
DTYPES = {
    "BF16": _FLOATS[0],
    "F16": _FLOATS[1],
    "F32": _FLOATS[2],
    "F8_E4M3": _FP8,
    "I32": np.dtype("<i4"),
}
_FP8_VALUES = np.arange(256, dtype=np.uint8).view(_FP8).astype(np.float32)
_BFLOAT16_EXPONENT = 0x7F80
_SCALE_INV = "_scale_inv"
_EXPERT = re.compile(r"(.+\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
# An expert's own projections, stacked along the output features, by the name of the stack of all experts.
_STACKS = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}
_CODES_IN_INT32 = 8
_LARGEST_CODE, _MIDDLE_CODE = 15, 8


@dataclass(frozen=True)
class Packing:
    """4-bit codes that somebody else chose.

    Attributes:
        group_size: input features that share a scale and a zero point.
        symmetric: every zero point is 8.
    """

    group_size: int
    symmetric: bool


class Source(Protocol):
    """Where one tensor of the model comes from: what `Checkpoint.tensors` holds for each name."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def nbytes(self) -> int:
        """Bytes in the checkpoint."""

    @property
    def files(self) -> frozenset[Path]:
        """The shards that it is read from."""

    @property
    def packing(self) -> Packing | None:
        """Set if `carry` can be used."""

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` of axis 0, as floats. Safe to call from several threads.

        Raises:
            UserError: the rows hold NaN or Inf, or the file has become shorter.
        """

    def carry(self, start: int, stop: int, form: Quantization) -> list[np.ndarray]:
        """The same rows as packed codes, scales and, unless `form` is symmetric, packed zero points.

        What stands for one row of the model's tensor lies along the last axis. The block size of `form`
        divides the group size; each scale is repeated for the blocks of its group.

        Raises:
            UserError: as `read`, or a zero point that the form cannot hold.
        """


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a shard as it is stored: `nbytes` from `offset` of `file`, row by row."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int
    packing: None = None

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    @property
    def files(self) -> frozenset[Path]:
        return frozenset({self.file})

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows in the stored dtype."""
        return self.columns(0, self.shape[1] if len(self.shape) > 1 else 1, start, stop)

    def columns(self, first: int, last: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Entries `first` to `last` of axis 1 of rows `start` to `stop`; reads nothing else."""
        stop = self.shape[0] if stop is None else stop
        count = self.shape[1] if len(self.shape) > 1 else 1
        row_bytes = self.nbytes // self.shape[0]
        entry = row_bytes // count
        part = np.empty((stop - start, (last - first) * entry), np.uint8)
        # Whole rows follow each other, so they are one run of bytes.
        runs = part.reshape(1, -1) if (first, last) == (0, count) else part
        with self.file.open("rb", buffering=0) as file:
            for line, run in enumerate(runs):
                file.seek(self.offset + (start + line) * row_bytes + first * entry)
                wanted = run.data
                while len(wanted) and (read := file.readinto(wanted)):
                    wanted = wanted[read:]
                if len(wanted):
                    raise UserError(
                        f"shard {self.file.name} ends inside tensor {self.name}: download it again"
                    )
        rest = (last - first, *self.shape[2:]) if len(self.shape) > 1 else ()
        values = part.reshape(-1).view(self.dtype).reshape(stop - start, *rest)
        if self.dtype in _FLOATS and not _all_finite(values):
            raise UserError(
                f"tensor {self.name} in {self.file.name} holds NaN or Inf: download the checkpoint again"
            )
        return values

    def carry(self, start: int, stop: int, form: Quantization) -> list[np.ndarray]:
        raise AssertionError("a float tensor has no codes")


@dataclass(frozen=True)
class BlockScaled:
    """FP8: float8_e4m3fn [N, K], and one factor for each block of `block` rows and columns.

    Source: transformers' finegrained_fp8; the published Qwen3.5-*-FP8 checkpoints.
    """

    weight: TensorInfo
    scale_inv: TensorInfo
    block: tuple[int, int]
    packing: None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + self.scale_inv.nbytes

    @property
    def files(self) -> frozenset[Path]:
        return self.weight.files | self.scale_inv.files

    def read(self, start: int, stop: int) -> np.ndarray:
        """float32 rows: the product of an FP8 value and a bfloat16 factor is exact."""
        height, width = self.block
        values = _FP8_VALUES[self.weight.read(start, stop).view(np.uint8)]
        if not np.isfinite(values).all():
            raise UserError(f"tensor {self.weight.name} holds NaN: download the checkpoint again")
        scales = self.scale_inv.read(start // height, -(-stop // height)).astype(np.float32)
        scales = scales[np.arange(start, stop) // height - start // height]
        values *= np.repeat(scales, width, axis=1)[:, : values.shape[1]]
        return values

    def carry(self, start: int, stop: int, form: Quantization) -> list[np.ndarray]:
        raise AssertionError("FP8 has no codes")


@dataclass(frozen=True)
class _Layout:
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


# AutoGPTQ stores zero points less one; GPTQModel's second version of the format does not. AWQ interleaves
# for its GEMM kernel. Sources: GPTQModel's and AutoAWQ's pack(), vLLM's gptq and awq kernels.
_LAYOUTS = {
    "gptq": _Layout(along_inputs=True, places=tuple(range(8)), zero_offset=1),
    "gptq_v2": _Layout(along_inputs=True, places=tuple(range(8)), zero_offset=0),
    "gemm": _Layout(along_inputs=False, places=(0, 4, 1, 5, 2, 6, 3, 7), zero_offset=0),
}


@dataclass(frozen=True)
class Packed:
    """GPTQ or AWQ: w = (code - zero point) * scale, for groups of input features."""

    qweight: TensorInfo
    qzeros: TensorInfo
    scales: TensorInfo
    layout: _Layout
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
    def packing(self) -> Packing:
        return Packing(self.shape[1] // self.scales.shape[0], self.symmetric)

    def read(self, start: int, stop: int) -> np.ndarray:
        codes, zeros, scales = self._parts(start, stop)
        group = self.packing.group_size
        values = codes.astype(np.float32).reshape(len(codes), -1, group) - zeros.astype(np.float32)[..., None]
        values *= scales.astype(np.float32)[..., None]
        return values.reshape(codes.shape)

    def carry(self, start: int, stop: int, form: Quantization) -> list[np.ndarray]:
        codes, zeros, scales = self._parts(start, stop)
        wrong = zeros != _MIDDLE_CODE if self.symmetric else zeros > _LARGEST_CODE
        if wrong.any():
            found = zeros[wrong][0]
            reason = "config.json says sym" if self.symmetric else "4 bits do not hold that"
            raise UserError(
                f"{self.qzeros.name} has the zero point {found}, but {reason}: "
                "give the unquantised checkpoint, or one in the format gptq_v2"
            )
        repeats = self.packing.group_size // form.block_size
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

    def _outputs(self, tensor: TensorInfo, start: int, stop: int) -> np.ndarray:
        """Columns `start` to `stop` of a tensor that holds 8 outputs in an int32: uint8 [rows, n]."""
        first = start // _CODES_IN_INT32
        words = tensor.columns(first, -(-stop // _CODES_IN_INT32))
        columns = _places(words)[..., self.layout.places].reshape(len(words), -1)
        return columns[:, start - first * _CODES_IN_INT32 : stop - first * _CODES_IN_INT32]


@dataclass(frozen=True)
class Experts:
    """All experts' weights as one [E, N, K], from tensors of their own.

    Attributes:
        experts: for each expert, what is stacked along its output features.
    """

    experts: tuple[tuple[Source, ...], ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        first = self.experts[0]
        return len(self.experts), sum(part.shape[0] for part in first), first[0].shape[1]

    @cached_property
    def nbytes(self) -> int:
        return sum(part.nbytes for expert in self.experts for part in expert)

    @property
    def files(self) -> frozenset[Path]:
        return frozenset().union(*(part.files for expert in self.experts for part in expert))

    @cached_property
    def packing(self) -> Packing | None:
        return common_packing([part for expert in self.experts for part in expert])

    def read(self, start: int, stop: int) -> np.ndarray:
        return np.stack(
            [
                np.concatenate([part.read(0, part.shape[0]) for part in expert])
                for expert in self.experts[start:stop]
            ]
        )

    def carry(self, start: int, stop: int, form: Quantization) -> list[np.ndarray]:
        stacks = []
        for expert in self.experts[start:stop]:
            parts = [part.carry(0, part.shape[0], form) for part in expert]
            stacks.append([np.concatenate(arrays) for arrays in zip(*parts, strict=True)])
        return [np.stack(arrays) for arrays in zip(*stacks, strict=True)]


def common_packing(sources: Sequence[Source]) -> Packing | None:
    """The packing that all of them have; None if there is a difference, or one is not packed."""
    packings = {source.packing for source in sources}
    return packings.pop() if len(packings) == 1 else None


class _Method(BaseModel):
    """`quantization_config` of config.json, as far as it says how tensors are stored."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class _Fp8(_Method):
    quant_method: Literal["fp8"]
    fmt: Literal["e4m3"] = "e4m3"
    weight_block_size: tuple[int, int]


class _Gptq(_Method):
    quant_method: Literal["gptq"]
    bits: Literal[4]
    sym: bool = True
    version: Literal["gptq", "gptq_v2"] = Field("gptq", validation_alias="checkpoint_format")


class _Awq(_Method):
    quant_method: Literal["awq"]
    bits: Literal[4]
    sym: bool = False
    version: Literal["gemm"] = Field("gemm", validation_alias=AliasChoices("version", "checkpoint_format"))


_METHODS: TypeAdapter[_Fp8 | _Gptq | _Awq] = TypeAdapter(
    Annotated[_Fp8 | _Gptq | _Awq, Field(discriminator="quant_method")]
)


def assemble(stored: Mapping[str, TensorInfo], quantization_config: Any) -> dict[str, Source]:
    """The model's tensors by name, from those of the shards.

    Args:
        quantization_config: that of config.json; None if there is none.

    Raises:
        UserError: a method that is not supported, a tensor that misses its scales, shapes that do not belong
            together, or groups that are not in the order of the input features.
    """
    method = _method(quantization_config)
    rest = dict(stored)
    made: dict[str, Source] = {}
    if isinstance(method, _Fp8):
        for name in [name for name in stored if name.endswith(_SCALE_INV)]:
            weight = name.removesuffix(_SCALE_INV)
            made[weight] = _block_scaled(_take(rest, weight, name), rest.pop(name), method.weight_block_size)
    elif method:
        for name in [name for name in stored if name.endswith(".qweight")]:
            module = name.removesuffix("qweight")
            qweight = rest.pop(name)
            qzeros, scales = (_take(rest, module + part, name) for part in ("qzeros", "scales"))
            packed = Packed(qweight, qzeros, scales, _LAYOUTS[method.version], method.sym)
            _check_packed(packed, rest.pop(module + "g_idx", None))
            made[module + "weight"] = packed
    for name, info in rest.items():
        if info.dtype not in _FLOATS:
            declared = method.quant_method if method else "no quantization_config"
            raise UserError(
                f"tensor {name} is {info.dtype} without its scales, and config.json says {declared}: "
                "is a shard missing, or config.json of another checkpoint?"
            )
    return _stack_experts({**rest, **made})


def _method(quantization_config: Any) -> _Fp8 | _Gptq | _Awq | None:
    if quantization_config is None:
        return None
    try:
        return _METHODS.validate_python(quantization_config)
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


def _take(rest: dict[str, TensorInfo], name: str, companion: str) -> TensorInfo:
    if name not in rest:
        raise UserError(f"the checkpoint has {companion}, but no {name}: is a shard missing?")
    return rest.pop(name)


def _block_scaled(weight: TensorInfo, scale_inv: TensorInfo, block: tuple[int, int]) -> BlockScaled:
    expected = tuple(-(-size // step) for size, step in zip(weight.shape, block, strict=False))
    if weight.dtype != _FP8 or len(weight.shape) != 2 or scale_inv.shape != expected:
        raise UserError(
            f"tensor {scale_inv.name} has shape {scale_inv.shape}, which are no scales for {block[0]} x "
            f"{block[1]} blocks of {weight.name} ({weight.dtype} {weight.shape}): download both again"
        )
    return BlockScaled(weight, scale_inv, block)


def _check_packed(packed: Packed, g_idx: TensorInfo | None) -> None:
    shapes = packed.qweight.shape, packed.qzeros.shape, packed.scales.shape
    groups = packed.scales.shape[0]
    fits = all(len(shape) == 2 for shape in shapes)
    if fits:
        n, k = packed.shape
        fits = packed.scales.shape[1] == n and k % groups == 0
        fits = fits and packed.qzeros.shape == (groups, n // _CODES_IN_INT32)
        fits = fits and n % _CODES_IN_INT32 == 0
    if not fits:
        raise UserError(
            f"{packed.qweight.name} has codes, zero points and scales of the shapes {shapes}, which do not "
            "belong together: download the checkpoint again"
        )
    if g_idx is None:
        return
    in_order = np.arange(k, dtype=np.int32) // packed.packing.group_size
    if g_idx.shape != (k,) or not np.array_equal(g_idx.read(0, k), in_order):
        raise UserError(
            f"{g_idx.name} is not in order: the checkpoint was quantised with desc_act, which no kernel here "
            "takes; give one made with desc_act=false, or the unquantised one"
        )


def _stack_experts(sources: dict[str, Source]) -> dict[str, Source]:
    """Experts' tensors of their own (`experts.7.up_proj.weight`) put under the names of the stacks."""
    alone: dict[str, dict[tuple[int, str], Source]] = {}
    for name in list(sources):
        if match := _EXPERT.fullmatch(name):
            prefix, expert, kind = match.groups()
            alone.setdefault(prefix, {})[int(expert), kind] = sources.pop(name)
    for prefix, parts in alone.items():
        count = 1 + max(expert for expert, _ in parts)
        for stack, kinds in _STACKS.items():
            for expert, kind in ((expert, kind) for expert in range(count) for kind in kinds):
                name = f"{prefix}.{expert}.{kind}_proj.weight"
                if (expert, kind) not in parts:
                    raise UserError(f"the checkpoint has no tensor {name}: is a shard missing?")
                found, wanted = parts[expert, kind].shape, parts[0, kind].shape
                if found != wanted or len(found) != 2:
                    raise UserError(f"tensor {name} has shape {found}, unlike other experts' {wanted}")
            sources[f"{prefix}.{stack}"] = Experts(
                tuple(tuple(parts[expert, kind] for kind in kinds) for expert in range(count))
            )
    return sources


def _places(words: np.ndarray) -> np.ndarray:
    """int32 [a, b] -> uint8 [a, b, 8], the 4-bit codes from the lowest."""
    octets = np.ascontiguousarray(words).view(np.uint8).reshape(*words.shape, 4)
    return np.stack([octets & 15, octets >> 4], axis=-1).reshape(*words.shape, _CODES_IN_INT32)


def _all_finite(values: np.ndarray) -> bool:
    if values.dtype == ml_dtypes.bfloat16:  # integer tests are many times quicker than ml_dtypes' isfinite
        exponent = values.view(np.uint16) & np.uint16(_BFLOAT16_EXPONENT)
        return bool((exponent != _BFLOAT16_EXPONENT).all())
    return bool(np.isfinite(values).all())
