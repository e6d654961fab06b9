"""Experts that a checkpoint stores one by one, read as one stack of all."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from qwen_common.errors import UserError

from qwen_export.checkpoint.tensors.tensor import CheckpointTensor, PrequantizedTensor, Scheme, common_scheme
from qwen_export.quantize.blockwise import Quantization

_EXPERT = re.compile(r"(.+\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
# An expert's own projections, stacked along the output features, by the name of the stack of all experts.
_STACKS = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}


@dataclass(frozen=True)
class StackedExperts:
    """All experts' weights as one [E, N, K], from tensors of their own.

    Attributes:
        experts: for each expert, what is stacked along its output features.
    """

    experts: tuple[tuple[CheckpointTensor, ...], ...]

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

    def read(self, start: int, stop: int) -> np.ndarray:
        return np.stack(
            [
                np.concatenate([part.read(0, part.shape[0]) for part in expert])
                for expert in self.experts[start:stop]
            ]
        )


@dataclass(frozen=True)
class PrequantizedExperts(StackedExperts):
    """The same of integer codes in one scheme; a `PrequantizedTensor`."""

    scheme: Scheme

    def packed(self, start: int, stop: int, form: Quantization) -> list[np.ndarray]:
        stacks = []
        for expert in self.experts[start:stop]:
            parts = [
                part.packed(0, part.shape[0], form) for part in expert if isinstance(part, PrequantizedTensor)
            ]
            stacks.append([np.concatenate(arrays) for arrays in zip(*parts, strict=True)])
        return [np.stack(arrays) for arrays in zip(*stacks, strict=True)]


def stack_experts(tensors: Mapping[str, CheckpointTensor]) -> dict[str, CheckpointTensor]:
    """Experts' tensors of their own (`experts.7.up_proj.weight`) put under the names of the stacks.

    Raises:
        UserError: one is missing, or has another shape than its like.
    """
    stacked = dict(tensors)
    alone: dict[str, dict[tuple[int, str], CheckpointTensor]] = {}
    for name in tensors:
        if match := _EXPERT.fullmatch(name):
            prefix, expert, kind = match.groups()
            alone.setdefault(prefix, {})[int(expert), kind] = stacked.pop(name)
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
            experts = tuple(tuple(parts[expert, kind] for kind in kinds) for expert in range(count))
            scheme = common_scheme(part for expert in experts for part in expert)
            stacked[f"{prefix}.{stack}"] = (
                PrequantizedExperts(experts, scheme) if scheme else StackedExperts(experts)
            )
    return stacked
