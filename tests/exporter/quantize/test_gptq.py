"""GPTQ: its codes against the published algorithm, and what they lose on inputs that were not seen."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from qwen_export.quantize import blockwise, gptq
from qwen_export.quantize.blockwise import Compensation, Quantization, dequantize, quantize
from qwen_export.quantize.gptq import compensation

from tests.support.calibration import correlated, peak_bytes

FORMS = [
    Quantization(bits, block, symmetric, np.dtype(np.float32))
    for bits, block, symmetric in product((2, 4), (16, 32, 64, 128), (True, False))
]


def published(weight: np.ndarray, form: Quantization, gram: np.ndarray) -> np.ndarray:
    """Frantar et al.'s loop, in float64: every error is spread over all features that are still to come. A
    block's scale is fitted as ours is, by what an error costs that is not made up for: 1 / inverse^2."""
    inverse = np.linalg.cholesky(np.linalg.inv(gram)).T
    weight, result = weight.astype(np.float64), np.empty(weight.shape)
    k, levels = weight.shape[1], 2**form.bits - 1
    costs = np.diag(inverse) ** -2.0
    for start in range(0, k, form.block_size):
        stop = min(start + form.block_size, k)
        block = np.pad(weight[:, start:stop], ((0, 0), (0, form.block_size - (stop - start))))
        alone = np.pad(costs[start:stop], (0, form.block_size - (stop - start)))
        nothing = np.zeros((form.block_size, form.block_size), np.float32)
        fitted = quantize(block.astype(np.float32), form, Compensation(nothing, np.float32(alone)))
        scale = fitted.scales[:, 0].astype(np.float64)
        middle = 2.0 ** (form.bits - 1)
        zero = (
            middle if fitted.zero_points is None else (fitted.zero_points[:, 0] & levels).astype(np.float64)
        )
        for feature in range(start, stop):
            code = np.clip(np.rint(weight[:, feature] / scale) + zero, 0, levels)
            result[:, feature] = (code - zero) * scale
            error = (weight[:, feature] - result[:, feature]) / inverse[feature, feature]
            weight[:, feature:] -= np.outer(error, inverse[feature, feature:])
    return result


