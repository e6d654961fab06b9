"""GPTQ: codes of 2- and 4-bit weights that make up for each other's errors on real activations.

A projection's error on inputs X [tokens, K] is E X^T for the errors E [N, K] of its weights. Where input
features go together, one feature's error can be made up for by the next: feature k is rounded with what the
earlier errors leave to it, E[:, :k] F[k, :k]^T. The F that leaves the least comes from the factor of
H = X^T X = (F^T + I) D (F^T + I)^T. Scales and codes of 4 bits are then made better (`blockwise`).

Where outputs are to be those that other inputs gave, weights move a way towards them first
(`calibrated_codes`).

Memory holds one or two H's, of which each becomes its factor in place.
Sources: Frantar et al., GPTQ (2022); Chee et al., QuIP (2023), whose LDLQ is the same codes by this factor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import zip_longest

import numpy as np
from qwen_common.errors import UserError

from qwen_export.quantize.blockwise import Compensation
from qwen_export.quantize.lower_triangle import add_products, factorise, solve

SAMPLES = 64  # of calibration text, at most
# What a text says about how K features go together is partly chance, the more the shorter it is: this times
# K / tokens is added to H's diagonal, as a share of its mean. Measured in docs/quality.md.
_DAMPING = 3.0
_LEAST_RUN, _LONGEST_RUN = 1024, 9216  # features, see `Compensation`
_STRIPE = 128  # rows of H that are worked on at a time
_TOKENS = 2048  # whose differences are held at a time


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


def missed(inputs: np.ndarray, exact: np.ndarray, share: float, run: int | None = None) -> np.ndarray:
    """X^T Y for `inputs` X and Y, `share` of what they miss of `exact`, both [..., K]: float32 [K, run]."""
    k = inputs.shape[-1]
    x, wanted = inputs.reshape(-1, k), exact.reshape(-1, k)
    found = np.zeros((k, run or k), np.float32)
    for start in range(0, len(x), _TOKENS):
        tokens = slice(start, start + _TOKENS)
        y = wanted[tokens] - x[tokens]
        y *= np.float32(share)
        for features, own in _runs(found):
            own += x[tokens, features].T @ y[:, features]
    return found


def run_of(k: int) -> int:
    """How many of K features make up for each other's errors: at most about 9,000, in runs of one length.

    The work grows with the cube, and a text says little about how more of them go together. Measured in
    docs/quality.md.
    """
    runs = -(-k // _LONGEST_RUN)
    return k if runs == 1 else -(-k // runs // _LEAST_RUN) * _LEAST_RUN


def compensation(
    gram: np.ndarray, tokens: int, alone: float = 0.0, missed: np.ndarray | None = None
) -> Compensation:
    """F and D for inputs X [tokens, K] with `gram` = X^T X, float32 [K, run], whose lower triangles are read.

    F takes the place of `gram` in its memory, and the correction that of `missed`: K may be 17408. float32 is
    enough: with this damping H's largest eigenvalue is at most 1 + tokens / 3 times its smallest.

    Args:
        alone: what a feature's error counts by itself, whatever comes in: a share of H's diagonal's mean.
        missed: X^T Y, float32 [K, run], where weights are to give the outputs of X + Y; None: those of X.
    """
    every = [] if missed is None else [own for _, own in _runs(missed)]
    pairs = zip_longest((own for _, own in _runs(gram)), every)
    importance = [_factorise(own, tokens, alone, its) for own, its in pairs]
    return Compensation(gram, np.concatenate(importance), missed)


def _factorise(gram: np.ndarray, tokens: int, alone: float, missed: np.ndarray | None) -> np.ndarray:
    """One run's `gram` becomes its F, and `missed` H^-1 `missed`; returns its D."""
    size = len(gram)
    diagonal = np.einsum("kk->k", gram)
    mean = diagonal.mean(dtype=np.float64)
    if mean == 0:  # nothing ever comes in, so that nothing is missed either
        return np.ones(size, np.float32)
    for start, stop in _stripes(size):  # so that inputs may be of any size that float32 holds
        gram[start:stop, :stop] /= np.float32(mean)
    diagonal += np.float32(_DAMPING * size / tokens + alone)
    leaves = factorise(gram)
    if missed is not None:
        missed /= np.float32(mean)
        solve(gram, leaves, missed)
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


def finite(products: np.ndarray, name: str) -> np.ndarray:
    """`products` of what comes in to the tensor `name`.

    Raises:
        UserError: they are not.
    """
    if not np.isfinite(products).all():
        raise UserError(
            f"the inputs of {name} overflow on the calibration text: export with --set compression=data-free"
        )
    return products
