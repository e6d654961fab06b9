"""Qwen3.5, mixture of experts: the dense model with routed experts and a shared one in place of the MLP.

Names and defaults as in transformers' Qwen3_5MoeTextConfig.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import BeforeValidator, Field, Strict, model_validator

from qwen_export.architecture.fields import Layers, Size
from qwen_export.architecture.models.qwen3_5 import BACKBONE, TextConfig
from qwen_export.architecture.tensors import Table, floats, matrix

_Layer = Annotated[int, Strict(), Field(ge=0)]
_MLP = "model.layers.{sparse}.mlp"
_SHARED = f"{_MLP}.shared_expert"
_SHARED_SIZE = "shared_expert_intermediate_size"
# gate_up_proj is an expert's gate rows, then its up rows. A router is never quantised: a wrong choice of
# experts costs far more than the bytes.
EXPERTS: Table = (
    floats(f"{_MLP}.gate.weight", "router", "num_experts", "hidden_size"),
    matrix(f"{_MLP}.experts.gate_up_proj", "experts", "num_experts", "gate_up_dim", "hidden_size"),
    matrix(f"{_MLP}.experts.down_proj", "experts", "num_experts", "hidden_size", "moe_intermediate_size"),
    floats(f"{_MLP}.shared_expert_gate.weight", "router", 1, "hidden_size"),
    matrix(f"{_SHARED}.gate_proj.weight", "shared_expert", _SHARED_SIZE, "hidden_size"),
    matrix(f"{_SHARED}.up_proj.weight", "shared_expert", _SHARED_SIZE, "hidden_size"),
    matrix(f"{_SHARED}.down_proj.weight", "shared_expert", "hidden_size", _SHARED_SIZE),
)


class MoeTextConfig(TextConfig):
    """Geometry of a Qwen3.5 mixture of experts; `intermediate_size` means nothing here.

    Attributes:
        has_dense_layers: whether a layer may have one MLP in place of experts.
        always_normalised: the chosen experts' weights add up to 1 whatever `norm_topk_prob` says.
    """

    model_type: ClassVar[str] = "qwen3_5_moe_text"
    genai_type: ClassVar[str] = "qwen3_5_moe_text"
    transformers_name: ClassVar[str] = "Qwen3_5Moe"
    has_dense_layers: ClassVar[bool] = False
    always_normalised: ClassVar[bool] = True
    table: ClassVar[Table] = (*BACKBONE, *EXPERTS)

    hidden_size: Size = 2048
    num_hidden_layers: Layers = 40
    num_key_value_heads: Size = 2
    num_experts: Size = 256
    num_experts_per_tok: Size = 8
    moe_intermediate_size: Size = 512
    shared_expert_intermediate_size: Size = 512
    norm_topk_prob: Annotated[bool, Strict()] = True
    decoder_sparse_step: Size = 1
    mlp_only_layers: Annotated[tuple[_Layer, ...], BeforeValidator(lambda layers: layers or ())] = ()

    @model_validator(mode="after")
    def _enough_experts(self) -> MoeTextConfig:
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError("num_experts_per_tok must be at most num_experts")
        return self

    @model_validator(mode="after")
    def _normalised_where_there_is_no_choice(self) -> MoeTextConfig:
        if self.always_normalised and not self.norm_topk_prob:
            raise ValueError(f"norm_topk_prob: false is not supported: {self.model_type} always normalises")
        return self

    @model_validator(mode="after")
    def _dense_layers_where_there_can_be(self) -> MoeTextConfig:
        if not self.has_dense_layers and self.dense_layers:
            raise ValueError(
                "mlp_only_layers and decoder_sparse_step take the experts from layer "
                f"{min(self.dense_layers)}, and {self.model_type} has them in every layer"
            )
        return self

    @property
    def dense_layers(self) -> frozenset[int]:
        return frozenset(
            layer
            for layer in range(self.num_hidden_layers)
            if layer in self.mlp_only_layers or (layer + 1) % self.decoder_sparse_step
        )

    @property
    def gate_up_dim(self) -> int:
        return 2 * self.moe_intermediate_size


CONFIG = MoeTextConfig
