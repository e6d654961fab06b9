"""What each runtime that an artifact is made for can really run: data, not conditions.

A block asks its target for a contrib operator by name and falls back to operators that every target has.

What one provider lacks, or asks of a graph, stands in its record, `qwen_common.providers`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from qwen_common.providers import PROVIDERS


@dataclass(frozen=True)
class Target:
    """One class of ONNX Runtime builds.

    Attributes:
        name: the lowering's name in profiles and manifests.
        onnxruntime: the versions that can load the result, where no node needs a newer one.
        operators: com.microsoft operators that the graph may use.
        zero_points_required: MatMulNBits must be given its zero points.
        exact_blocks: MatMulNBits' block size must divide K, and into an even number of blocks.
        fp4_experts: the ONNX Runtime from which on QMoE reads 4-bit floats; None: it does not.
        silu_inside: GatedRMSNorm and CausalConvWithState apply SiLU themselves.
    """

    name: str
    onnxruntime: str
    operators: frozenset[str]
    zero_points_required: bool = False
    exact_blocks: bool = False
    fp4_experts: str | None = None
    silu_inside: bool = True

    def has(self, operator: str) -> bool:
        return operator in self.operators


def _target(name: str, onnxruntime: str, operators: frozenset[str]) -> Target:
    """It loads on every provider that has kernels for it, whichever it is made for, and so minds what each of
    them asks."""
    loads_on = [provider for provider in PROVIDERS.values() if name in provider.lowerings]
    return Target(
        name,
        onnxruntime,
        operators,
        zero_points_required=any(provider.zero_points_required for provider in loads_on),
        exact_blocks=any(provider.exact_blocks for provider in loads_on),
    )


_EVERYWHERE = frozenset(
    {
        "Gelu",
        "MatMulNBits",
        "MultiHeadAttention",
        "QuickGelu",
        "SkipSimplifiedLayerNormalization",
    }
)
_FUSED_ONLY = {
    "CausalConvWithState",
    "FastGelu",
    "FusedMatMul",
    "GatedRMSNorm",
    "GroupQueryAttention",
    "LinearAttention",
    "LinearAttentionGate",
    "MoE",
    "QMoE",
    "RotaryEmbedding",
}

FUSED = _target("fused", ">=1.30", _EVERYWHERE | _FUSED_ONLY)
# DirectML has a GroupQueryAttention kernel, but it takes the past as empty whenever a run has more than
# one token, so a prompt that arrives in pieces would be answered wrongly and without an error.
PORTABLE = _target("portable", ">=1.24", _EVERYWHERE)

CONTRIB_OPERATORS = FUSED.operators | PORTABLE.operators
_LOWERINGS = {FUSED.name: FUSED, PORTABLE.name: PORTABLE}


def target_for(lowering: str, provider: str) -> Target:
    """The lowering's target, without the operators that the provider lacks."""
    target, record = _LOWERINGS[lowering], PROVIDERS[provider]
    return replace(
        target,
        operators=target.operators - record.lacks,
        fp4_experts=record.fp4_experts,
        silu_inside=record.silu_inside,
    )
