"""A tensor that lies in a file as it is: bf16, fp16 or fp32, or what the other forms are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np
from qwen_common.errors import UserError

FLOATS = (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32))
_BFLOAT16_EXPONENT = 0x7F80


def _open(path: Path) -> BinaryIO:
    return path.open("rb", buffering=0)


@dataclass(frozen=True)
class PlainTensor:
    """`nbytes` from `offset` of `file`, row by row; a `CheckpointTensor` if its dtype is one of `FLOATS`.

    Attributes:
        opened: opens `file`, which may have to be fetched first.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int
    opened: Callable[[Path], BinaryIO] = field(default=_open, repr=False, compare=False)

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    @property
    def files(self) -> frozenset[Path]:
        return frozenset({self.file})

    def reshaped(self, shape: tuple[int, ...]) -> PlainTensor | None:
        """The same numbers in another shape, axes of 1 aside; None if `shape` is another."""
        here, there = ([size for size in sizes if size != 1] for sizes in (self.shape, shape))
        return replace(self, shape=shape) if here == there else None

    def entry(self, index: int) -> PlainTensor:
        """Entry `index` of axis 0."""
        size = self.nbytes // self.shape[0]
        return replace(self, shape=self.shape[1:], offset=self.offset + index * size)

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
        with self.opened(self.file) as file:
            for line, run in enumerate(runs):
                file.seek(self.offset + (start + line) * row_bytes + first * entry)
                wanted = run.data
                while len(wanted) and (read := file.readinto(wanted)):  # type: ignore[attr-defined]
                    wanted = wanted[read:]
                if len(wanted):
                    raise UserError(
                        f"shard {self.file.name} ends inside tensor {self.name}: download it again"
                    )
        rest = (last - first, *self.shape[2:]) if len(self.shape) > 1 else ()
        values = part.reshape(-1).view(self.dtype).reshape(stop - start, *rest)
        if self.dtype in FLOATS and not _all_finite(values):
            raise UserError(
                f"tensor {self.name} in {self.file.name} holds NaN or Inf: download the checkpoint again"
            )
        return values


def _all_finite(values: np.ndarray) -> bool:
    if values.dtype == ml_dtypes.bfloat16:  # integer tests are many times quicker than ml_dtypes' isfinite
        exponent = values.view(np.uint16) & np.uint16(_BFLOAT16_EXPONENT)
        return bool((exponent != _BFLOAT16_EXPONENT).all())
    return bool(np.isfinite(values).all())


def pieces(stored: Mapping[str, PlainTensor], part: str) -> list[str]:
    """What comes before `part`, dot included, in the names that end with it."""
    return [name.removesuffix(part) for name in stored if name.endswith("." + part)]


def take(stored: dict[str, PlainTensor], name: str, companion: str) -> PlainTensor:
    """Take the tensor `name` out of `stored`, where `companion` was found.

    Raises:
        UserError: there is no such tensor.
    """
    if name not in stored:
        raise UserError(f"the checkpoint has {companion}, but no {name}: is a shard missing?")
    return stored.pop(name)
