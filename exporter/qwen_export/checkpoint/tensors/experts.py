"""Experts that a checkpoint stores one by one, read as one stack of all."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from qwen_common.errors import UserError

from qwen_export.checkpoint.tensors.tensor import (
    Assembled,
    CheckpointTensor,
    Fp4Tensor,
    Part,
    PrequantizedTensor,
    Scheme,
    common_scheme,
    forms_of,
)
from qwen_export.quantize.blockwise import Quantization
from qwen_export.quantize.fp4 import Fp4

_EXPERT = re.compile(r"(.+\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
# An expert's own projections, stacked along the output features, by the name of the stack of all experts.
_STACKS = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}


@dataclass(frozen=True)
class StackedExperts(Assembled):
    """All experts' weights as one [E, N, K], from tensors of their own.

    Attributes:
        experts: for each expert, what is stacked along its output features.
    """

    experts: tuple[tuple[CheckpointTensor, ...], ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        first = self.experts[0]
        return len(self.experts), sum(part.shape[0] for part in first), first[0].shape[1]

    def _parts(self) -> Iterable[Part]:
        return (part for expert in self.experts for part in expert)

    @property
    def forms(self) -> Counter[str]:
        return sum((forms_of(part) for expert in self.experts for part in expert), Counter())

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


@dataclass(frozen=True)
class StackedFp4Experts(StackedExperts):
    """The same of 4-bit floats in one form; `Fp4Experts`.

    Attributes:
        inputs: of the down projections, each expert's gate and up projections; () of others.
    """

    fp4_experts: Fp4
    inputs: tuple[tuple[CheckpointTensor, ...], ...] = ()

    @property
    def files(self) -> frozenset[Path]:
        return super().files.union(*(part.files for expert in self.inputs for part in expert))

    def packed_fp4_experts(self, start: int, stop: int) -> list[np.ndarray]:
        """See `Fp4Experts`."""
        stacks = []
        for expert in self.experts[start:stop]:
            parts = [part.packed_fp4() for part in expert if isinstance(part, Fp4Tensor)]
            stacks.append([np.concatenate(arrays) for arrays in zip(*parts, strict=True)])
        factors = np.array([self._factor(expert) for expert in range(start, stop)])
        with np.errstate(over="ignore"):  # reported below
            stored = factors.astype(np.float32)
        if not np.isfinite(stored).all():
            raise UserError(
                f"an expert's scales reach {np.abs(factors).max():.3g}, more than float32 holds: "
                "download the checkpoint again"
            )
        return [*(np.stack(arrays) for arrays in zip(*stacks, strict=True)), stored]

    def _factor(self, expert: int) -> float:
        """QMoE has one for gate and up, which is the gate's. By how much the up projection's differs the
        down projection's is multiplied, which gives the same: down(silu(gate) * up) is linear in up."""
        own, *_ = (part.fp4_factor() for part in self.experts[expert] if isinstance(part, Fp4Tensor))
        if not self.inputs:
            return own
        gate, up = (part.fp4_factor() for part in self.inputs[expert] if isinstance(part, Fp4Tensor))
        return own * up / gate if gate else own


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
        for expert, kind in ((expert, kind) for expert in range(count) for kind in ("gate", "up", "down")):
            name = f"{prefix}.{expert}.{kind}_proj.weight"
            if (expert, kind) not in parts:
                raise UserError(f"the checkpoint has no tensor {name}: is a shard missing?")
            found, wanted = parts[expert, kind].shape, parts[0, kind].shape
            if found != wanted or len(found) != 2:
                raise UserError(f"tensor {name} has shape {found}, unlike other experts' {wanted}")
        stacks = {
            stack: tuple(tuple(parts[expert, kind] for kind in kinds) for expert in range(count))
            for stack, kinds in _STACKS.items()
        }
        fp4 = _common_fp4(parts.values())
        for stack, experts in stacks.items():
            scheme = common_scheme(part for expert in experts for part in expert)
            if fp4:
                inputs = stacks["gate_up_proj"] if stack == "down_proj" else ()
                made: StackedExperts = StackedFp4Experts(experts, fp4, inputs)
            else:
                made = PrequantizedExperts(experts, scheme) if scheme else StackedExperts(experts)
            stacked[f"{prefix}.{stack}"] = made
    return stacked


def _common_fp4(tensors: Iterable[CheckpointTensor]) -> Fp4 | None:
    """The form of all of them, where they have one."""
    forms = {tensor.fp4 if isinstance(tensor, Fp4Tensor) else None for tensor in tensors}
    return forms.pop() if len(forms) == 1 else None
