"""What a checkpoint's tensor can do, whatever form it is stored in."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol, runtime_checkable

import ml_dtypes
import numpy as np

from qwen_export.quantize.blockwise import Quantization
from qwen_export.quantize.fp4 import Fp4


class Part(Protocol):
    """What lies in a checkpoint's shards."""

    @property
    def nbytes(self) -> int:
        """Bytes in the checkpoint."""

    @property
    def files(self) -> frozenset[Path]:
        """The shards that it is read from."""


class CheckpointTensor(Part, Protocol):
    """One tensor of the model, in the model's shape: what `Checkpoint.tensors` holds for each name."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` of axis 0, as floats. Safe to call from several threads.

        Raises:
            UserError: the rows hold NaN or Inf, or the file has become shorter.
        """


class Assembled:
    """What is put together from parts that are stored: a `Part`, once a subclass has `_parts`."""

    def _parts(self) -> Iterable[Part]:
        """Everything that is read for it."""
        raise NotImplementedError

    @cached_property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self._parts())

    @property
    def files(self) -> frozenset[Path]:
        return frozenset().union(*(part.files for part in self._parts()))


@dataclass(frozen=True)
class DerivedTensor(Assembled):
    """A tensor of the same shape as `source`, whose numbers are made of its: a `CheckpointTensor`, once a
    subclass has `read`."""

    source: CheckpointTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    def _parts(self) -> Iterable[Part]:
        return (self.source,)

    @property
    def forms(self) -> Counter[str]:
        return forms_of(self.source)


@dataclass(frozen=True)
class Scheme:
    """Integer codes that somebody else chose.

    Attributes:
        group_size: input features that share a scale and a zero point.
        symmetric: every zero point is the middle code, 8 or 128.
        bits: 4 or 8.
    """

    group_size: int
    symmetric: bool
    bits: int = 4


@runtime_checkable
class CodedTensor(Protocol):
    """A checkpoint's tensor that is stored, or has parts that are stored, as codes for numbers."""

    @property
    def forms(self) -> Counter[str]:
        """How, in words for a message, and how many parts each way; empty if all are floats."""


@runtime_checkable
class PrequantizedTensor(Protocol):
    """A checkpoint's tensor that is integer codes already, which an artifact can keep as they are."""

    @property
    def scheme(self) -> Scheme | None:
        """None if no kernel takes such codes."""

    def packed(self, start: int, stop: int, form: Quantization) -> list[np.ndarray]:
        """Rows `start` to `stop` of axis 0 as packed codes, scales and, unless `form` is symmetric, packed
        zero points.

        What stands for one row of the model's tensor lies along the last axis. The block size of `form`
        divides the group size; each scale is repeated for the blocks of its group.

        Raises:
            UserError: as `CheckpointTensor.read`, or a zero point that the form cannot hold.
        """


@runtime_checkable
class Fp4Tensor(Protocol):
    """A matrix [N, K] of 4-bit floats, which the CPU's QMoE takes as they are."""

    @property
    def fp4(self) -> Fp4 | None:
        """None if it is another."""

    def packed_fp4(self) -> tuple[np.ndarray, np.ndarray]:
        """Codes uint8 [N, K / 2], and scales [N, blocks] in the form's dtype.

        Raises:
            UserError: as `CheckpointTensor.read`.
        """

    def fp4_factor(self) -> float:
        """What all scales are multiplied by.

        Raises:
            UserError: as `CheckpointTensor.read`.
        """


@runtime_checkable
class Fp4Experts(Protocol):
    """The matrices [E, N, K] of all experts, in 4-bit floats of one form."""

    @property
    def fp4_experts(self) -> Fp4: ...

    def packed_fp4_experts(self, start: int, stop: int) -> list[np.ndarray]:
        """Of experts `start` to `stop` codes uint8 [E, N, K / 2], scales [E, N, blocks], factors float32 [E].

        Raises:
            UserError: as `CheckpointTensor.read`.
        """


def forms_of(tensor: CheckpointTensor) -> Counter[str]:
    """As `CodedTensor.forms`, of any tensor."""
    return tensor.forms if isinstance(tensor, CodedTensor) else Counter()


def common_scheme(tensors: Iterable[CheckpointTensor]) -> Scheme | None:
    """A scheme that fits all of them; None if they have different bits, or one is not prequantized.

    Larger groups may be cut into smaller ones, and a symmetric tensor has zero points, too.
    """
    schemes = [tensor.scheme if isinstance(tensor, PrequantizedTensor) else None for tensor in tensors]
    known = [scheme for scheme in schemes if scheme]
    if not known or len(known) < len(schemes) or len({scheme.bits for scheme in known}) > 1:
        return None
    group = math.gcd(*(scheme.group_size for scheme in known))
    return Scheme(group, all(scheme.symmetric for scheme in known), known[0].bits)


def float32(values: np.ndarray) -> np.ndarray:
    """What a tensor's `read` gives, in float32."""
    if values.dtype == ml_dtypes.bfloat16:  # its bits are float32's upper half: quicker than a cast
        return (values.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values.astype(np.float32, copy=False)
