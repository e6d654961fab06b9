"""Block-wise INT2, INT4 and INT8 in MatMulNBits' layout, with scales that minimise the squared error.

Layout (com.microsoft::MatMulNBits): a weight [N, K] is cut along K into blocks of `block_size`; codes are
unsigned, w = (code - zero_point) * scale, packed lowest bits first. K is padded with codes that mean 0.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass

import ml_dtypes
import numpy as np

# Elements worked on at a time: few enough for a core's cache, enough that threads seldom wait.
_TILE_ELEMENTS = 256 * 1024
_IN_ORDER = 4  # features that are rounded one by one, without BLAS
# How often a block's scale and codes are made better in turns, by bits (docs/quality.md). Not of 2: their
# scales aim at something else than the least squared error (`_fit`).
_ROUNDS = {4: 2}
# Held by who multiplies matrices while other threads may. OpenBLAS takes all cores for one product, and
# its versions before 0.3.33 mix up those of several threads (github.com/numpy/numpy/issues/31618).
PRODUCTS = threading.Lock()
# Candidate scales, as divisors of the block's extreme value (symmetric) and factors of its range
# (asymmetric). Rounding to the nearest code is done for each; the least squared error wins.
_SYMMETRIC_DIVISORS = {2: (-2.0,), 4: (-8.0, -7.4, -8.7, 7.0), 8: (-128.0,)}
_ASYMMETRIC_FACTORS = {2: (1.0,), 4: (1.0, 0.94, 0.88, 0.8), 8: (1.0,)}
# Of 2 bits, as factors of the block's root mean square: its extreme value says little about the best of
# four levels, and is tried for weights that 2 bits hold exactly. They lose 1 to 2% to the best scale of all,
# but for outliers. The sign says on which side of 0 two of the levels lie, so that a stored zero point adds
# nothing but for blocks on one side (quality.md).
_TWO_BIT_FACTORS = (1.0, -1.0, 1.3, -1.3, 1.9, -1.9)


@dataclass(frozen=True)
class Quantization:
    """How one weight [N, K] is stored.

    Attributes:
        bits: 2, 4 or 8.
        block_size: a power of two, at least 16.
        symmetric: the zero point is 2^(bits - 1) everywhere and not stored.
        scale_dtype: float32 or float16.
        prequantized: codes and scales are the checkpoint's own, not fitted here.
    """

    bits: int
    block_size: int
    symmetric: bool
    scale_dtype: np.dtype
    prequantized: bool = False

    def blocks(self, k: int) -> int:
        return -(-k // self.block_size)

    def packed_shape(self, n: int, k: int) -> tuple[int, int, int]:
        return n, self.blocks(k), self.block_size * self.bits // 8

    def scales_shape(self, n: int, k: int) -> tuple[int, int]:
        return n, self.blocks(k)

    def zero_points_shape(self, n: int, k: int) -> tuple[int, int]:
        return n, -(-self.blocks(k) * self.bits // 8)


@dataclass(frozen=True)
class Quantized:
    """Rows of one weight in stored form; shapes as `Quantization` says, codes and zero points uint8."""

    packed: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray | None


@dataclass(frozen=True)
class Compensation:
    """How features' errors count on real inputs, and how later ones make up for earlier ones (`gptq`).

    Attributes:
        feedback: float32 [K, run], where features are taken in runs of so many, or fewer in the last. A run
            is a multiple of 1024, so that its zero points fill whole bytes, or all of K. Row k says what
            feature k makes up for of the errors of those before it in its run.
        importance: float32 [K]: what a squared error of feature k costs that no later one makes up for.
        correction: float32 [K, run]: `correction` @ w is first added to a run's weights w; None: nothing.
    """

    feedback: np.ndarray
    importance: np.ndarray
    correction: np.ndarray | None = None

    def runs(self) -> Iterator[tuple[slice, Compensation]]:
        """Features and what they alone have, whose feedback is square."""
        k, run = self.feedback.shape
        for start in range(0, k, run):
            features = slice(start, min(start + run, k))
            correction = None if self.correction is None else self.correction[features, : k - start]
            feedback = self.feedback[features, : k - start]
            yield features, Compensation(feedback, self.importance[features], correction)


def quantize(weight: np.ndarray, form: Quantization, compensation: Compensation | None = None) -> Quantized:
    """Quantise `weight` [N, K] in bfloat16, float16 or float32, all finite. Rows are independent.

    Args:
        compensation: None: every code is the nearest.
    """
    if compensation is not None:
        runs = [_quantize_in_order(weight[:, run], form, own) for run, own in compensation.runs()]
        return Quantized(
            np.concatenate([run.packed for run in runs], axis=1),
            np.concatenate([run.scales for run in runs], axis=1),
            None if form.symmetric else np.concatenate([run.zero_points for run in runs], axis=1),
        )
    n, k = weight.shape
    blocks = form.blocks(k)
    packed = np.empty(form.packed_shape(n, k), np.uint8)
    scales = np.empty(form.scales_shape(n, k), form.scale_dtype)
    zeros = np.empty((n, blocks), np.uint8)
    rows_per_tile = max(1, _TILE_ELEMENTS // (blocks * form.block_size))
    for start in range(0, n, rows_per_tile):
        rows = slice(start, min(start + rows_per_tile, n))
        tile = _blocks_as_columns(weight[rows], form)
        codes, scale, zero = _fit(tile, form)
        packed[rows] = _pack(codes, form.bits).T.reshape(-1, *packed.shape[1:])
        scales[rows] = scale.reshape(-1, blocks)
        zeros[rows] = zero.reshape(-1, blocks)
    return Quantized(packed, scales, None if form.symmetric else pack_codes(zeros, form.bits))


def _quantize_in_order(weight: np.ndarray, form: Quantization, compensation: Compensation) -> Quantized:
    """Block by block, each with what the errors of those before it leave to it."""
    n, k = weight.shape
    feedback, blocks = compensation.feedback, form.blocks(k)
    errors = np.ascontiguousarray(weight.T, np.float32)  # a feature is itself until it is rounded
    if compensation.correction is not None:
        with PRODUCTS:
            errors += compensation.correction @ errors
    left = np.zeros_like(errors)  # to each feature by those before it
    codes = np.empty((blocks * form.block_size, n), np.uint8)
    scales = np.empty((blocks, n), form.scale_dtype)
    zeros = np.empty((blocks, n), np.uint8)

    def quantize_block(block: int) -> None:
        start, stop = block * form.block_size, min((block + 1) * form.block_size, k)
        within = np.tril(feedback[start:stop, start:stop], -1)
        wanted = np.zeros((form.block_size, n), np.float32)
        with PRODUCTS:
            together = np.linalg.inv(np.eye(stop - start, dtype=np.float32) + within)
            np.matmul(together, left[start:stop], out=wanted[: stop - start])
        wanted[: stop - start] += errors[start:stop]
        values, scale, zero = _fit_in_order(wanted, form, within, compensation.importance[start:stop])
        codes[start : start + form.block_size] = zero  # what K is padded with means 0
        codes[start:stop] = values + zero.astype(np.float32)
        errors[start:stop] -= values * scale.astype(np.float32)
        scales[block], zeros[block] = scale, zero

    for first, middle, last in _by_halves(0, blocks, 1):
        if middle == last:
            quantize_block(first)
            continue
        start, split, stop = (min(block * form.block_size, k) for block in (first, middle, last))
        with PRODUCTS:
            product = feedback[split:stop, start:split] @ errors[start:split]
        left[split:stop] += product
    packed = _pack(codes, form.bits).T.reshape(form.packed_shape(n, k))
    return Quantized(packed, scales.T, None if form.symmetric else pack_codes(zeros.T, form.bits))


def _fit_in_order(
    wanted: np.ndarray, form: Quantization, within: np.ndarray, importance: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A block's codes less their zero points, float32 [features, n]; scales and zero points [n].

    Later blocks make up for a block's errors e [features] as well as they can; what is left costs e^T H e,
    H = (F + I)^T D (F + I) for F `within` and D `importance`. The first codes are GPTQ's. Then, in turns, the
    scale becomes the best for the codes, and each code the best beside all others: neither raises the cost.

    Args:
        wanted: float32 [block_size, n], what the features would be, could they make up exactly for all of the
            blocks before; zeros beyond them.
    """
    size = len(within)
    counted = np.zeros(len(wanted), np.float32)
    counted[:size] = importance
    scale, zero = _fit_scale(wanted, form, counted)
    wanted = wanted[:size]
    values, errors = _round_in_order(wanted, wanted, within, scale, zero, form.bits)
    if form.bits not in _ROUNDS or not within.any():  # nearest codes are the best with their fitted scale
        return values, scale, zero
    unit = within + np.eye(size, dtype=np.float32)
    with PRODUCTS:
        cost = (unit.T * importance) @ unit
    pull = cost / np.diag(cost)[:, None]  # of the other features' errors on each
    for _ in range(_ROUNDS[form.bits]):
        with PRODUCTS:
            weighted = cost @ values
        length = np.einsum("kn,kn->n", values, weighted)
        fitted = np.einsum("kn,kn->n", wanted, weighted) / np.where(length > 0, length, np.float32(1))
        fitted = np.where(length > 0, fitted, scale.astype(np.float32))
        scale = _storable(fitted, form.scale_dtype)
        np.subtract(wanted, values * scale.astype(np.float32), out=errors)
        with PRODUCTS:
            target = np.triu(pull, 1) @ errors
        target += wanted
        values, errors = _round_in_order(target, wanted, np.tril(pull, -1), scale, zero, form.bits)
    return values, scale, zero


