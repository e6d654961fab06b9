"""Which operators, on which types, each execution provider has a kernel for: data, of the operators we use.

Source: ONNX Runtime's docs/OperatorKernels.md. WebGPU and OpenVINO publish no such table.

`KERNELS` has an entry for each provider of `qwen_common.providers`.
"""

from __future__ import annotations

FLOAT = frozenset({"tensor(float)", "tensor(float16)"})
INTEGERS = frozenset(f"tensor({sign}int{bits})" for sign in ("", "u") for bits in (8, 16, 32, 64))
NUMBERS = FLOAT | INTEGERS
ANY = NUMBERS | {"tensor(bool)", "tensor(double)"}
Kernels = dict[str, dict[str, frozenset[str]]]  # domain -> operator -> types of T, the main input

_CONTRIB = "com.microsoft"
DIRECTML: Kernels = {
    "": {
        **dict.fromkeys(["Add", "Equal", "Greater", "LessOrEqual", "Min", "Mul", "Sub", "TopK"], NUMBERS),
        **dict.fromkeys(["Cast", "Concat", "Gather", "Reshape", "Shape", "Slice", "Split", "Squeeze"], ANY),
        **dict.fromkeys(["Expand", "ScatterElements", "Tile", "Transpose", "Unsqueeze", "Where"], ANY),
        **dict.fromkeys(["Conv", "Cos", "Div", "Exp", "Floor", "MatMul", "Sigmoid", "Sin", "Softmax"], FLOAT),
        **dict.fromkeys(["LayerNormalization", "Softplus", "SimplifiedLayerNormalization"], FLOAT),
        "ReduceSum": FLOAT,
        "CumSum": FLOAT | {"tensor(int32)", "tensor(int64)"},
        "Range": frozenset({"tensor(float)", "tensor(int16)", "tensor(int32)", "tensor(int64)"}),
    },
    _CONTRIB: dict.fromkeys(
        [
            "FusedMatMul",
            "Gelu",
            "MatMulNBits",
            "MultiHeadAttention",
            "QuickGelu",
            "SkipSimplifiedLayerNormalization",
        ],
        FLOAT,
    ),
}
# What the fused lowering uses besides. CUDA's QMoE is left out: it wants the experts' codes in another order.
CUDA: Kernels = {
    "": DIRECTML[""],
    _CONTRIB: {
        **DIRECTML[_CONTRIB],
        **dict.fromkeys(["FastGelu", "MoE", "RotaryEmbedding"], FLOAT),
        "GroupQueryAttention": frozenset({"tensor(float16)"}),
    },
}
CPU: Kernels = {
    "": DIRECTML[""],
    _CONTRIB: {
        **CUDA[_CONTRIB],
        **dict.fromkeys(["CausalConvWithState", "GatedRMSNorm", "GroupQueryAttention"], FLOAT),
        **dict.fromkeys(["LinearAttention", "LinearAttentionGate", "QMoE"], FLOAT),
    },
}

# By the provider's key; None where no table is published.
KERNELS: dict[str, Kernels | None] = {
    "cpu": CPU,
    "cuda": CUDA,
    "dml": DIRECTML,
    "webgpu": None,
    "openvino": None,
}