@pytest.fixture
def first_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes of 4 bits stay as the published algorithm leaves them."""
    monkeypatch.setattr(blockwise, "_ROUNDS", {})


@pytest.mark.parametrize("k", [256, 200])
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.usefixtures("first_codes")
def test_the_codes_are_the_published_algorithms(form: Quantization, k: int) -> None:
    weight = np.random.default_rng(1).standard_normal((40, k)).astype(np.float32)
    x = correlated(600, k)
    gram = x.T @ x
    damped = gram + np.eye(k) * np.trace(gram) / k * gptq._DAMPING * k / len(x)
    ours = dequantize(quantize(weight, form, compensation(gram, len(x))), k, form)
    theirs = published(weight, form, damped)
    # A value halfway between two codes may be rounded either way, and what follows in its row differs.
    same = np.isclose(ours, theirs, atol=1e-4).all(axis=1)
    assert same.mean() > 0.8
    errors = [np.square((found - weight) @ x.T).sum() for found in (ours, theirs)]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


@pytest.mark.parametrize("tokens", [300, 3000], ids=["fewer tokens than features", "more"])
@pytest.mark.usefixtures("first_codes")
def test_work_in_stripes_and_halves_changes_no_code(tokens: int) -> None:
    """Beside float64, feature by feature, for more features than a stripe of H has."""
    k, form = 900, Quantization(4, 64, True, np.dtype(np.float32))
    weight = np.random.default_rng(1).standard_normal((64, k)).astype(np.float32)
    x = correlated(tokens, k)
    exact = (x.T @ x).astype(np.float64)
    damped = exact + np.eye(k) * np.trace(exact) / k * gptq._DAMPING * k / tokens
    found = compensation(gptq.gram([x[:100], x[100:]], k), tokens)
    upper = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
    roots = np.diag(upper)
    np.testing.assert_allclose(np.tril(found.feedback, -1), np.tril((upper / roots).T, -1), atol=1e-5)
    np.testing.assert_allclose(found.importance, np.square(roots / roots.max()), rtol=1e-4)
    ours = dequantize(quantize(weight, form, found), k, form)
    theirs = published(weight, form, damped)
    assert np.isclose(ours, theirs, atol=1e-4).mean() > 0.995
    errors = [np.square((codes - weight) @ x.T).sum() for codes in (ours, theirs)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)


@pytest.mark.parametrize("tokens", [300, 3000], ids=["fewer tokens than features", "more"])
@pytest.mark.parametrize("k", [256, 90])
@pytest.mark.parametrize("form", [form for form in FORMS if form.bits == 4], ids=str)
def test_codes_of_four_bits_cost_less_than_the_published_algorithms(
    form: Quantization, k: int, tokens: int
) -> None:
    """By the damped H, of which both are made: together well less, and hardly a row more."""
    weight = np.random.default_rng(1).standard_normal((200, k)).astype(np.float32)
    x = correlated(tokens, k)
    gram = x.T @ x
    damped = gram + np.eye(k) * np.trace(gram) / k * gptq._DAMPING * k / tokens
    ours = dequantize(quantize(weight, form, compensation(gram.copy(), tokens)), k, form)
    theirs = published(weight, form, damped)
    costs = [np.einsum("nk,kl,nl->n", error, damped, error) for error in (ours - weight, theirs - weight)]
    # With fewer tokens, little is made up for: there are better codes, but not by much.
    assert costs[0].sum() < (0.97 if tokens > k * 2 else 0.995) * costs[1].sum()
    assert (costs[0] < costs[1]).mean() > 0.6


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("scale_dtype", [np.float32, np.float16])
def test_of_one_block_no_turn_costs_more_than_the_one_before(
    symmetric: bool, scale_dtype: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every row, also of zeros, of one lone value, and of the least and largest that are stored."""
    weight = np.random.default_rng(1).standard_normal((64, 128)).astype(np.float32)
    weight[0], weight[1], weight[2, 1:], weight[3:6] = 0, 0.25, 0, weight[3:6] * np.float32(1e-6)
    form, x = Quantization(4, 128, symmetric, np.dtype(scale_dtype)), correlated(500, 128).astype(np.float64)
    damped = x.T @ x + np.eye(128) * np.trace(x.T @ x) / 128 * gptq._DAMPING * 128 / len(x)
    found = compensation((x.T @ x).astype(np.float32), len(x))
    least = 1e-9 * np.einsum("nk,kl,nl->n", weight, damped, weight)  # a last bit of the scale
    before = np.full(len(weight), np.inf)
    for rounds in range(4):
        monkeypatch.setattr(blockwise, "_ROUNDS", {4: rounds})
        error = dequantize(quantize(weight, form, found), 128, form).astype(np.float64) - weight
        costs = np.einsum("nk,kl,nl->n", error, damped, error)
        assert (costs <= before * (1 + (1e-5 if scale_dtype == np.float32 else 1e-3)) + least).all()
        before = costs


RUNS = [
    Quantization(bits, block, symmetric, np.dtype(np.float16))
    for bits, block, symmetric in [(4, 32, True), (4, 256, False), (2, 256, False)]
]


@pytest.mark.parametrize("form", RUNS, ids=str)
def test_features_in_runs_have_the_codes_of_each_run_alone(form: Quantization) -> None:
    k, run = 2500, 1024
    weight = np.random.default_rng(1).standard_normal((16, k)).astype(np.float32)
    x = correlated(500, k)
    found = quantize(weight, form, compensation(gptq.gram([x[:200], x[200:]], k, run), len(x)))
    assert found.packed.shape == form.packed_shape(16, k)
    ours = dequantize(found, k, form)
    for start in range(0, k, run):
        features = slice(start, start + run)
        part = np.ascontiguousarray(x[:, features])
        size = part.shape[1]
        alone = quantize(weight[:, features], form, compensation(gptq.gram([part], size), len(x)))
        same = np.isclose(ours[:, features], dequantize(alone, size, form), atol=1e-4)
        assert same.mean() > 0.99


def test_only_the_widest_inputs_are_taken_in_runs() -> None:
    """0.8B to 4B, the mixtures' and 27B's hidden states are not; 27B's and 9B's MLPs in two."""
    assert [gptq.run_of(k) for k in (64, 1000, 5120, 9216)] == [64, 1000, 5120, 9216]
    assert [gptq.run_of(k) for k in (17408, 12288)] == [9216, 6144]
    assert all(gptq.run_of(k) % 1024 == 0 for k in range(9217, 60000, 100))


