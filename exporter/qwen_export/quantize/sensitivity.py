"""How much each part of a model suffers from INT4: the KL divergence that its weights alone cause.

Every part, one role in one layer, is quantised alone, and the hidden states that come out of its layer are
taken through all later layers beside the exact ones. So every weight is read a few times, and memory holds
the hidden states of one short text for each part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qwen_export import reference
from qwen_export.architecture.models.qwen3_5 import TextConfig
from qwen_export.checkpoint.tensor import CheckpointTensor, float32
from qwen_export.quantize.blockwise import Quantization, dequantize, quantize
from qwen_export.reference import Weights, log_softmax

_TOGETHER = 16  # parts that go through a layer at once
_SAMPLED_ROWS = 256  # of each tensor, to compare precisions


@dataclass(frozen=True, order=True)
class LayerRole:
    """One role in one layer; `layer` is -1 for what belongs to none."""

    layer: int
    role: str


@dataclass(frozen=True)
class _Requantised:
    """A tensor as it will be once it is stored and read back; a `CheckpointTensor`."""

    source: CheckpointTensor
    form: Quantization

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def nbytes(self) -> int:
        return self.source.nbytes

    @property
    def files(self) -> frozenset[Path]:
        return self.source.files

    def read(self, start: int, stop: int) -> np.ndarray:
        rows = self.source.read(start, stop)
        matrix = rows.reshape(-1, rows.shape[-1])
        return dequantize(quantize(matrix, self.form), matrix.shape[1], self.form).reshape(rows.shape)


def steps(config: TextConfig, parts: Sequence[LayerRole]) -> int:
    """How often `divergences` will call `advance`."""
    return config.num_hidden_layers + len(parts)


def divergences(
    config: TextConfig,
    tensors: Mapping[str, CheckpointTensor],
    parts: Mapping[LayerRole, Mapping[str, Quantization]],
    ids: np.ndarray,
    advance: Callable[[], None],
) -> dict[LayerRole, float]:
    """KL divergence in nats, mean over the positions of `ids` int64 [tokens], that each part causes alone.

    Args:
        parts: the form of each of a part's tensors.
        advance: called after each of `steps`.
    """
    exact = Weights(tensors)
    sets = {
        part: Weights(
            {**tensors, **{name: _Requantised(tensors[name], form) for name, form in forms.items()}}
        )
        for part, forms in parts.items()
    }
    hidden = reference.embed(config, exact, ids[None])
    streams = {part: reference.embed(config, sets[part], ids[None]) for part in parts if part.layer < 0}
    for index in range(config.num_hidden_layers):
        for start in range(0, len(streams), _TOGETHER):
            together = list(streams)[start : start + _TOGETHER]
            moved = reference.layer(
                config, exact, index, np.concatenate([streams[part] for part in together])
            )
            streams |= {part: moved[place : place + 1] for place, part in enumerate(together)}
        for part in parts:
            if part.layer == index:
                streams[part] = reference.layer(config, sets[part], index, hidden)
        hidden = reference.layer(config, exact, index, hidden)
        advance()
    expected = log_softmax(reference.logits(config, exact, hidden[0]))
    found = {}
    for part, stream in streams.items():
        weights = sets[part] if part.layer < 0 else exact
        logits = log_softmax(reference.logits(config, weights, stream[0]))
        found[part] = float((np.exp(expected) * (expected - logits)).sum(-1).mean())
        advance()
    return found


def weight_errors(
    tensors: Mapping[str, CheckpointTensor], forms: Mapping[str, Sequence[Quantization | None]]
) -> Iterator[tuple[str, list[float]]]:
    """(tensor, squared error over squared norm in each of its forms), on some rows; None stores exactly."""
    for name, choices in forms.items():
        source = tensors[name]
        rows = float32(source.read(0, min(_SAMPLED_ROWS if len(source.shape) == 2 else 1, source.shape[0])))
        matrix = rows.reshape(-1, rows.shape[-1])[:_SAMPLED_ROWS]
        norm = float(np.square(matrix).sum()) or 1.0
        yield name, [_squared_error(matrix, form) / norm if form else 0.0 for form in choices]


def _squared_error(matrix: np.ndarray, form: Quantization) -> float:
    return float(np.square(dequantize(quantize(matrix, form), matrix.shape[1], form) - matrix).sum())
