"""config.json: the text model's geometry, and the tensors that a checkpoint of it must hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from qwen_common.errors import UserError

YARN_REACH = 4  # the largest factor that Qwen's model cards give: 262,144 trained, about a million with YaRN
_DEFAULT_EXPERTS = 256  # transformers' Qwen3_5MoeTextConfig
LayerType = Literal["linear_attention", "full_attention"]

# model_type -> where the text model's configuration lies; None is the top level.
_TEXT_CONFIG = {
    "qwen3_5_text": None,
    "qwen3_5": "text_config",
    "qwen3_5_moe_text": None,
    "qwen3_5_moe": "text_config",
}


class RopeParameters(BaseModel):
    """`rope_parameters` of config.json: the trained rotary embedding, or one that YaRN stretches.

    YaRN's fields and their defaults are those of transformers' _compute_yarn_parameters.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    # Older configurations say `type`.
    rope_type: Literal["default", "yarn"] = Field(
        "default", validation_alias=AliasChoices("rope_type", "type")
    )
    rope_theta: float = 10_000.0
    partial_rotary_factor: float = Field(default=0.25, gt=0, le=1)
    mrope_section: tuple[int, int, int] = (11, 11, 10)
    mrope_interleaved: Literal[True] = True
    factor: float = Field(default=1.0, ge=1)
    original_max_position_embeddings: int | None = Field(default=None, gt=0)
    attention_factor: float | None = Field(default=None, gt=0)
    beta_fast: float = 32
    beta_slow: float = 1
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None}

    @model_validator(mode="after")
    def _yarn_has_a_factor(self) -> RopeParameters:
        if self.rope_type == "yarn" and "factor" not in self.model_fields_set:
            raise ValueError("rope_type yarn needs a factor")
        return self


class TextConfig(BaseModel):
    """Geometry of a Qwen3.5 text model; names and defaults as in transformers' Qwen3_5TextConfig.

    A mixture of experts has `num_experts` and no `intermediate_size` (Qwen3_5MoeTextConfig).
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    vocab_size: int = Field(default=248320, gt=0)
    hidden_size: int = Field(default=4096, gt=0)
    intermediate_size: int = Field(default=12288, gt=0)
    num_hidden_layers: int = Field(default=32, gt=0)
    num_attention_heads: int = Field(default=16, gt=0)
    num_key_value_heads: int = Field(default=4, gt=0)
    head_dim: int = Field(default=256, gt=0)
    hidden_act: Literal["silu"] = "silu"
    max_position_embeddings: int = Field(default=32768, gt=0)
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: Literal[False] = False
    linear_conv_kernel_dim: int = Field(default=4, gt=1)
    linear_key_head_dim: int = Field(default=128, gt=0)
    linear_value_head_dim: int = Field(default=128, gt=0)
    linear_num_key_heads: int = Field(default=16, gt=0)
    linear_num_value_heads: int = Field(default=32, gt=0)
    full_attention_interval: int = Field(default=4, gt=0)
    layer_types: tuple[LayerType, ...] = Field(default=(), validate_default=True)
    rope_parameters: RopeParameters = Field(default=RopeParameters.model_validate({}))
    num_experts: int | None = Field(default=None, gt=0)
    num_experts_per_tok: int = Field(default=8, gt=0)
    moe_intermediate_size: int = Field(default=512, gt=0)
    shared_expert_intermediate_size: int = Field(default=512, gt=0)
    mtp_num_hidden_layers: int = Field(default=0, ge=0)
    mtp_use_dedicated_embeddings: bool = False
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
            return values
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
            "mrope_section must add up to half of the rotary dimension": sum(
                self.rope_parameters.mrope_section
            )
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

    @property
    def model_type(self) -> str:
        """The text model's type, in transformers and in ONNX Runtime GenAI."""
        return "qwen3_5_moe_text" if self.num_experts else "qwen3_5_text"

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


def load_config(folder: Path) -> TextConfig:
    """The text model's configuration from `folder`/config.json.

    Raises:
        UserError: it is missing or malformed, of a model type that is not supported, or contradicts itself.
    """
    path, content = _content(folder)
    try:
        model_type = str(content["model_type"])
        section = _TEXT_CONFIG.get(model_type)
        values = dict(content[section] if section else content)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a model configuration ({error!r}): download it again") from error
    if model_type not in _TEXT_CONFIG:
        raise UserError(f"model type '{model_type}' is not Qwen3.5: supported are {', '.join(_TEXT_CONFIG)}")
    if "_moe" in model_type:
        values.setdefault("num_experts", _DEFAULT_EXPERTS)
    if "tie_word_embeddings" in content:  # the outer model owns lm_head
        values["tie_word_embeddings"] = content["tie_word_embeddings"]
    try:
        return TextConfig(**values)
    except ValidationError as error:
        raise UserError(f"{path}: {in_words(error)}") from error


