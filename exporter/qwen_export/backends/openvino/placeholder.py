"""Placeholders of the weights that a model is traced with: they have a shape and an address, and no memory.

All of them are views of one block of zeros, which is hardly written, so that the system does not back it
with memory; each begins a little later than the one before, so that its address says which weight it stands
for. PyTorch's tracing and OpenVINO's constants share a tensor's memory, hence the address is found again in
the IR, and `fill` puts the real weight there. Each begins with a number of its own, too: OpenVINO makes one
operation of two that have the same input and equal weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from qwen_common.errors import UserError
from qwen_profiles.schema import Role

from qwen_export.checkpoint.tensors.tensor import CheckpointTensor

if TYPE_CHECKING:
    from torch import Tensor

_STEP = 64  # bytes between two weights' addresses: vector loads want that alignment
_FIRST_NUMBER = 0x3000  # 16 bits; from here on a small number in bfloat16, float16, and twice as float32


@dataclass(frozen=True)
class TensorSlice:
    """Of a checkpoint's tensor [N, K] or [E, N, K], the output features `first` to `last`.

    Attributes:
        name: the tensor's, in the checkpoint.
        tensor: of whose rows, or of whose experts' rows, those are taken.
    """

    name: str
    role: Role
    tensor: CheckpointTensor
    first: int
    last: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.tensor.shape[:-2], self.last - self.first, self.tensor.shape[-1])

    def rows(self, elements: int) -> Iterator[np.ndarray]:
        """float32 [rows, K], in order, about `elements` at a time, or one expert."""
        *experts, _, width = self.tensor.shape
        stacked = bool(experts)
        end = self.tensor.shape[0] if stacked else self.last
        size = self.tensor.shape[1] * width if stacked else width
        step = max(1, elements // size)
        for start in range(0 if stacked else self.first, end, step):
            values = self.tensor.read(start, min(start + step, end))
            if stacked:
                values = values[:, self.first : self.last]
            yield values.astype(np.float32).reshape(-1, width)


class Placeholders:
    """The placeholders of one model, by address.

    Args:
        largest: elements of the largest weight.
        count: how many weights there are at most.
    """

    def __init__(self, largest: int, count: int) -> None:
        # np.zeros asks the system for pages that it knows to be 0, and touches none.
        self._block = np.zeros(4 * largest + _STEP * (count + 1), np.uint8)
        self._at = -self._block.ctypes.data % _STEP
        self._slices: dict[int, TensorSlice] = {}
        self._found: set[int] = set()

    def plain(self, shape: tuple[int, ...], dtype: Any) -> Tensor:
        """Zeros that no weight will take the place of."""
        import torch

        count = int(np.prod(shape, dtype=np.int64))
        return torch.frombuffer(self._block.data, dtype=dtype, count=count, offset=self._at).view(shape)

    def tensor(self, stands_for: TensorSlice, dtype: Any) -> Tensor:
        """Zeros that stand for a weight."""
        tensor = self.plain(stands_for.shape, dtype)
        self._block[self._at : self._at + 4].view(np.uint16)[:] = _FIRST_NUMBER + len(self._slices)
        self._slices[tensor.data_ptr()] = stands_for
        self._at += _STEP
        return tensor

    def find(self, address: int) -> TensorSlice | None:
        """The weight that the constant at `address` stands for, if for one."""
        found = self._slices.get(address)
        if found:
            self._found.add(address)
        return found

    def check(self) -> None:
        """Raise a UserError if a weight was not found in any model, where zeros would stand for it."""
        if missing := [found.name for at, found in self._slices.items() if at not in self._found]:
            raise UserError(
                f"{len(missing)} weights of the checkpoint are not in the IR that was traced, {missing[0]} "
                "among them: optimum-intel or OpenVINO is of another version than this was made for, install "
                "them with pip install 'qwen-edge[export,openvino]'"
            )