def _round_in_order(
    target: np.ndarray,
    wanted: np.ndarray,
    within: np.ndarray,
    scales: np.ndarray,
    zeros: np.ndarray,
    bits: int,
) -> tuple[np.ndarray, np.ndarray]:
    """A block's codes less their zero points, and what they leave of `wanted`, float32 [features, n]: by
    halves, as its weight is.

    Args:
        target: what each feature is rounded to, but for `within` times the errors of those before it.
    """
    scale, zero = scales.astype(np.float32), zeros.astype(np.float32)
    reciprocal, lowest, highest = np.float32(1) / scale, -zero, ((1 << bits) - 1) - zero
    values, errors = target.copy(), wanted.copy()

    # Each is asked for once: with few rows, what Python does around an operation takes as long as it does.
    value_of, error_of = list(values), list(errors)
    made_up = np.empty_like(scale)
    for start, middle, stop in _by_halves(0, len(values), _IN_ORDER):
        if middle < stop:
            with PRODUCTS:
                product = within[middle:stop, start:middle] @ errors[start:middle]
            values[middle:stop] += product
            continue
        for feature, factors in enumerate(within[start:stop, start:stop].tolist(), start):
            row, error = value_of[feature], error_of[feature]
            for before, factor in zip(range(start, feature), factors, strict=False):
                np.multiply(error_of[before], factor, out=made_up)
                np.add(row, made_up, out=row)
            np.multiply(row, reciprocal, out=row)
            np.rint(row, out=row)
            np.maximum(row, lowest, out=row)
            np.minimum(row, highest, out=row)
            np.multiply(row, scale, out=made_up)
            np.subtract(error, made_up, out=error)
    return values, errors


