"""What a model's matrices are multiplied with on a text."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from qwen_export.checkpoint.tensors.tensor import CheckpointTensor
from qwen_export.reference import Weights


class Inputs(Weights):
    """Weights that keep what comes in to some of them.

    Attributes:
        found: float32 [..., K], by tensor and by expert (None: the tensor is not of experts). Tensors that
            are given the same array have the same here.
    """

    def __init__(self, tensors: Mapping[str, CheckpointTensor], kept: Collection[str]) -> None:
        super().__init__(tensors)
        self._kept = kept
        self.found: dict[str, dict[int | None, np.ndarray]] = {}

    def linear(self, name: str, x: np.ndarray, expert: int | None = None) -> np.ndarray:
        self.keep(name, x, expert)
        return super().linear(name, x, expert)

    def keep(self, name: str, x: np.ndarray, expert: int | None = None) -> None:
        if name in self._kept:
            self.found.setdefault(name, {})[expert] = x
