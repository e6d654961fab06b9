"""Qwen3-Next and Qwen3-Coder-Next: the blocks of Qwen3.5's mixture of experts, without a vision tower.

Its projections of Gated DeltaNet are stored as two, their rows in the order of the key heads, and some layers
may have an MLP in place of experts. Names and defaults as in transformers' Qwen3NextConfig.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import AliasChoices, Field

from qwen_export.architecture.fields import Layers, Size
from qwen_export.architecture.models.qwen3_5 import MLP
from qwen_export.architecture.models.qwen3_5_moe import MoeTextConfig
from qwen_export.architecture.tensors import Fused, Table


class Qwen3NextConfig(MoeTextConfig):
    """Geometry of a Qwen3-Next model; `intermediate_size` is that of the layers without experts."""

    model_type: ClassVar[str] = "qwen3_next"
    transformers_name: ClassVar[str] = "Qwen3Next"
    has_text_section: ClassVar[bool] = False
    has_dense_layers: ClassVar[bool] = True
    always_normalised: ClassVar[bool] = False
    table: ClassVar[Table] = (*MoeTextConfig.table, *MLP)

    vocab_size: Size = 151936
    intermediate_size: Size = 5632
    num_hidden_layers: Layers = 48
    num_experts: Size = 512
    num_experts_per_tok: Size = 10
    # Published configurations do not tell of the head that their weights have.
    mtp_num_hidden_layers: int = Field(
        default=1,
        strict=True,
        ge=0,
        validation_alias=AliasChoices("mtp_num_hidden_layers", "num_nextn_predict_layers"),
    )

    @property
    def mrope_section(self) -> tuple[int, int, int]:
        """One position for every frequency."""
        return self.rotary_dim // 2, 0, 0

    @property
    def fused(self) -> tuple[Fused, ...]:
        shared = self.linear_num_value_heads // self.linear_num_key_heads  # value heads of a key head
        key, value = self.linear_key_head_dim, shared * self.linear_value_head_dim
        qkv, z, b, a = (f"linear_attn.in_proj_{name}.weight" for name in ("qkv", "z", "b", "a"))
        heads = self.linear_num_key_heads
        return (
            Fused(
                "linear_attn.in_proj_qkvz.weight", heads, ((qkv, key), (qkv, key), (qkv, value), (z, value))
            ),
            Fused("linear_attn.in_proj_ba.weight", heads, ((b, shared), (a, shared))),
        )


CONFIG = Qwen3NextConfig
