"""Codes of a model's matrices on a calibration text, from exact inputs (GPTQ) or from what the codes made
before them leave (GPTAQ: asymmetric calibration).

The text goes through the model in float32, layer by layer: exactly, which is all for GPTQ, and for GPTAQ once
more with codes, where each matrix gets its own when the text comes to it (`gptq`), from its inputs there.
Where those are a norm of the hidden states, what the matrix would have given for the exact ones is the aim,
but only a share of the way there: all of it fits what the text has by chance. For the others, which end a
block, that gained nothing.

Each token goes to the experts that it goes to in the exact run. Where an expert has few, chance decides which
of its inputs go together, so that the mean product of all experts' inputs counts as some tokens more.

Memory holds one layer's activations of both runs and its codes, and for one matrix at a time what they are
made with. The embedding stays exact here: tied to lm_head, its codes are the last to be made.
Sources: Li et al., GPTAQ (2025); Zhang et al., Qronos (2025). Measured in docs/quality.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from qwen_export import reference
from qwen_export.architecture.models.qwen3_5 import TextConfig
from qwen_export.architecture.tensors import layer_of
from qwen_export.checkpoint.tensors.tensor import CheckpointTensor, float32
from qwen_export.graph.weights import PlacedWeight, Storage, Weight
from qwen_export.quantize.blockwise import (
    PRODUCTS,
    Compensation,
    Quantization,
    Quantized,
    dequantize,
    quantize,
)
from qwen_export.quantize.chunked_delta_rule import chunked_delta_rule
from qwen_export.quantize.gptq import compensation, finite, gram, missed, run_of
from qwen_export.quantize.inputs import Inputs
from qwen_export.quantize.lower_triangle import add_products
from qwen_export.reference import Weights

# Rows `start` to `stop` of axis 0 of a checkpoint's tensor as they are stored: packed codes, scales and,
# unless they are symmetric, packed zero points. What stands for one row of the tensor lies along
# the last axis.
Codes = Callable[[str, int, int], list[np.ndarray]]

_SHARE = 0.5  # of the way to what the exact inputs gave
# As so many tokens of an expert's own counts what all experts of its layer are given.
_SHARED_TOKENS = 128
# What an error in a tied table counts where its row is looked up, beside what it does to the logits: as a
# share of the mean of H's diagonal.
_LOOKED_UP = 1.0
_LEAST_ROWS, _ROWS = 512, 2048  # whose codes are made at a time, as each of their features is a step
_ROUTER = ".mlp.gate.weight"
_LAST = ("o_proj.weight", "out_proj.weight", "down_proj.weight", "down_proj")  # of a block

Place = slice | tuple[int, slice]  # rows of a tensor; of stacked experts, of one


class _Wanted(NamedTuple):
    """Rows of a tensor in one form."""

    start: int
    stop: int
    form: Quantization


def with_codes(
    config: TextConfig,
    tensors: Mapping[str, CheckpointTensor],
    weights: Sequence[PlacedWeight],
    samples: np.ndarray,
    asymmetric: bool,
) -> Iterator[tuple[PlacedWeight, Codes | None]]:
    """All of `weights`, in the order in which the model runs, with the codes that were made for them.

    None: they are found from the weights alone. The vision tower and the MTP head have none, as calibration
    text does not go through them.

    Args:
        samples: int64 [samples, tokens] of text.
        asymmetric: for the inputs that earlier codes leave; False: for the exact ones.

    Raises:
        UserError: activations overflow.
    """
    by_layer: dict[int, list[PlacedWeight]] = {}  # lm_head is the layer after the last
    for placed in weights:
        index = _layer(config, placed.weight)
        if index is None:
            yield placed, None
        else:
            by_layer.setdefault(index, []).append(placed)

    run = _Run(config, tensors, samples, asymmetric)
    for index in range(max(by_layer, default=-1) + 1):
        here = by_layer.get(index, [])
        codes = run.layer(index, [placed.weight for placed in here])
        for placed in here:
            yield placed, codes[placed.weight.storage].rows
        del codes  # who writes them may still hold some while the next layer runs


class _Run:
    """The text's way through the model as far as it has come: exactly, where `asymmetric` with codes too."""

    def __init__(
        self,
        config: TextConfig,
        tensors: Mapping[str, CheckpointTensor],
        samples: np.ndarray,
        asymmetric: bool,
    ) -> None:
        self._config = config
        self._tensors = tensors
        self._asymmetric = asymmetric
        self._exact = self._coded = reference.embed(config, Weights(tensors), samples)
        self._pool = ThreadPoolExecutor(os.cpu_count())

    def layer(self, index: int, weights: Iterable[Weight]) -> dict[Storage, _Codes]:
        """The codes of `weights`, which are the layer's, by their form."""
        config, wanted = self._config, _wanted(weights)
        exact = _Exact(self._tensors, {name for name in wanted if self._kept(name)})
        coded = _Coded(self._tensors, wanted, exact, self._pool)
        with np.errstate(over="ignore", invalid="ignore"):  # `finite` reports it
            if index < config.num_hidden_layers:
                self._exact = reference.layer(config, exact, index, self._exact, chunked_delta_rule)
                if self._asymmetric:
                    self._coded = reference.layer(config, coded, index, self._coded, chunked_delta_rule)
                else:
                    coded.make_for_exact()
                    self._coded = self._exact
                coded.make_unchosen()
            else:
                coded.make_head(config, self._exact, self._coded)
        return coded.codes

    def _kept(self, name: str) -> bool:
        """Whether what comes in to it in the exact run is wanted; of experts, for what they share too."""
        return not (self._asymmetric and name.endswith(_LAST)) or len(self._tensors[name].shape) == 3


