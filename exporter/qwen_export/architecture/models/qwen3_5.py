"""Qwen3.5, dense: the text model's geometry, and its tensors.

Names and defaults as in transformers' Qwen3_5TextConfig.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from qwen_common.errors import UserError

from qwen_export.architecture.fields import Flag, Layers, Positions, Real, Size, Taps
from qwen_export.architecture.rope import RopeParameters
from qwen_export.architecture.tensors import Fused, Table, TensorSpec, expand, floats, matrix

YARN_REACH = 4  # the largest factor that Qwen's model cards give: 262,144 trained, about a million with YaRN
LayerType = Literal["linear_attention", "full_attention"]

EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
_ATTENTION = "model.layers.{full_attention}.self_attn"
_GATED_DELTA_NET = "model.layers.{linear_attention}.linear_attn"
# All but the second block of each layer, which the families differ in. q_proj alternates query and gate, head
# by head; in_proj_qkv is queries, keys and values one after the other.
BACKBONE: Table = (
    matrix(EMBEDDING, "embedding", "vocab_size", "hidden_size"),
    floats("model.norm.weight", "norm", "hidden_size"),
    matrix(LM_HEAD, "lm_head", "vocab_size", "hidden_size"),
    floats("model.layers.{layer}.input_layernorm.weight", "norm", "hidden_size"),
    floats("model.layers.{layer}.post_attention_layernorm.weight", "norm", "hidden_size"),
    matrix(f"{_ATTENTION}.q_proj.weight", "attention", "query_gate_dim", "hidden_size"),
    matrix(f"{_ATTENTION}.k_proj.weight", "attention", "kv_dim", "hidden_size"),
    matrix(f"{_ATTENTION}.v_proj.weight", "attention", "kv_dim", "hidden_size"),
    matrix(f"{_ATTENTION}.o_proj.weight", "attention", "hidden_size", "query_dim"),
    floats(f"{_ATTENTION}.q_norm.weight", "norm", "head_dim"),
    floats(f"{_ATTENTION}.k_norm.weight", "norm", "head_dim"),
    matrix(f"{_GATED_DELTA_NET}.in_proj_qkv.weight", "linear_attention", "conv_dim", "hidden_size"),
    matrix(f"{_GATED_DELTA_NET}.in_proj_z.weight", "linear_attention", "value_dim", "hidden_size"),
    matrix(f"{_GATED_DELTA_NET}.in_proj_a.weight", "gate", "linear_num_value_heads", "hidden_size"),
    matrix(f"{_GATED_DELTA_NET}.in_proj_b.weight", "gate", "linear_num_value_heads", "hidden_size"),
    floats(f"{_GATED_DELTA_NET}.conv1d.weight", "conv", "conv_dim", 1, "linear_conv_kernel_dim"),
    floats(f"{_GATED_DELTA_NET}.dt_bias", "gate", "linear_num_value_heads"),
    floats(f"{_GATED_DELTA_NET}.A_log", "gate", "linear_num_value_heads"),
    floats(f"{_GATED_DELTA_NET}.norm.weight", "norm", "linear_value_head_dim"),
    matrix(f"{_GATED_DELTA_NET}.out_proj.weight", "linear_attention", "hidden_size", "value_dim"),
)
MLP: Table = (
    matrix("model.layers.{dense}.mlp.gate_proj.weight", "mlp", "intermediate_size", "hidden_size"),
    matrix("model.layers.{dense}.mlp.up_proj.weight", "mlp", "intermediate_size", "hidden_size"),
    matrix("model.layers.{dense}.mlp.down_proj.weight", "mlp", "hidden_size", "intermediate_size"),
)


class TextConfig(BaseModel):
    """Geometry of a Qwen3.5 text model.

    Attributes:
        model_type: the text model's, in transformers.
        genai_type: the same in ONNX Runtime GenAI.
        transformers_name: begins the names of its classes in transformers.
        has_text_section: whether a model_type without `_text` has it in a section of config.json.
        table: its tensors.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")
    model_type: ClassVar[str] = "qwen3_5_text"
    genai_type: ClassVar[str] = "qwen3_5_text"
    transformers_name: ClassVar[str] = "Qwen3_5"
    has_text_section: ClassVar[bool] = True
    table: ClassVar[Table] = (*BACKBONE, *MLP)

    vocab_size: Size = 248320
    hidden_size: Size = 4096
    intermediate_size: Size = 12288
    num_hidden_layers: Layers = 32
    num_attention_heads: Size = 16
    num_key_value_heads: Size = 4
    head_dim: Size = 256
    hidden_act: Literal["silu"] = "silu"
    max_position_embeddings: Positions = 32768
    rms_norm_eps: Real = Field(default=1e-6, ge=0)
    tie_word_embeddings: Flag = False
    attention_bias: Literal[False] = False
    attn_output_gate: Literal[True] = True
    # Of Gated DeltaNet. Two names of one function; that of `attn_output_gate` is a sigmoid.
    output_gate_type: Literal["swish", "silu", None] = None
    linear_conv_kernel_dim: Taps = 4
    linear_key_head_dim: Size = 128
    linear_value_head_dim: Size = 128
    linear_num_key_heads: Size = 16
    linear_num_value_heads: Size = 32
    full_attention_interval: Size = 4
    layer_types: tuple[LayerType, ...] = Field(default=(), validate_default=True)
    rope_parameters: RopeParameters = Field(default=RopeParameters.model_validate({}))
    mtp_num_hidden_layers: int = Field(default=0, strict=True, ge=0)
    mtp_use_dedicated_embeddings: Flag = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    @field_validator("layer_types", mode="before")
    @classmethod
    def _from_interval(cls, types: object, info: ValidationInfo) -> object:
        if types or not info.data.keys() >= {"num_hidden_layers", "full_attention_interval"}:
            return types
        interval = info.data["full_attention_interval"]
        return tuple(
            "linear_attention" if (layer + 1) % interval else "full_attention"
            for layer in range(info.data["num_hidden_layers"])
        )

    @model_validator(mode="before")
    @classmethod
    def _one_place_for_rope(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Gather what older configurations say elsewhere, in the same order as transformers."""
        rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
        if not isinstance(rope, dict):
            return {**values, "rope_parameters": rope}
        top = {name: values[name] for name in ("rope_theta", "partial_rotary_factor") if name in values}
        return {**values, "rope_parameters": {**top, **rope}}

    @model_validator(mode="after")
    def _consistent(self) -> TextConfig:
        checks = {
            "layer_types must name each of num_hidden_layers": len(self.layer_types)
            == self.num_hidden_layers,
            "num_key_value_heads must divide num_attention_heads": self.num_attention_heads
            % self.num_key_value_heads
            == 0,
            "linear_num_key_heads must divide linear_num_value_heads": self.linear_num_value_heads
            % self.linear_num_key_heads
            == 0,
            "head_dim times partial_rotary_factor must be an even number, 2 or more": self.rotary_dim > 0
            and self.rotary_dim % 2 == 0,
            "mrope_section must add up to half of the rotary dimension": sum(self.mrope_section)
            == self.rotary_dim // 2,
        }
        for message, holds in checks.items():
            if not holds:
                raise ValueError(message)
        return self

    @property
    def trained_positions(self) -> int:
        """Tokens that the rotary embedding was trained for, before YaRN."""
        return self.rope_parameters.original_max_position_embeddings or self.max_position_embeddings

    @property
    def positions(self) -> int:
        """Tokens that the rotary embedding is made for. Published configurations leave
        max_position_embeddings at the trained length when they ask for YaRN."""
        stretched = int(self.trained_positions * self.rope_parameters.factor)
        return stretched if self.rope_parameters.rope_type == "yarn" else self.max_position_embeddings

    def reaching(self, tokens: int) -> TextConfig:
        """The same model for contexts of `tokens`: stretched by YaRN if they are more than `positions`.

        Raises:
            UserError: YaRN does not reach so far.
        """
        if tokens <= self.positions:
            return self
        limit = max(self.positions, YARN_REACH * self.trained_positions)
        if tokens > limit:
            raise UserError(
                f"a context of {tokens} tokens is more than this checkpoint can do: {self.trained_positions} "
                f"as trained, {limit} with YaRN; give --max-context {limit} or less"
            )
        changes = {
            "rope_type": "yarn",
            "factor": tokens / self.trained_positions,
            "original_max_position_embeddings": self.trained_positions,
            "attention_factor": None,
        }
        rope = self.rope_parameters.model_copy(update=changes)
        return self.model_copy(update={"rope_parameters": rope})

    def tensors(self) -> dict[str, TensorSpec]:
        """Every tensor that a checkpoint must hold, by name (`model.X`); a tied embedding is lm_head's."""
        layers = {
            kind: [layer for layer, found in enumerate(self.layer_types) if found == kind]
            for kind in get_args(LayerType)
        }
        every = range(self.num_hidden_layers)
        second = {"dense": self.dense_layers, "sparse": set(every) - self.dense_layers}
        specs = expand(self.table, self, {"layer": every, **layers, **second})
        if self.tie_word_embeddings:
            specs[EMBEDDING] = specs.pop(LM_HEAD)
        return specs

    @property
    def dense_layers(self) -> frozenset[int]:
        """Those whose second block is one MLP; the others' is a mixture of experts."""
        return frozenset(range(self.num_hidden_layers))

    @property
    def fused(self) -> tuple[Fused, ...]:
        """Tensors that its checkpoints may store as one."""
        return ()

    @property
    def mrope_section(self) -> tuple[int, int, int]:
        """How many pairs of the rotary dimension turn by the temporal position, the height and the width."""
        return self.rope_parameters.mrope_section

    @property
    def query_dim(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def query_gate_dim(self) -> int:
        """Queries, and a gate for each of their elements."""
        return 2 * self.query_dim

    @property
    def kv_dim(self) -> int:
        return self.num_key_value_heads * self.head_dim

    @property
    def rotary_dim(self) -> int:
        """Leading elements of each attention head that are rotated."""
        return int(self.head_dim * self.rope_parameters.partial_rotary_factor)

    @property
    def key_dim(self) -> int:
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def value_dim(self) -> int:
        return self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of Gated DeltaNet's convolution: queries, keys and values."""
        return 2 * self.key_dim + self.value_dim

    @property
    def mtp_input_dim(self) -> int:
        """A token's embedding and the decoder's hidden state, side by side."""
        return 2 * self.hidden_size


CONFIG = TextConfig
