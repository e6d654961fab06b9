"""GPTQ: codes of 2- and 4-bit weights that make up for each other's errors on real activations.

A projection's error on inputs X [tokens, K] is E X^T for the errors E [N, K] of its weights. Where input
features go together, one feature's error can be made up for by the next: feature k is rounded with what the
earlier errors leave to it, E[:, :k] F[k, :k]^T. The F that leaves the least comes from the factor of
H = X^T X = (F^T + I) D (F^T + I)^T.

An expert's inputs are the tokens that the router sends to it. Where they are few, chance decides what goes
together, so that the mean product of all experts' inputs counts as some tokens more.

The model runs in float32, layer by layer, on calibration text; memory holds one layer's activations and H's.
Sources: Frantar et al., GPTQ (2022); Chee et al., QuIP (2023), whose LDLQ is the same codes by this factor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import numpy as np
from qwen_common.errors import UserError

from qwen_export import reference
from qwen_export.architecture.models.qwen3_5 import TextConfig
from qwen_export.architecture.tensors import layer_of
from qwen_export.checkpoint.tensors.tensor import CheckpointTensor
from qwen_export.graph.weights import PlacedWeight, Weight
from qwen_export.quantize.blockwise import Compensation, Quantization
from qwen_export.reference import Weights

# Finds what the codes of a checkpoint's tensor are made with (`quantize`); of stacked experts, of one.
# It may take long, so it is asked for only where a weight is still to be written.
Compensations = Callable[[str, int | None], Compensation | None]

SAMPLES = 64  # of calibration text, at most
# What a text says about how K features go together is partly chance, the more the shorter it is: this times
# K / tokens is added to H's diagonal, as a share of its mean. Measured in docs/quality.md.
_DAMPING = 3.0
# As so many tokens of an expert's own counts what all experts of its layer are given. Measured there too.
_SHARED_TOKENS = 128


def nearest(tensor: str, expert: int | None) -> None:
    """Every code is the nearest."""


def compensation(gram: np.ndarray, tokens: int) -> Compensation:
    """F and D for inputs X [tokens, K] with `gram` = X^T X, float32 [K, K]."""
    damped = gram.astype(np.float64)
    size = len(damped)
    mean = np.trace(damped) / size
    if mean == 0:  # nothing ever comes in
        return Compensation(np.zeros_like(gram, np.float32), np.ones(size, np.float32))
    damped[np.diag_indices_from(damped)] += mean * _DAMPING * size / tokens
    upper = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
    del damped  # K may be 17408, and this 2.4 GB
    roots = np.diag(upper).copy()
    upper /= roots
    return Compensation(
        np.tril(upper.T.astype(np.float32), -1), np.square(roots / roots.max()).astype(np.float32)
    )


def with_compensations(
    config: TextConfig,
    tensors: Mapping[str, CheckpointTensor],
    weights: Sequence[PlacedWeight],
    samples: np.ndarray,
) -> Iterator[tuple[PlacedWeight, Compensations]]:
    """All of `weights`, in the order in which the model runs, with what finds their tensors' compensations.

    The vision tower and the MTP head have none: calibration text does not go through them.

    Args:
        samples: int64 [samples, tokens] of text.

    Raises:
        UserError: activations overflow.
    """
    by_layer: dict[int, list[PlacedWeight]] = {}  # lm_head is the layer after the last
    for placed in weights:
        index = _layer(config, placed.weight)
        if index is None:
            yield placed, nearest
        else:
            by_layer.setdefault(index, []).append(placed)

    hidden = reference.embed(config, Weights(tensors), samples)
    for index in range(max(by_layer, default=-1) + 1):
        placed_here = by_layer.get(index, [])
        experts = {
            rows.tensor for placed in placed_here for rows in placed.weight.rows if placed.weight.of_experts
        }
        watched = _Watched(tensors, experts)
        with np.errstate(over="ignore", invalid="ignore"):  # reported when one is asked for
            if index < config.num_hidden_layers:
                hidden = reference.layer(config, watched, index, hidden)
            else:
                watched.watch(reference.head_name(config), reference.last_norm(config, watched, hidden))
        for placed in placed_here:
            yield placed, watched.compensation


def _layer(config: TextConfig, weight: Weight) -> int | None:
    """Where a weight meets the activations that its codes are made with; None: nowhere."""
    if not isinstance(weight.storage, Quantization) or weight.storage.bits > 4 or weight.prequantized:
        return None
    tensor = weight.rows[0].tensor
    layer = layer_of(tensor)
    if layer is not None:
        return layer
    return config.num_hidden_layers if tensor == reference.head_name(config) else None


class _Watched(Weights):
    """Weights that sum up X^T X of what comes in; of experts, what comes in to any of them, and keep what
    comes in to each of those tensors of `experts` that are asked for."""

    def __init__(self, tensors: Mapping[str, CheckpointTensor], experts: Collection[str] = ()) -> None:
        super().__init__(tensors)
        self._experts = experts
        self._grams: dict[str, np.ndarray] = {}
        self._tokens: Counter[str] = Counter()
        self._inputs: dict[tuple[str, int], np.ndarray] = {}  # by tensor and expert
        self._compensations: dict[int, Compensation] = {}  # by the gram's id
        self._last: tuple[np.ndarray, np.ndarray] | None = None

    def linear(self, name: str, x: np.ndarray, expert: int | None = None) -> np.ndarray:
        self.watch(name, x)
        if expert is not None and name in self._experts:
            self._inputs[name, expert] = x
        return super().linear(name, x, expert)

    def watch(self, name: str, x: np.ndarray) -> None:
        if self._last is None or self._last[0] is not x:  # several projections take the same x
            inputs = x.reshape(-1, x.shape[-1])
            self._last = x, inputs.T @ inputs
        gram = self._last[1]
        self._grams[name] = self._grams[name] + gram if name in self._grams else gram
        self._tokens[name] += x.size // x.shape[-1]

    def compensation(self, name: str, expert: int | None = None) -> Compensation:
        gram, tokens = self._grams[name], self._tokens[name]
        if not np.isfinite(gram).all():
            raise UserError(
                f"the inputs of {name} overflow on the calibration text: "
                "export with --set compression=data-free"
            )
        if expert is not None:
            own = self._inputs.get((name, expert), gram[:0])
            gram = own.T @ own + gram * np.float32(_SHARED_TOKENS / tokens)
            return compensation(gram, len(own) + _SHARED_TOKENS)
        if id(gram) not in self._compensations:
            self._compensations[id(gram)] = compensation(gram, tokens)
        return self._compensations[id(gram)]
