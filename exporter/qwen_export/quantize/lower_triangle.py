"""Symmetric matrices in float32 by their lower triangles, in place.

All is done by halves, so that nearly all the work is large products, which BLAS does at the speed of the
processor. LAPACK sees a leaf's values at most.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

_LEAF = 64
_LEAST = 256  # features of a product
_MOST_ROWS = 2048  # of a product that is held until it is subtracted


def add_products(total: np.ndarray, x: np.ndarray) -> None:
    """`total` [K, K] + X^T X for `x` [tokens, K]."""
    for rows, columns in _blocks(0, len(total)):
        total[rows, columns] += x[:, rows].T @ x[:, columns]


def factorise(h: np.ndarray) -> list[np.ndarray]:
    """H = L^T L becomes L. Within the leaves on its diagonal, 0 takes the place of what is above.

    Returns:
        The inverses of the transposed leaves, which `solve` wants.
    """
    if len(h) <= _LEAF:
        upper = np.linalg.cholesky(h.T[::-1, ::-1])[::-1, ::-1]
        h[:] = upper.T
        return [np.linalg.inv(upper)]
    middle = _middle(0, len(h))
    first, last, between = h[:middle, :middle], h[middle:, middle:], h[middle:, :middle]
    leaves = factorise(last)
    _solve(last, leaves, between)
    for rows, columns in _blocks(0, middle):
        first[rows, columns] -= between[:, rows].T @ between[:, columns]
    return factorise(first) + leaves


def solve(factor: np.ndarray, leaves: Sequence[np.ndarray], right: np.ndarray) -> None:
    """What H times gives `right` [K, n] takes its place; `factor` and `leaves` are `factorise`'s of H."""
    _solve(factor, leaves, right)
    _solve_untransposed(factor, leaves, right)


def _solve(factor: np.ndarray, leaves: Sequence[np.ndarray], right: np.ndarray) -> None:
    """What `factor`^T times gives `right` takes its place; `factor` and `leaves` are from `factorise`."""
    if len(leaves) == 1:
        right[:] = leaves[0] @ right
        return
    middle = _middle(0, len(factor))
    split = middle // _LEAF
    _solve(factor[middle:, middle:], leaves[split:], right[middle:])
    for start in range(0, middle, _MOST_ROWS):
        rows = slice(start, min(start + _MOST_ROWS, middle))
        right[rows] -= factor[middle:, rows].T @ right[middle:]
    _solve(factor[:middle, :middle], leaves[:split], right[:middle])


def _solve_untransposed(factor: np.ndarray, leaves: Sequence[np.ndarray], right: np.ndarray) -> None:
    """What `factor` times gives `right` takes its place."""
    if len(leaves) == 1:
        right[:] = leaves[0].T @ right
        return
    middle = _middle(0, len(factor))
    split = middle // _LEAF
    _solve_untransposed(factor[:middle, :middle], leaves[:split], right[:middle])
    for start in range(middle, len(factor), _MOST_ROWS):
        rows = slice(start, min(start + _MOST_ROWS, len(factor)))
        right[rows] -= factor[rows, :middle] @ right[:middle]
    _solve_untransposed(factor[middle:, middle:], leaves[split:], right[middle:])


def _blocks(start: int, stop: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of blocks that together are the lower triangle, and a little of what is above."""
    if stop - start <= _LEAST:
        yield slice(start, stop), slice(start, stop)
        return
    middle = _middle(start, stop)
    yield from _blocks(start, middle)
    for first in range(middle, stop, _MOST_ROWS):
        yield slice(first, min(first + _MOST_ROWS, stop)), slice(start, middle)
    yield from _blocks(middle, stop)


def _middle(start: int, stop: int) -> int:
    """About, in whole leaves."""
    leaves = -(-(stop - start) // _LEAF)
    return start + leaves // 2 * _LEAF
