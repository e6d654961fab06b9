"""QMoE of ONNX Runtime's CPU provider reads MXFP4 and NVFP4 experts as ml_dtypes decodes them.

No recipe makes them; those of checkpoints are carried over: docs/checkpoints.md.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from tests.exporter.graph.test_experts_kernel import CHOSEN, EXPERTS, mixture

# quant_type -> block, a scale's type in ml_dtypes and in ONNX, least and most of its bytes here
FORMS = {
    "fp4": (32, ml_dtypes.float8_e8m0fnu, TensorProto.FLOAT8E8M0, (118, 126)),
    "nvfp4": (16, ml_dtypes.float8_e4m3fn, TensorProto.FLOAT8E4M3FN, (16, 48)),
}


def stack(name: str, n: int, k: int, kind: str) -> tuple[list[TensorProto], np.ndarray]:
    """Random experts [EXPERTS, n, k]: what the node takes, and the values that this stands for."""
    block, dtype, onnx_type, (least, most) = FORMS[kind]
    rng = np.random.default_rng(n)
    codes = rng.integers(0, 16, (EXPERTS, n, k), np.uint8)
    scales = rng.integers(least, most, (EXPERTS, n, k // block), np.uint8)
    whole = rng.uniform(0.5, 2, EXPERTS).astype(np.float32)
    packed = codes[..., ::2] | codes[..., 1::2] << 4  # along K, low nibble first
    values = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    values *= np.repeat(scales.view(dtype).astype(np.float32), block, axis=-1) * whole[:, None, None]
    tensors = [
        helper.make_tensor(f"{name}.codes", TensorProto.UINT8, packed.shape, packed.tobytes(), raw=True),
        helper.make_tensor(f"{name}.scales", onnx_type, scales.shape, scales.tobytes(), raw=True),
        helper.make_tensor(f"{name}.global", TensorProto.FLOAT, whole.shape, whole.tobytes(), raw=True),
    ]
    return tensors, values


@pytest.mark.parametrize("kind", FORMS)
def test_codes_scales_and_global_scales_are_read_as_assumed(kind: str) -> None:
    inner, hidden = 96, 64
    up, both = stack("up", 2 * inner, hidden, kind)
    down, back = stack("down", hidden, inner, kind)
    inputs = ["x", "logits", "up.codes", "up.scales", "", "down.codes", "down.scales"]
    inputs += [""] * 8 + ["up.global", "down.global"]
    made = helper.make_node(
        "QMoE", inputs, ["y"], domain="com.microsoft", k=CHOSEN, normalize_routing_weights=1,
        activation_type="swiglu", swiglu_fusion=1, activation_alpha=1.0, activation_beta=0.0,
        expert_weight_bits=4, block_size=FORMS[kind][0], quant_type=kind, weights_prepacked=1,
    )  # fmt: skip
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["tokens", size])
        for name, size in (("x", hidden), ("logits", EXPERTS), ("y", hidden))
    ]
    graph = helper.make_graph([made], "experts", ends[:2], ends[2:], up + down)
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, hidden)).astype(np.float32)
    logits = rng.standard_normal((5, EXPERTS)).astype(np.float32)
    expected = mixture(x, logits, both, back)
    (found,) = session.run(None, {"x": x, "logits": logits})
    # The kernel rounds something: 0.6% were seen, whatever the accuracy_level.
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()
