"""What each runtime that an artifact is made for can really run: data, not conditions.

A block asks its target for a contrib operator by name and falls back to operators that every target has.

Sources: ONNX Runtime's table of kernels (docs/OperatorKernels.md) and its DirectML provider's operators.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Target:
    """One class of ONNX Runtime builds.

    Attributes:
        name: the lowering's name in profiles and manifests.
        onnxruntime: the versions that can load the result.
        operators: com.microsoft operators that the graph may use.
        zero_points_required: MatMulNBits must be given its zero points. DirectML's kernel
            dequantises without subtracting the default zero point when the input is absent.
        exact_blocks: MatMulNBits' block size must divide K into an even number of blocks. DirectML
            describes B as [N, K], and reads zero points with rows padded to an even count: those of 4 bits
            must fill whole bytes, and those of 8 bits are wrong by 80 to 170% where the count is odd (12
            single nodes, run on the DirectML of onnxruntime-genai-winml 0.18).
        silu_inside: GatedRMSNorm and CausalConvWithState apply SiLU themselves. The CPU's kernels do so value
            by value and several times slower than QuickGelu, which is vectorised.
    """

    name: str
    onnxruntime: str
    operators: frozenset[str]
    zero_points_required: bool = False
    exact_blocks: bool = False
    silu_inside: bool = True

    def has(self, operator: str) -> bool:
        return operator in self.operators


_EVERYWHERE = frozenset(
    {
        "FusedMatMul",
        "Gelu",
        "MatMulNBits",
        "MultiHeadAttention",
        "QuickGelu",
        "SkipSimplifiedLayerNormalization",
    }
)

FUSED = Target(
    name="fused",
    onnxruntime=">=1.30",
    operators=_EVERYWHERE
    | {
        "CausalConvWithState",
        "FastGelu",
        "GatedRMSNorm",
        "GroupQueryAttention",
        "LinearAttention",
        "LinearAttentionGate",
        "MoE",
        "QMoE",
        "RotaryEmbedding",
    },
)

# DirectML has a GroupQueryAttention kernel, but it takes the past as empty whenever a run has more than
# one token, so a prompt that arrives in pieces would be answered wrongly and without an error.
PORTABLE = Target(
    name="portable",
    onnxruntime=">=1.24",
    operators=_EVERYWHERE,
    zero_points_required=True,
    exact_blocks=True,
)

CONTRIB_OPERATORS = FUSED.operators | PORTABLE.operators


def target_for(lowering: str, provider: str) -> Target:
    target = {FUSED.name: FUSED, PORTABLE.name: PORTABLE}[lowering]
    return replace(target, silu_inside=provider != "cpu")