def quantization_config(folder: Path) -> Any:
    """`quantization_config` of `folder`/config.json, wherever it stands; None if the weights are floats."""
    _, content = _content(folder)
    section = _TEXT_CONFIG.get(str(content.get("model_type")))
    text = content[section] if section else content
    return content.get("quantization_config", text.get("quantization_config"))


def _content(folder: Path) -> tuple[Path, dict[str, Any]]:
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} has no config.json: give the folder of a Hugging Face checkpoint")
    try:
        return path, dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is not a model configuration ({error!r}): download it again") from error


def in_words(error: ValidationError) -> str:
    """The first thing that is wrong, with the field it is wrong in."""
    first = error.errors()[0]
    field = ".".join(map(str, first["loc"]))
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "literal_error":
        message += f" ({first['input']!r} is not supported yet)"
    return f"{field}: {message}" if field else message


def expected_shapes(config: TextConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of `config` must hold, with its shape; names as `model.X`."""
    hidden = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    for layer, layer_type in enumerate(config.layer_types):
        shapes |= _layer_shapes(config, f"model.layers.{layer}", layer_type)
    return shapes


def mtp_shapes(config: TextConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of a multi-token-prediction head of one layer, which shares embedding and lm_head."""
    hidden = config.hidden_size
    return {
        "mtp.fc.weight": (hidden, 2 * hidden),
        "mtp.pre_fc_norm_embedding.weight": (hidden,),
        "mtp.pre_fc_norm_hidden.weight": (hidden,),
        "mtp.norm.weight": (hidden,),
        **_layer_shapes(config, "mtp.layers.0", "full_attention"),
    }


def _layer_shapes(config: TextConfig, name: str, layer_type: LayerType) -> dict[str, tuple[int, ...]]:
    hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
    heads, kv = config.num_attention_heads * dim, config.num_key_value_heads * dim
    block: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    if config.num_experts:
        experts, expert, shared = (
            config.num_experts,
            config.moe_intermediate_size,
            config.shared_expert_intermediate_size,
        )
        block |= {
            "mlp.gate.weight": (experts, hidden),
            "mlp.experts.gate_up_proj": (experts, 2 * expert, hidden),
            "mlp.experts.down_proj": (experts, hidden, expert),
            "mlp.shared_expert_gate.weight": (1, hidden),
            **_mlp_shapes("mlp.shared_expert", hidden, shared),
        }
    else:
        block |= _mlp_shapes("mlp", hidden, inner)
    value_heads = config.linear_num_value_heads
    mixers: dict[LayerType, dict[str, tuple[int, ...]]] = {
        "full_attention": {
            "self_attn.q_proj.weight": (2 * heads, hidden),
            "self_attn.k_proj.weight": (kv, hidden),
            "self_attn.v_proj.weight": (kv, hidden),
            "self_attn.o_proj.weight": (hidden, heads),
            "self_attn.q_norm.weight": (dim,),
            "self_attn.k_norm.weight": (dim,),
        },
        "linear_attention": {
            "linear_attn.in_proj_qkv.weight": (config.conv_dim, hidden),
            "linear_attn.in_proj_z.weight": (config.value_dim, hidden),
            "linear_attn.in_proj_a.weight": (value_heads, hidden),
            "linear_attn.in_proj_b.weight": (value_heads, hidden),
            "linear_attn.conv1d.weight": (config.conv_dim, 1, config.linear_conv_kernel_dim),
            "linear_attn.dt_bias": (value_heads,),
            "linear_attn.A_log": (value_heads,),
            "linear_attn.norm.weight": (config.linear_value_head_dim,),
            "linear_attn.out_proj.weight": (hidden, config.value_dim),
        },
    }
    return {f"{name}.{part}": shape for part, shape in {**block, **mixers[layer_type]}.items()}


def _mlp_shapes(name: str, hidden: int, inner: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{name}.gate_proj.weight": (inner, hidden),
        f"{name}.up_proj.weight": (inner, hidden),
        f"{name}.down_proj.weight": (hidden, inner),
    }
