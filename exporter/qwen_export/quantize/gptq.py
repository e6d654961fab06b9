"""GPTQ: codes of 2- and 4-bit weights that make up for each other's errors on real activations.

A projection's error on inputs X [tokens, K] is E X^T for the errors E [N, K] of its weights. Where input
features go together, one feature's error can be made up for by the next: feature k is rounded with what the
earlier errors leave to it, E[:, :k] F[k, :k]^T. The F that leaves the least comes from the factor of
H = X^T X = (F^T + I) D (F^T + I)^T. Scales and codes of 4 bits are then made better (`blockwise`).

An expert's inputs are the tokens that the router sends to it. Where they are few, chance decides what goes
together, so that the mean product of all experts' inputs counts as some tokens more.

The model runs in float32, layer by layer, on calibration text; memory holds one layer's activations and one
or two H's, of which each becomes its factor in place.
Sources: Frantar et al., GPTQ (2022); Chee et al., QuIP (2023), whose LDLQ is the same codes by this factor.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

import numpy as np
from qwen_common.errors import UserError

from qwen_export import reference
from qwen_export.architecture.models.qwen3_5 import TextConfig
from qwen_export.architecture.tensors import layer_of
from qwen_export.checkpoint.tensors.tensor import CheckpointTensor
from qwen_export.graph.weights import PlacedWeight, Weight
from qwen_export.quantize.blockwise import PRODUCTS, Compensation, Quantization
from qwen_export.quantize.chunked_delta_rule import chunked_delta_rule
from qwen_export.quantize.inputs import Inputs
from qwen_export.quantize.lower_triangle import add_products, factorise
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
# What an error in a tied table counts where its row is looked up, beside what it does to the logits: as a
# share of the mean of H's diagonal. Measured there too.
_LOOKED_UP = 1.0
_LEAST_RUN, _LONGEST_RUN = 1024, 9216  # features, see `Compensation`
_STRIPE = 128  # rows of H that are worked on at a time


def nearest(tensor: str, expert: int | None) -> None:
    """Every code is the nearest."""


def gram(inputs: Iterable[np.ndarray], k: int, run: int | None = None) -> np.ndarray:
    """X^T X of `inputs` [..., K] together, float32 [K, run]; only the lower triangles are meant.

    Args:
        run: features of which a product is made, one run after another; None: all K.
    """
    found = np.zeros((k, run or k), np.float32)
    for part in inputs:
        x = part.reshape(-1, k)
        for features, own in _runs(found):
            add_products(own, x[:, features])
    return found


def run_of(k: int) -> int:
    """How many of K features make up for each other's errors: at most about 9,000, in runs of one length.

    The work grows with the cube, and a text says little about how more of them go together. Measured in
    docs/quality.md.
    """
    runs = -(-k // _LONGEST_RUN)
    return k if runs == 1 else -(-k // runs // _LEAST_RUN) * _LEAST_RUN


def compensation(gram: np.ndarray, tokens: int, alone: float = 0.0) -> Compensation:
    """F and D for inputs X [tokens, K] with `gram` = X^T X, float32 [K, run], whose lower triangles are read.

    `alone` is what a feature's error counts by itself, whatever comes in: a share of H's diagonal's mean.

    F takes the place of `gram` in its memory: K may be 17408. float32 is enough: with this damping H's
    largest eigenvalue is at most 1 + tokens / 3 times its smallest.
    """
    return Compensation(gram, np.concatenate([_factorise(own, tokens, alone) for _, own in _runs(gram)]))


def _factorise(gram: np.ndarray, tokens: int, alone: float) -> np.ndarray:
    """One run's `gram` becomes its F; returns its D."""
    size = len(gram)
    diagonal = np.einsum("kk->k", gram)
    mean = diagonal.mean(dtype=np.float64)
    if mean == 0:  # nothing ever comes in
        return np.ones(size, np.float32)
    for start, stop in _stripes(size):  # so that inputs may be of any size that float32 holds
        gram[start:stop, :stop] /= np.float32(mean)
    diagonal += np.float32(_DAMPING * size / tokens + alone)
    factorise(gram)
    roots = diagonal.copy()
    for start, stop in _stripes(size):
        gram[start:stop, :stop] /= roots[start:stop, None]
    diagonal[:] = 0
    return np.square(roots / roots.max())