def _wanted(weights: Iterable[Weight]) -> dict[str, list[_Wanted]]:
    """By tensor."""
    found: dict[str, list[_Wanted]] = {}
    for weight in weights:
        assert isinstance(weight.storage, Quantization)
        for rows in weight.rows:
            found.setdefault(rows.tensor, []).append(_Wanted(rows.start, rows.stop, weight.storage))
    return found


def _layer(config: TextConfig, weight: Weight) -> int | None:
    """Where a weight meets the activations that its codes are made with; None: nowhere."""
    if not isinstance(weight.storage, Quantization) or weight.storage.bits > 4 or weight.prequantized:
        return None
    tensor = weight.rows[0].tensor
    layer = layer_of(tensor)
    if layer is not None:
        return layer
    return config.num_hidden_layers if tensor == reference.head_name(config) else None


class _Exact(Inputs):
    """The exact run's weights: they keep what the coded run's are compared with.

    Attributes:
        routed: what the router gave, by its name.
    """

    def __init__(self, tensors: Mapping[str, CheckpointTensor], kept: Collection[str]) -> None:
        super().__init__(tensors, kept)
        self.routed: dict[str, np.ndarray] = {}

    def linear(self, name: str, x: np.ndarray, expert: int | None = None) -> np.ndarray:
        found = super().linear(name, x, expert)
        if name.endswith(_ROUTER):
            self.routed[name] = found
        return found


class _Codes:
    """Of tensors in one form, as far as they are made."""

    def __init__(self, form: Quantization) -> None:
        self._form = form
        self._parts: dict[str, list[np.ndarray]] = {}

    def room(self, name: str, shape: tuple[int, ...]) -> None:
        """For all of a tensor; what is not written to takes no memory."""
        *experts, n, k = shape
        form = self._form
        _, blocks, size = form.packed_shape(n, k)
        parts = [
            np.empty((*experts, n, blocks * size), np.uint8),
            np.empty((*experts, *form.scales_shape(n, k)), form.scale_dtype),
        ]
        if not form.symmetric:
            parts.append(np.empty((*experts, *form.zero_points_shape(n, k)), np.uint8))
        self._parts[name] = parts

    def put(self, name: str, place: Place, made: Quantized) -> None:
        arrays = [made.packed, made.scales, made.zero_points]
        for part, array in zip(self._parts[name], arrays, strict=False):
            assert array is not None
            part[place] = array.reshape(len(array), -1)

    def rows(self, name: str, start: int, stop: int) -> list[np.ndarray]:
        """See `Codes`."""
        return [part[start:stop] for part in self._parts[name]]