def _by_halves(start: int, stop: int, least: int) -> Iterator[tuple[int, int, int]]:
    """What makes each of `start` to `stop` up for the errors of all before it, in few products: start, middle
    and stop of what the first part leaves to the second; where the two last are the same, of `least` or fewer
    that are taken one by one."""
    if stop - start <= least:
        yield start, stop, stop
        return
    middle = (start + stop) // 2
    yield from _by_halves(start, middle, least)
    yield start, middle, stop
    yield from _by_halves(middle, stop, least)


def dequantize(quantized: Quantized, k: int, form: Quantization) -> np.ndarray:
    """float32 [N, K], by MatMulNBits' formula."""
    n, blocks, _ = quantized.packed.shape
    codes = _unpack(quantized.packed, form.bits).astype(np.float32)
    if quantized.zero_points is None:
        zeros = np.full((n, blocks), 1 << (form.bits - 1), np.float32)
    else:
        zeros = _unpack(quantized.zero_points, form.bits)[:, :blocks].astype(np.float32)
    scales = quantized.scales.astype(np.float32)
    return ((codes - zeros[..., None]) * scales[..., None]).reshape(n, -1)[:, :k]


def _blocks_as_columns(weight: np.ndarray, form: Quantization) -> np.ndarray:
    """float32 [block_size, blocks]: one block a column, so that sums over a block run along long rows."""
    k = weight.shape[1]
    if k % form.block_size:
        weight = np.pad(weight, ((0, 0), (0, -k % form.block_size)))
    columns = weight.reshape(-1, form.block_size).T
    if weight.dtype == ml_dtypes.bfloat16:  # its bits are float32's upper half: quicker than a cast
        tile = np.empty(columns.shape, np.uint32)
        np.copyto(tile, columns.view(np.uint16))
        tile <<= np.uint32(16)
        return tile.view(np.float32)
    return np.ascontiguousarray(columns, np.float32)