def test_a_factor_takes_the_place_of_its_products() -> None:
    k = 3072
    x = np.random.default_rng(0).standard_normal((500, k), dtype=np.float32)
    assert peak_bytes(lambda: compensation(gptq.gram([x], k), len(x))) < 1.3 * 4 * k**2


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_error_of_the_output_falls(form: Quantization) -> None:
    weight = np.random.default_rng(2).standard_normal((64, 256)).astype(np.float32)
    seen, unseen = correlated(2048, 256), correlated(2048, 256)[::-1] * np.float32(1.5)
    codes = quantize(weight, form, compensation(seen.T @ seen, len(seen)))
    nearest, ours = (
        np.square((dequantize(found, 256, form) - weight) @ unseen.T).sum()
        for found in (quantize(weight, form), codes)
    )
    assert ours < 0.8 * nearest


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_without_anything_to_make_up_for_the_codes_are_the_nearest(form: Quantization) -> None:
    weight = np.random.default_rng(3).standard_normal((24, 200)).astype(np.float32)
    found, nearest = (
        quantize(weight, form, compensation(np.zeros((200, 200), np.float32), 10)),
        quantize(weight, form),
    )
    np.testing.assert_array_equal(found.packed, nearest.packed)
    np.testing.assert_allclose(found.scales, nearest.scales, rtol=1e-6)
    if not form.symmetric:
        np.testing.assert_array_equal(found.zero_points, nearest.zero_points)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_scale_is_fitted_to_the_features_that_matter(form: Quantization) -> None:
    """Inputs that do not go together, a few of them a hundred times as large as the others."""
    weight = np.random.default_rng(3).standard_normal((24, 256)).astype(np.float32)
    sizes = np.where(np.random.default_rng(4).random(256) < 0.05, 100, 1).astype(np.float32)
    found, nearest = quantize(weight, form, compensation(np.diag(sizes**2), 10**9)), quantize(weight, form)
    errors = [np.square((dequantize(q, 256, form) - weight) * sizes).sum() for q in (found, nearest)]
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("run", [None, 128])
@pytest.mark.parametrize("tokens", [150, 3000], ids=["fewer tokens than features", "more"])
def test_what_is_missed_is_corrected_by_the_ridge_regression(tokens: int, run: int | None) -> None:
    """In float64; of runs each for itself."""
    k, share, alone = 200, 0.5, 0.3
    x = correlated(tokens, k)
    exact = x + correlated(tokens, k, seed=5) * np.float32(0.2)
    gone = gptq.missed(x.reshape(2, -1, k), exact.reshape(2, -1, k), share, run)
    found = compensation(gptq.gram([x], k, run), tokens, alone, gone)
    assert found.correction is gone
    for start in range(0, k, run or k):
        features = slice(start, start + (run or k))
        own, y = x[:, features].astype(np.float64), share * (exact - x)[:, features].astype(np.float64)
        size = own.shape[1]
        h = own.T @ own
        damped = h + np.eye(size) * np.trace(h) / size * (gptq._DAMPING * size / tokens + alone)
        expected = np.linalg.solve(damped, own.T @ y)
        np.testing.assert_allclose(gone[features, :size], expected, atol=1e-4)


@pytest.mark.parametrize("form", [FORMS[6], FORMS[-1]], ids=str)
def test_a_correction_moves_weights_before_they_are_rounded(form: Quantization) -> None:
    weight = np.random.default_rng(1).standard_normal((64, 256)).astype(np.float32)
    x = correlated(2000, 256)
    exact = x + np.roll(x, 1, axis=1) * np.float32(0.3)
    moving = compensation(gptq.gram([x], 256), len(x), missed=gptq.missed(x, exact, 1.0))
    assert moving.correction is not None
    ours = quantize(weight, form, moving)
    moved = quantize(weight + weight @ moving.correction.T, form, compensation(gptq.gram([x], 256), len(x)))
    same = np.isclose(dequantize(ours, 256, form), dequantize(moved, 256, form), atol=1e-4).all(axis=1)
    assert same.mean() > 0.8  # ties may go either way
    plain = quantize(weight, form, compensation(gptq.gram([x], 256), len(x)))
    errors = [
        np.square(x @ dequantize(found, 256, form).T - exact @ weight.T).sum() for found in (ours, plain)
    ]
    assert errors[0] < 0.9 * errors[1]


def test_inputs_that_never_come_miss_nothing() -> None:
    zeros, exact = np.zeros((20, 64), np.float32), correlated(20, 64)
    found = compensation(gptq.gram([zeros], 64), 20, missed=gptq.missed(zeros, exact, 0.5))
    assert found.correction is not None and not found.correction.any()
