"""How much each part of a model suffers from fewer bits, measured on calibration text.

Every part, one role in one layer, is quantised alone, and the hidden states that come out of its layer are
taken through all later layers beside the exact ones. So every weight is read a few times, and memory holds
the hidden states of one short text for each part.

Forms of the same bits are told apart by the error of the part's own outputs: on the inputs that its matrices
are given there, so that an error counts as much as what it is multiplied by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from qwen_export import reference
from qwen_export.architecture.models.qwen3_5 import TextConfig
from qwen_export.architecture.tensors import layer_of
from qwen_export.checkpoint.tensors.tensor import CheckpointTensor, DerivedTensor, float32
from qwen_export.quantize.blockwise import Quantization, dequantize, quantize
from qwen_export.quantize.chunked_delta_rule import chunked_delta_rule
from qwen_export.quantize.inputs import Inputs
from qwen_export.reference import Weights, log_softmax

_TOGETHER = 16  # parts that go through a layer at once
_SAMPLED_ROWS = 256  # of each tensor, to compare forms
_RUNS = 4  # that those rows are read in, from everywhere in the tensor
_SAMPLED_EXPERTS = 4  # of each layer

_layer = partial(reference.layer, recurrence=chunked_delta_rule)


@dataclass(frozen=True, order=True)
class LayerRole:
    """One role in one layer; `layer` is -1 for what belongs to none."""

    layer: int
    role: str


@dataclass(frozen=True)
class _Requantised(DerivedTensor):
    """A tensor as it will be once it is stored and read back; a `CheckpointTensor`."""

    form: Quantization

    def read(self, start: int, stop: int) -> np.ndarray:
        rows = self.source.read(start, stop)
        matrix = rows.reshape(-1, rows.shape[-1])
        return dequantize(quantize(matrix, self.form), matrix.shape[1], self.form).reshape(rows.shape)


def divergence_steps(config: TextConfig, parts: Sequence[LayerRole]) -> int:
    """How often `divergences` will call `advance`."""
    return config.num_hidden_layers + len(parts)


def divergences(
    config: TextConfig,
    tensors: Mapping[str, CheckpointTensor],
    parts: Mapping[LayerRole, Mapping[str, Quantization]],
    ids: np.ndarray,
    advance: Callable[[], None],
) -> dict[LayerRole, float]:
    """KL divergence in nats, mean over the positions of `ids` int64 [samples, tokens], that each part causes
    alone.

    Args:
        parts: the form of each of a part's tensors.
        advance: called after each of `divergence_steps`.
    """
    exact = Weights(tensors)
    sets = {
        part: Weights(
            {**tensors, **{name: _Requantised(tensors[name], form) for name, form in forms.items()}}
        )
        for part, forms in parts.items()
    }
    hidden = reference.embed(config, exact, ids)
    streams = {part: reference.embed(config, sets[part], ids) for part in parts if part.layer < 0}
    for index in range(config.num_hidden_layers):
        for start in range(0, len(streams), _TOGETHER):
            together = list(streams)[start : start + _TOGETHER]
            before = np.concatenate([streams[part] for part in together])
            moved = _layer(config, exact, index, before)
            streams |= dict(zip(together, np.split(moved, len(together)), strict=True))
        for part in parts:
            if part.layer == index:
                streams[part] = _layer(config, sets[part], index, hidden)
        hidden = _layer(config, exact, index, hidden)
        advance()
    expected = log_softmax(reference.logits(config, exact, hidden))
    found = {}
    for part, stream in streams.items():
        weights = sets[part] if part.layer < 0 else exact
        logits = log_softmax(reference.logits(config, weights, stream))
        found[part] = float((np.exp(expected) * (expected - logits)).sum(-1).mean())
        advance()
    return found


def output_errors(
    config: TextConfig,
    tensors: Mapping[str, CheckpointTensor],
    forms: Mapping[str, Sequence[Quantization | None]],
    ids: np.ndarray,
    advance: Callable[[], None],
) -> dict[str, list[float]]:
    """By tensor, the squared error of its outputs over their squared norm in each of its forms.

    On the inputs that it has with the texts `ids` int64 [samples, tokens], for some of its rows and, of a
    mixture, for the experts that are chosen most; of a table that is looked up, the error of its rows.

    Args:
        forms: None stores exactly.
        advance: called after each layer.
    """
    by_layer: dict[int | None, list[str]] = {}
    for name in forms:
        by_layer.setdefault(layer_of(name), []).append(name)
    found: dict[str, list[float]] = {}
    hidden = reference.embed(config, Weights(tensors), ids)
    for index in range(config.num_hidden_layers):
        names = by_layer.get(index, [])
        weights = Inputs(tensors, names)
        hidden = _layer(config, weights, index, hidden)
        for name in names:
            found[name] = _errors(tensors[name], forms[name], weights.found.get(name, {}))
        advance()
    head = reference.last_norm(config, Weights(tensors), hidden).reshape(-1, hidden.shape[-1])
    for name in by_layer.get(None, []):
        inputs: dict[int | None, np.ndarray] = {None: head} if name == reference.head_name(config) else {}
        found[name] = _errors(tensors[name], forms[name], inputs)
    return found


def _errors(
    source: CheckpointTensor,
    forms: Sequence[Quantization | None],
    inputs: Mapping[int | None, np.ndarray],
) -> list[float]:
    """`inputs` is empty for a table."""
    errors, norm = np.zeros(len(forms)), 0.0
    for matrix, x in _sampled(source, inputs):
        norm += _energy(matrix, x)
        for at, form in enumerate(forms):
            if form is not None:
                stored = dequantize(quantize(matrix, form), matrix.shape[1], form)
                errors[at] += _energy(stored - matrix, x)
    return [float(error / (norm or 1.0)) for error in errors]


def _sampled(
    source: CheckpointTensor, inputs: Mapping[int | None, np.ndarray]
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Some rows [n, K] of a tensor, and their inputs [..., K]."""
    if len(source.shape) == 3:
        most = sorted(inputs, key=lambda expert: (-len(inputs[expert]), expert))[:_SAMPLED_EXPERTS]
        for expert in most:
            assert expert is not None
            matrix = float32(source.read(expert, expert + 1))[0]
            step = max(1, len(matrix) * len(most) // _SAMPLED_ROWS)
            yield np.ascontiguousarray(matrix[::step]), inputs[expert]
        return
    rows, run = source.shape[0], _SAMPLED_ROWS // _RUNS
    starts = range(0, rows, max(run, -(-rows // _RUNS)))
    parts = [source.read(start, min(start + run, rows)) for start in starts]
    yield float32(np.concatenate(parts)), inputs.get(None)


def _energy(matrix: np.ndarray, x: np.ndarray | None) -> float:
    """Of the outputs for `x`, or of `matrix` itself."""
    outputs = matrix if x is None else x.reshape(-1, x.shape[-1]) @ matrix.T
    return float(np.square(outputs, dtype=np.float64).sum())