class _Coded(Weights):
    """The coded run's weights: each gets its codes when something is first multiplied with it.

    Attributes:
        codes: what was made, by its form.
    """

    def __init__(
        self,
        tensors: Mapping[str, CheckpointTensor],
        wanted: Mapping[str, Sequence[_Wanted]],
        exact: _Exact,
        pool: Executor,
    ) -> None:
        super().__init__(tensors)
        self._wanted = wanted
        self._exact = exact
        self._pool = pool
        self.codes: dict[Storage, _Codes] = {}
        for name, every in wanted.items():
            for form in {one.form: None for one in every}:
                self.codes.setdefault(form, _Codes(form)).room(name, tensors[name].shape)
        self._shared: dict[str, np.ndarray] = {}  # of experts, what `_SHARED_TOKENS` of all give
        self._unchosen = {
            name: set(range(tensors[name].shape[0])) for name in wanted if len(tensors[name].shape) == 3
        }
        self._last: tuple[np.ndarray, Compensation] | None = None

    def linear(self, name: str, x: np.ndarray, expert: int | None = None) -> np.ndarray:
        if name in self._exact.routed:
            return self._exact.routed[name]
        if name not in self._wanted:
            return super().linear(name, x, expert)
        own = self._of_expert(name, expert, x) if expert is not None else self._of_tensor(name, x)
        outputs = np.empty((*x.shape[:-1], self._tensors[name].shape[-2]), np.float32)
        self._make(name, expert, own, x.reshape(-1, x.shape[-1]), outputs.reshape(-1, outputs.shape[-1]))
        return outputs

    def make_for_exact(self) -> None:
        """Codes for what came in to the exact run's."""
        for name in self._wanted:
            for expert, x in list(self._exact.found.get(name, {}).items()):
                own = self._of_tensor(name, x) if expert is None else self._of_expert(name, expert, x)
                self._make(name, expert, own)

    def make_unchosen(self) -> None:
        """Codes of experts that no token went to."""
        for name, experts in self._unchosen.items():
            for expert in sorted(experts):
                self._make(name, expert, self._of_expert(name, expert, None))

    def make_head(self, config: TextConfig, exact_hidden: np.ndarray, coded_hidden: np.ndarray) -> None:
        """Codes of lm_head, for what the last layers give."""
        name = reference.head_name(config)
        exact = reference.last_norm(config, self, exact_hidden)
        self._exact.keep(name, exact)
        alone = _LOOKED_UP if config.tie_word_embeddings else 0.0
        inputs = exact if coded_hidden is exact_hidden else reference.last_norm(config, self, coded_hidden)
        self._make(name, None, self._of_tensor(name, inputs, alone))

    def _of_tensor(self, name: str, x: np.ndarray, alone: float = 0.0) -> Compensation:
        exact = self._exact.found.pop(name, {}).get(None)
        if self._last is None or self._last[0] is not x:  # several tensors take the same x
            self._last = None  # frees memory
            k = x.shape[-1]
            run = run_of(k)
            inputs = finite(gram([x], k, run), name)
            aim = None
            if exact is not None and exact is not x:
                aim = finite(missed(x, exact, _SHARE, run), name)
            self._last = x, compensation(inputs, x.size // k, alone, aim)
        return self._last[1]

    def _of_expert(self, name: str, expert: int, x: np.ndarray | None) -> Compensation:
        inputs = self._exact.found[name]
        if name not in self._shared:
            parts = list(inputs.values())
            shared = finite(gram(parts, parts[0].shape[-1]), name)
            shared *= np.float32(_SHARED_TOKENS / sum(map(len, parts)))
            self._shared[name] = shared
        found = self._shared[name].copy()
        if x is None:
            return compensation(found, _SHARED_TOKENS)
        self._unchosen[name].discard(expert)
        add_products(found, x)
        exact = inputs.pop(expert)
        aim = None
        if exact is not x and not name.endswith(_LAST):
            aim = finite(missed(x, exact, _SHARE), name)
        return compensation(finite(found, name), len(x) + _SHARED_TOKENS, missed=aim)

    def _make(
        self,
        name: str,
        expert: int | None,
        own: Compensation,
        x: np.ndarray | None = None,
        outputs: np.ndarray | None = None,
    ) -> None:
        """Codes of a matrix, and of `x` [tokens, K] its `outputs` [tokens, N]."""
        tensor = self._tensors[name]

        def make(start: int, stop: int, forms: Sequence[Quantization]) -> None:
            if expert is None:
                place: Place = slice(start, stop)
                rows = float32(tensor.read(start, stop))
            else:
                place = expert, slice(start, stop)
                rows = float32(tensor.read(expert, expert + 1))[0, start:stop]
            made = [quantize(rows, form, own) for form in forms]
            for form, codes in zip(forms, made, strict=True):
                self.codes[form].put(name, place, codes)
            if x is not None and outputs is not None:
                if made:
                    rows = dequantize(made[0], rows.shape[1], forms[0])
                with PRODUCTS, np.errstate(over="ignore", invalid="ignore"):
                    np.matmul(x, rows.T, out=outputs[:, start:stop])

        pieces = list(self._pieces(name, expert))
        for _ in self._pool.map(make, *zip(*pieces, strict=True)):
            pass

    def _pieces(self, name: str, expert: int | None) -> Iterator[tuple[int, int, list[Quantization]]]:
        """Rows of a matrix from start to stop, and the forms that they are wanted in."""
        wanted, n = self._wanted[name], self._tensors[name].shape[-2]
        if expert is not None:  # the rows of `wanted` are experts
            wanted = [_Wanted(0, n, form) for form in {one.form: None for one in wanted}]
        step = min(_ROWS, max(_LEAST_ROWS, -(-n // 2)))
        cuts = {0, n, *(cut for one in wanted for cut in one[:2])}
        for first, last in pairwise(sorted(cuts)):
            forms = [form for start, stop, form in wanted if start <= first and last <= stop]
            for start in range(first, last, step):
                yield start, min(start + step, last), forms
