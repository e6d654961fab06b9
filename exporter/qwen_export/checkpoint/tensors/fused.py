"""Tensors of the model whose rows a checkpoint stores in another tensor, among others' rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from qwen_common.errors import UserError

from qwen_export.architecture.tensors import Fused
from qwen_export.checkpoint.tensors.tensor import CheckpointTensor, PrequantizedTensor, Scheme, forms_of
from qwen_export.quantize.blockwise import Quantization


@dataclass(frozen=True)
class RowRuns:
    """A `CheckpointTensor` of some rows of another.

    Attributes:
        source: whose rows they are.
        runs: which, in this tensor's order.
    """

    source: CheckpointTensor
    runs: tuple[range, ...]

    @cached_property
    def shape(self) -> tuple[int, ...]:
        return sum(map(len, self.runs)), *self.source.shape[1:]

    @property
    def nbytes(self) -> int:
        return self.source.nbytes * self.shape[0] // self.source.shape[0]

    @property
    def files(self) -> frozenset[Path]:
        return self.source.files

    @property
    def forms(self) -> Counter[str]:
        return forms_of(self.source)

    def read(self, start: int, stop: int) -> np.ndarray:
        return np.concatenate([self.source.read(part.start, part.stop) for part in self._parts(start, stop)])

    def _parts(self, start: int, stop: int) -> Iterable[range]:
        """Rows of `source` that rows `start` to `stop` are."""
        first = 0
        for run in self.runs:
            if part := run[max(start - first, 0) : max(stop - first, 0)]:
                yield part
            first += len(run)


@dataclass(frozen=True)
class PrequantizedRowRuns(RowRuns):
    """The same of integer codes; a `PrequantizedTensor`."""

    scheme: Scheme

    def packed(self, start: int, stop: int, form: Quantization) -> list[np.ndarray]:
        assert isinstance(self.source, PrequantizedTensor)
        parts = [self.source.packed(part.start, part.stop, form) for part in self._parts(start, stop)]
        return [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]


def split_fused(
    tensors: Mapping[str, CheckpointTensor], fused: Iterable[Fused]
) -> dict[str, CheckpointTensor]:
    """Each tensor of `fused` put under the names of those that it consists of.

    Raises:
        UserError: one has another number of rows than config.json says.
    """
    found = dict(tensors)
    for form in fused:
        for name in [name for name in tensors if name.endswith(f".{form.name}")]:
            source = found.pop(name)
            if source.shape[0] != form.rows:
                raise UserError(
                    f"tensor {name} has shape {source.shape} where config.json says {form.rows} rows: "
                    "config and weights are not of the same model"
                )
            scheme = source.scheme if isinstance(source, PrequantizedTensor) else None
            for part, runs in form.split().items():
                found[name.removesuffix(form.name) + part] = (
                    PrequantizedRowRuns(source, runs, scheme) if scheme else RowRuns(source, runs)
                )
    return found


def join_fused(
    tensors: Mapping[str, CheckpointTensor], fused: Iterable[Fused]
) -> dict[str, CheckpointTensor]:
    """What `split_fused` was given: for changes of the tensors as the checkpoint has them."""
    found = dict(tensors)
    for form in fused:
        for part in form.split():
            for name in [name for name in found if name.endswith(f".{part}")]:
                tensor = found[name]
                if isinstance(tensor, RowRuns):
                    found[name.removesuffix(part) + form.name] = tensor.source
                    del found[name]
    return found