def _fit(tile: np.ndarray, form: Quantization) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes uint8 [block_size, blocks], scales and zero points [blocks]."""
    scale, zero = _fit_scale(tile, form)
    codes = np.empty_like(tile)
    # The codes are made with the scale as it will be stored.
    _round(tile, scale.astype(np.float32), zero, (1 << form.bits) - 1, codes)
    codes += zero
    return codes.astype(np.uint8), scale, zero.astype(np.uint8)


def _fit_scale(
    tile: np.ndarray, form: Quantization, importance: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Scales as they are stored, and zero points float32, [blocks].

    For codes q (zero point subtracted) the best scale is s = <w, q> / <q, q>, with the squared error
    |w|^2 - <w, q>^2 / <q, q>, so candidates are compared without dequantising. Of features that differ in
    `importance` [block_size] the products are weighted sums. A weight of 2 bits counts by its magnitude too:
    the least squared error shrinks the few large ones, which the model misses more
    (docs/quality.md).
    """
    levels = (1 << form.bits) - 1
    magnitude = np.abs(tile) if form.bits == 2 else None

    def summed(products: np.ndarray) -> np.ndarray:
        if magnitude is not None:
            products *= magnitude
        return products.sum(axis=0) if importance is None else importance @ products

    codes, product = np.empty_like(tile), np.empty_like(tile)
    best_gain = np.full(tile.shape[1], -1.0, np.float32)
    best_scale = np.ones(tile.shape[1], np.float32)
    best_zero = np.full(tile.shape[1], 1 << (form.bits - 1), np.float32)
    for scale, zero in _candidates(tile, form):
        _round(tile, scale, zero, levels, codes)
        overlap = summed(np.multiply(tile, codes, out=product))
        length = summed(np.multiply(codes, codes, out=product))
        fitted = overlap / np.where(length > 0, length, np.float32(1))
        gain = overlap * fitted
        better = (gain > best_gain) & (length > 0)
        np.copyto(best_gain, gain, where=better)
        np.copyto(best_scale, fitted, where=better)
        np.copyto(best_zero, zero, where=better)
    return _storable(best_scale, form.scale_dtype), best_zero


def _candidates(tile: np.ndarray, form: Quantization) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Scales and zero points [blocks] worth trying."""
    if form.bits == 2:
        spread = np.sqrt(np.square(tile).mean(axis=0))
        zero = np.full_like(spread, 2)
        for factor in _TWO_BIT_FACTORS:
            yield _nonzero(spread * np.float32(factor)), zero
    high, low = tile.max(axis=0), tile.min(axis=0)
    if form.symmetric:
        # One more code lies below the zero point than above: the extreme value goes there, whatever its
        # sign, as in llama.cpp's Q4_0.
        extreme = np.where(high > -low, high, low)
        zero = np.full_like(extreme, 1 << (form.bits - 1))
        for divisor in _SYMMETRIC_DIVISORS[form.bits]:
            yield _nonzero(extreme / np.float32(divisor)), zero
    else:
        levels = (1 << form.bits) - 1
        high, low = np.maximum(high, 0), np.minimum(low, 0)
        for factor in _ASYMMETRIC_FACTORS[form.bits]:
            scale = _nonzero((high - low) * np.float32(factor / levels))
            yield scale, np.clip(np.rint(-low * np.float32(factor) / scale), 0, levels)


def _round(tile: np.ndarray, scale: np.ndarray, zero: np.ndarray, levels: int, out: np.ndarray) -> None:
    """out = round(tile / scale), kept to the codes: -zero to levels - zero."""
    np.multiply(tile, np.float32(1) / scale, out=out)
    np.rint(out, out=out)
    np.maximum(out, -zero, out=out)
    np.minimum(out, levels - zero, out=out)


def _nonzero(scale: np.ndarray) -> np.ndarray:
    """1 for blocks of zeros, so that nothing is divided by 0 and their codes mean 0."""
    tiny = np.abs(scale) < np.finfo(np.float32).tiny
    return np.where(tiny, np.float32(1), scale)


def _storable(scale: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`scale` in `dtype`, kept within its finite, normal range."""
    limits = np.finfo(dtype)
    magnitude = np.clip(np.abs(scale), np.float32(limits.tiny), np.float32(limits.max))
    return np.copysign(magnitude, scale).astype(dtype)


def _pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 codes along axis 0 -> packed bytes along axis 0, the first code in the lowest bits."""
    per_byte = 8 // bits
    packed = codes[::per_byte]
    for place in range(1, per_byte):
        packed = packed | (codes[place::per_byte] << np.uint8(place * bits))
    return packed


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 codes [n, count] -> packed bytes along the last axis, rows in whole bytes."""
    codes = np.pad(codes, ((0, 0), (0, -codes.shape[1] % (8 // bits))))
    return np.ascontiguousarray(_pack(codes.T, bits).T)


def _unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """Packed bytes along the last axis -> uint8 codes along it."""
    if bits == 8:
        return packed
    places = np.arange(0, 8, bits, dtype=np.uint8)
    return (packed[..., None] >> places & np.uint8((1 << bits) - 1)).reshape(*packed.shape[:-1], -1)
