"""Block-wise quantisation: the stored layout on real ONNX Runtime, and the error it leaves."""

from __future__ import annotations

import gc
from itertools import product
from types import FunctionType

import ml_dtypes
import numpy as np
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper
from qwen_export.quantize import blockwise
from qwen_export.quantize.blockwise import Compensation, Quantization, Quantized, dequantize, quantize

FORMS = [
    Quantization(bits, block, symmetric, np.dtype(scale))
    for bits, block, symmetric, scale in product(
        (2, 4, 8), (16, 32, 64, 128), (True, False), (np.float32, np.float16)
    )
]


def weights(kind: str, n: int = 48, k: int = 256, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    values = {
        "gaussian": generator.standard_normal((n, k)),
        "laplace": generator.laplace(size=(n, k)),
        "outliers": generator.standard_normal((n, k)) * np.where(generator.random((n, k)) < 0.01, 10, 1),
        "one-sided": generator.random((n, k)),
    }
    return (values[kind] * 0.05).astype(np.float32)


def round_to_nearest(weight: np.ndarray, form: Quantization) -> np.ndarray:
    """The plain rule: absmax / 7 (or 127) symmetric, (max - min) / levels asymmetric."""
    blocks = weight.reshape(-1, form.block_size)
    levels = 2**form.bits - 1
    if form.symmetric:
        scale = np.abs(blocks).max(1, keepdims=True) / (levels // 2)
        return (np.clip(np.rint(blocks / scale), -(levels // 2) - 1, levels // 2) * scale).reshape(
            weight.shape
        )
    low, high = np.minimum(blocks.min(1, keepdims=True), 0), np.maximum(blocks.max(1, keepdims=True), 0)
    scale = (high - low) / levels
    zero = np.rint(-low / scale)
    return ((np.clip(np.rint(blocks / scale) + zero, 0, levels) - zero) * scale).reshape(weight.shape)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("kind", ["gaussian", "laplace", "outliers", "one-sided"])
def test_error_is_below_round_to_nearest(form: Quantization, kind: str) -> None:
    weight = weights(kind)
    ours = dequantize(quantize(weight, form), weight.shape[1], form)
    error = np.square(ours - weight).mean()
    # float16 scales are rounded; the plain rule's here are not.
    assert error <= np.square(round_to_nearest(weight, form) - weight).mean() * 1.001


@pytest.mark.parametrize("block_size", [32, 128])
@pytest.mark.parametrize("kind", ["gaussian", "laplace", "outliers"])
def test_four_bits_beat_the_usual_rules(kind: str, block_size: int) -> None:
    """By block: never worse than absmax / 7 or llama.cpp's Q4_0 (extreme / -8); by mean: clearly better."""
    form = Quantization(4, block_size, True, np.dtype(np.float32))
    weight = weights(kind, n=256, k=1024)
    blocks = weight.reshape(-1, block_size)
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(1)[:, None], axis=1)
    q4_0 = np.clip(np.rint(blocks / (extreme / -8)), -8, 7) * (extreme / -8)
    plain = round_to_nearest(weight, form).reshape(blocks.shape)
    ours = dequantize(quantize(weight, form), 1024, form).reshape(blocks.shape)
    errors = [np.square(found - blocks).mean(1) for found in (ours, plain, q4_0)]
    assert (errors[0] <= np.minimum(errors[1], errors[2]) * 1.001).all()
    assert errors[0].mean() < 0.8 * errors[1].mean()
    assert errors[0].mean() < 0.97 * errors[2].mean()


@pytest.mark.parametrize("block_size", [32, 128])
@pytest.mark.parametrize("kind", ["gaussian", "laplace"])
def test_two_bits_are_near_the_best_scale_of_all(kind: str, block_size: int) -> None:
    """By errors that count with the weights' magnitude, against 400 scales of either sign."""
    form = Quantization(2, block_size, True, np.dtype(np.float32))
    weight = weights(kind, n=64, k=512)
    blocks = weight.reshape(-1, block_size)
    ours = dequantize(quantize(weight, form), 512, form).reshape(blocks.shape)
    size = np.abs(blocks)
    best = np.full(len(blocks), np.inf)
    for factor in np.linspace(-3, 3, 400):
        codes = np.clip(np.rint(blocks / (factor * blocks.std(1, keepdims=True))), -2, 1)
        scale = (size * blocks * codes).sum(1) / np.maximum((size * codes**2).sum(1), 1e-30)
        best = np.minimum(best, (size * (blocks - codes * scale[:, None]) ** 2).sum(1))
    assert (size * (blocks - ours) ** 2).sum() < 1.03 * best.sum()


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_constant_rows_come_back(form: Quantization) -> None:
    weight = np.repeat(np.float32([[0.03], [-0.03], [1.7], [-2.5e-2]]), 256, axis=1)
    # One code only: what is lost is the rounding of the scale, in float32 that of the sums behind it.
    rtol = 1e-3 if form.scale_dtype == np.float16 else 1e-5
    np.testing.assert_allclose(dequantize(quantize(weight, form), 256, form), weight, rtol=rtol)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_shapes_and_padding(form: Quantization, dtype: type) -> None:
    weight = weights("gaussian", n=5, k=200).astype(dtype)
    stored = quantize(weight, form)
    assert stored.packed.shape == form.packed_shape(5, 200)
    assert stored.scales.shape == form.scales_shape(5, 200)
    assert (stored.zero_points is None) == form.symmetric
    if stored.zero_points is not None:
        assert stored.zero_points.shape == form.zero_points_shape(5, 200)
    whole = dequantize(stored, form.blocks(200) * form.block_size, form)
    assert (whole[:, 200:] == 0).all()
    step = np.abs(stored.scales.astype(np.float32)).max()
    assert np.abs(whole[:, :200] - weight.astype(np.float32)).max() <= 1.6 * step


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_zeros_and_lone_values(form: Quantization) -> None:
    weight = np.zeros((3, 256), np.float32)
    weight[1, 7], weight[2, 250] = 0.5, -1e-9
    stored = quantize(weight, form)
    assert np.isfinite(stored.scales).all() and (stored.scales != 0).all()
    found = dequantize(stored, 256, form)
    assert (found[0] == 0).all()
    assert found[1, 7] == pytest.approx(0.5, rel=1e-3)
    assert np.abs(found[2]).max() < 1e-3


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_rows_are_independent(form: Quantization) -> None:
    weight = weights("gaussian", n=700, k=512)
    together = quantize(weight, form)
    pieces = [quantize(part, form) for part in np.split(weight, [1, 300])]
    for name in ("packed", "scales", "zero_points"):
        whole = getattr(together, name)
        if whole is not None:
            np.testing.assert_array_equal(whole, np.concatenate([getattr(piece, name) for piece in pieces]))


@pytest.mark.parametrize("bits,symmetric", list(product((4, 8), (True, False))))
def test_what_lies_on_a_grid_comes_back_exactly(bits: int, symmetric: bool) -> None:
    form = Quantization(bits, 32, symmetric, np.dtype(np.float32))
    codes = np.random.default_rng(0).integers(0, 2**bits, (64, 128)).astype(np.float32)
    codes[:, ::32], codes[:, 1::32] = 0, 2**bits - 1  # both ends in use, so that the grid is determined
    weight = (codes - 2 ** (bits - 1)) * np.float32(0.125)
    np.testing.assert_array_equal(dequantize(quantize(weight, form), 128, form), weight)


@pytest.mark.parametrize("form", [form for form in FORMS if form.symmetric], ids=str)
def test_quantising_again_changes_nothing(form: Quantization) -> None:
    once = dequantize(quantize(weights("gaussian"), form), 256, form)
    again = dequantize(quantize(once, form), 256, form)
    # A float16 scale is found again to the bit, a float32 one to the rounding of the sums behind it.
    rtol = 0 if form.scale_dtype == np.float16 else 1e-5
    np.testing.assert_allclose(again, once, rtol=rtol, atol=0)


def test_what_codes_are_made_with_is_gone_with_them() -> None:
    """No function refers to itself, which would hold a piece's arrays until Python looks for such circles."""
    k = 64
    compensation = Compensation(np.tril(np.full((k, k), 0.1, np.float32), -1), np.ones(k, np.float32))
    gc.collect()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        quantize(weights("gaussian", k=k), Quantization(4, 32, True, np.dtype(np.float32)), compensation)
        gc.collect()
        held = [found for found in gc.garbage if isinstance(found, FunctionType)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
    assert not [found for found in held if found.__module__ == blockwise.__name__]


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_one_block_is_only_read(dtype: type) -> None:
    """A checkpoint's rows are memory-mapped: read-only. One block is where a copy would be left out."""
    form = Quantization(4, 32, True, np.dtype(np.float32))
    weight = weights("gaussian", n=1, k=32).astype(dtype)
    weight.flags.writeable = False
    before = weight.tobytes()
    error = dequantize(quantize(weight, form), 32, form) - weight.astype(np.float32)
    assert weight.tobytes() == before
    assert np.linalg.norm(error) < 0.15 * np.linalg.norm(weight.astype(np.float32))


def matmul_nbits(
    x: np.ndarray, stored: Quantized, n: int, k: int, form: Quantization, level: int
) -> np.ndarray:
    tensors = {"B": stored.packed, "scales": stored.scales}
    if stored.zero_points is not None:
        tensors["zero_points"] = stored.zero_points
    node = helper.make_node(
        "MatMulNBits", ["A", *tensors], ["Y"], domain="com.microsoft", N=n, K=k, bits=form.bits,
        block_size=form.block_size, accuracy_level=level,
    )  # fmt: skip
    dtype = helper.np_dtype_to_tensor_dtype(x.dtype)
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("A", dtype, list(x.shape))],
        [helper.make_tensor_value_info("Y", dtype, None)],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"A": x})[0]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("k", [256, 200])
@pytest.mark.parametrize("level", [0, 4])
def test_onnxruntime_reads_the_layout(form: Quantization, k: int, level: int) -> None:
    weight = weights("gaussian", n=40, k=k)
    stored = quantize(weight, form)
    if form.symmetric and form.bits == 4:
        assert (stored.scales < 0).any(), "negative scales are part of what is tested"
    exact = 1e-5 if form.scale_dtype == np.float32 else 2e-3
    tolerance = exact if level == 0 else 2e-2  # level 4: int8 activations
    for rows in (1, 7):  # one row has a kernel of its own: the decode step
        x = np.random.default_rng(1).standard_normal((rows, k)).astype(form.scale_dtype)
        expected = x.astype(np.float32) @ dequantize(stored, k, form).T
        found = matmul_nbits(x, stored, 40, k, form, level)
        assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()
