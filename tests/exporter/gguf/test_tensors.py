"""Blocks of codes, kept and dequantised."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from qwen_common.errors import UserError
from qwen_export.checkpoint.tensors.tensor import Fp4Tensor, PrequantizedTensor
from qwen_export.gguf.file import Stored
from qwen_export.gguf.tensors import joined, rows, tensor
from qwen_export.quantize import blockwise
from qwen_export.quantize.blockwise import Quantization, Quantized
from qwen_export.quantize.fp4 import MXFP4, dequantize_fp4

N, K = 24, 256


def stored(kind: Kind, data: np.ndarray, folder: Path) -> Stored:
    path = folder / f"{kind.name}.bin"
    path.write_bytes(b"before" + data.tobytes())
    return Stored("weight", kind, (N, K), path, len(b"before"))


def values() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((N, K), np.float32)


def q4_1(zero: float) -> np.ndarray:
    """Blocks whose minimum is `zero` times the scale."""
    rng = np.random.default_rng(0)
    blocks = np.empty((N, K // 32, 20), np.uint8)
    scales = rng.integers(1, 50, (N, K // 32)).astype(np.float16) / np.float16(64)
    blocks[..., :2] = scales[..., None].view(np.uint8)
    blocks[..., 2:4] = (scales * np.float16(-zero))[..., None].view(np.uint8)
    blocks[..., 4:] = rng.integers(0, 256, (N, K // 32, 16))
    return blocks.reshape(N, -1)


def kept(found: PrequantizedTensor, start: int, stop: int, block: int = 32) -> np.ndarray:
    """What a kernel makes of the codes."""
    assert found.scheme
    form = Quantization(found.scheme.bits, block, found.scheme.symmetric, np.dtype(np.float32), True)
    codes, scales, *zeros = found.packed(start, stop, form)
    packed = codes.reshape(form.packed_shape(stop - start, K))
    return blockwise.dequantize(Quantized(packed, scales, zeros[0] if zeros else None), K, form)


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q8_0, Kind.Q4_1])
@pytest.mark.parametrize("heads", [(), (2, 0, 3, 1), tuple(reversed(range(8)))])
def test_codes_are_kept(kind: Kind, heads: tuple[int, ...], tmp_path: Path) -> None:
    data = q4_1(5) if kind is Kind.Q4_1 else quantize(values(), kind)
    found = tensor(stored(kind, data, tmp_path), (N, K), heads)
    meant = dequantize(data, kind)
    if heads:
        meant = meant.reshape(N, len(heads), -1)[:, heads].reshape(N, K)
    assert isinstance(found, PrequantizedTensor)
    for start, stop in ((0, N), (3, 4), (N - 1, N)):
        np.testing.assert_array_equal(found.read(start, stop), meant[start:stop])
        for block in (16, 32):
            np.testing.assert_array_equal(kept(found, start, stop, block), meant[start:stop])


def test_experts_codes_of_mxfp4_are_kept(tmp_path: Path) -> None:
    data = quantize(values(), Kind.MXFP4)
    found = tensor(stored(Kind.MXFP4, data, tmp_path), (N, K))
    assert isinstance(found, Fp4Tensor) and found.fp4 == MXFP4 and found.fp4_factor() == 1
    codes, scales = found.packed_fp4()
    (kept,) = dequantize_fp4(codes[None], scales[None], np.ones(1, np.float32), MXFP4)
    np.testing.assert_array_equal(kept, dequantize(data, Kind.MXFP4))
    data[3, 17] = 255  # the scale of a row's second block
    with pytest.raises(UserError, match="holds NaN or Inf"):
        tensor(stored(Kind.MXFP4, data, tmp_path), (N, K)).packed_fp4()
    turned = tensor(stored(Kind.MXFP4, data, tmp_path), (N, K), (1, 0))
    assert isinstance(turned, Fp4Tensor) and turned.fp4 is None


def test_parts_of_rows_that_are_no_whole_blocks_are_dequantised(tmp_path: Path) -> None:
    data, heads = quantize(values(), Kind.Q8_0), tuple(reversed(range(16)))
    found = tensor(stored(Kind.Q8_0, data, tmp_path), (N, K), heads)
    assert isinstance(found, PrequantizedTensor) and found.scheme is None
    meant = dequantize(data, Kind.Q8_0).reshape(N, 16, -1)[:, ::-1].reshape(N, K)
    np.testing.assert_array_equal(found.read(0, N), meant)


@pytest.mark.parametrize("zero", [2.5, -1, 16])
def test_minima_that_are_no_zero_points_are_dequantised(zero: float, tmp_path: Path) -> None:
    data = q4_1(zero)
    found = tensor(stored(Kind.Q4_1, data, tmp_path), (N, K))
    assert isinstance(found, PrequantizedTensor) and found.scheme is None
    np.testing.assert_array_equal(found.read(0, N), dequantize(data, Kind.Q4_1))
    whole = q4_1(3)
    whole[-1, -20:] = data[-1, -20:]
    found = tensor(stored(Kind.Q4_1, whole, tmp_path), (N, K))
    assert isinstance(found, PrequantizedTensor) and found.scheme is None


def test_rows_of_several_places_are_joined(tmp_path: Path) -> None:
    data = quantize(values(), Kind.Q4_0)
    whole = stored(Kind.Q4_0, data, tmp_path)
    order = [(16, 24), (0, 4), (8, 16)]
    parts = [tensor(part, part.shape) for part in (rows(whole, *place) for place in order)]
    found, floats = joined(parts), dequantize(data, Kind.Q4_0)
    meant = np.concatenate([floats[slice(*place)] for place in order])
    assert isinstance(found, PrequantizedTensor) and found.shape == (20, K)
    for start, stop in ((0, 20), (7, 13), (12, 20), (8, 12)):
        np.testing.assert_array_equal(found.read(start, stop), meant[start:stop])
        np.testing.assert_array_equal(kept(found, start, stop), meant[start:stop])


DEQUANTISED = [
    *(Kind.Q5_0, Kind.Q5_1, Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.IQ4_NL, Kind.IQ4_XS),
    *(Kind.IQ3_S, Kind.IQ3_XXS, Kind.IQ2_S, Kind.IQ2_XS, Kind.IQ2_XXS, Kind.IQ1_S, Kind.MXFP4, Kind.TQ1_0),
]


@pytest.mark.parametrize("kind", DEQUANTISED, ids=lambda kind: kind.name)
def test_other_types_are_dequantised_by_the_library(kind: Kind, tmp_path: Path) -> None:
    block, size = GGML_QUANT_SIZES[kind]
    # Bytes below 60 make small floats, wherever in a block its scales are.
    data = np.random.default_rng(0).integers(0, 60, (N, K // block * size), np.uint8)
    found = tensor(stored(kind, data, tmp_path), (N, K))
    assert not isinstance(found, PrequantizedTensor)
    np.testing.assert_array_equal(found.read(2, 20), dequantize(data, kind)[2:20])


def test_what_is_no_weight_is_refused(tmp_path: Path) -> None:
    data = quantize(values(), Kind.Q8_0)
    data[5, :2] = np.float16(np.nan).reshape(1).view(np.uint8)
    found = tensor(stored(Kind.Q8_0, data, tmp_path), (N, K))
    assert isinstance(found, PrequantizedTensor)
    found.read(0, 5)
    for read in (lambda: found.read(4, 6), lambda: kept(found, 4, 6)):
        with pytest.raises(UserError, match="holds NaN or Inf"):
            read()
    with pytest.raises(UserError, match="weight is I32, which is not supported yet"):
        tensor(stored(Kind.I32, np.zeros((N, K), np.int32), tmp_path), (N, K))
