"""Products and factors by halves against numpy's in float64."""

from __future__ import annotations

import numpy as np
import pytest
from qwen_export.quantize import lower_triangle
from qwen_export.quantize.lower_triangle import add_products, factorise, solve


@pytest.mark.parametrize("size", [1, 64, 65, 200, 256, 257, 700, 1300])
def test_halves(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lower_triangle, "_MOST_ROWS", 300)
    rng = np.random.default_rng(size)
    x = rng.standard_normal((40, size), dtype=np.float32)
    # As it is where a matrix is a part of another one.
    whole = np.full((size + 1, size + 3), np.nan, np.float32)
    h = whole[:size, :size]
    h[:] = 0
    add_products(h, x[:30])
    add_products(h, x[30:])
    exact = x.T.astype(np.float64) @ x
    np.testing.assert_allclose(np.tril(h), np.tril(exact), atol=1e-4)
    assert np.isnan(whole[size:]).all() and np.isnan(whole[:, size:]).all()

    h[np.diag_indices(size)] += 100
    exact[np.diag_indices(size)] += 100
    leaves = factorise(h)
    expected = np.linalg.cholesky(exact[::-1, ::-1])[::-1, ::-1].T
    np.testing.assert_allclose(np.tril(h), expected, atol=1e-4)

    right = rng.standard_normal((size, 5), dtype=np.float32)
    found = right.copy()
    solve(h, leaves, found)
    np.testing.assert_allclose(found, np.linalg.solve(exact, right), atol=1e-5)