def _runs(gram: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Features of each run and its square of `gram` [K, run]."""
    k, run = gram.shape
    for start in range(0, k, run):
        features = slice(start, min(start + run, k))
        yield features, gram[features, : k - start]


def _stripes(k: int) -> Iterator[tuple[int, int]]:
    for start in range(0, k, _STRIPE):
        yield start, min(start + _STRIPE, k)


def with_compensations(
    config: TextConfig,
    tensors: Mapping[str, CheckpointTensor],
    weights: Sequence[PlacedWeight],
    samples: np.ndarray,
) -> Iterator[tuple[PlacedWeight, Compensations]]:
    """All of `weights`, in the order in which the model runs, with what finds their tensors' compensations.

    The vision tower and the MTP head have none: calibration text does not go through them. A weight's are to
    be asked for before the next weight is: a layer's inputs are gone when the next layer runs.

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
        inputs = Inputs(tensors, {rows.tensor for placed in placed_here for rows in placed.weight.rows})
        with PRODUCTS, np.errstate(over="ignore", invalid="ignore"):  # reported when one is asked for
            if index < config.num_hidden_layers:
                hidden = reference.layer(config, inputs, index, hidden, chunked_delta_rule)
            else:
                inputs.keep(reference.head_name(config), reference.last_norm(config, inputs, hidden))
        tied = {reference.head_name(config)} if config.tie_word_embeddings else set()
        compensations = _Compensations(inputs.found, tied)
        for placed in placed_here:
            yield placed, compensations.of
        compensations.forget()  # who asked may still hold it while the next layer runs


def _layer(config: TextConfig, weight: Weight) -> int | None:
    """Where a weight meets the activations that its codes are made with; None: nowhere."""
    if not isinstance(weight.storage, Quantization) or weight.storage.bits > 4 or weight.prequantized:
        return None
    tensor = weight.rows[0].tensor
    layer = layer_of(tensor)
    if layer is not None:
        return layer
    return config.num_hidden_layers if tensor == reference.head_name(config) else None


class _Compensations:
    """Of one layer's tensors, by what comes in to them; each is made when it is first asked for.

    Rows of those `looked_up` are inputs of the model too.
    """

    def __init__(
        self, inputs: dict[str, dict[int | None, np.ndarray]], looked_up: Collection[str] = ()
    ) -> None:
        self._inputs = inputs
        self._looked_up = looked_up
        self._found: dict[str, Compensation] = {}
        self._shared: dict[str, np.ndarray] = {}  # of experts, what `_SHARED_TOKENS` of all give

    def of(self, name: str, expert: int | None = None) -> Compensation:
        with PRODUCTS, np.errstate(over="ignore", invalid="ignore"):  # `_finite` reports it
            return self._of_tensor(name) if expert is None else self._of_expert(name, expert)

    def _of_tensor(self, name: str) -> Compensation:
        if name not in self._found:
            x = self._inputs[name][None]
            k, alone = x.shape[-1], _LOOKED_UP if name in self._looked_up else 0.0
            found = compensation(_finite(gram([x], k, run_of(k)), name), x.size // k, alone)
            # Several tensors take the same x, which is held no longer than it must.
            for other in [other for other, its in self._inputs.items() if its.get(None) is x]:
                self._found[other] = found
                del self._inputs[other]
        return self._found[name]

    def _of_expert(self, name: str, expert: int) -> Compensation:
        inputs = self._inputs[name]
        if name not in self._shared:
            parts = list(inputs.values())
            shared = _finite(gram(parts, parts[0].shape[-1]), name)
            shared *= np.float32(_SHARED_TOKENS / sum(map(len, parts)))
            self._shared[name] = shared
        found = self._shared[name].copy()
        own = inputs.get(expert, np.empty((0, len(found)), np.float32))
        add_products(found, own)
        return compensation(found, len(own) + _SHARED_TOKENS)

    def forget(self) -> None:
        for kept in (self._inputs, self._found, self._shared):
            kept.clear()


def _finite(gram: np.ndarray, name: str) -> np.ndarray:
    """
    Raises:
        UserError: it is not; an element is no larger than its row's and its column's on the diagonal.
    """
    if not all(np.isfinite(np.diag(own)).all() for _, own in _runs(gram)):
        raise UserError(
            f"the inputs of {name} overflow on the calibration text: export with --set compression=data-free"
        )
    return gram
