"""The rotary embedding's parameters, as config.json has them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, Strict, model_validator

from qwen_export.architecture.fields import Flag, Positions, Real

_MOST_FACTOR = 1024
_Pairs = Annotated[int, Strict(), Field(ge=0)]


class RopeParameters(BaseModel):
    """`rope_parameters` of config.json: the trained rotary embedding, or one that YaRN stretches.

    YaRN's fields and their defaults are those of transformers' _compute_yarn_parameters.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    # Older configurations say `type`.
    rope_type: Literal["default", "yarn"] = Field(
        "default", validation_alias=AliasChoices("rope_type", "type")
    )
    rope_theta: Real = Field(default=10_000.0, gt=0)
    partial_rotary_factor: Real = Field(default=0.25, gt=0, le=1)
    mrope_section: tuple[_Pairs, _Pairs, _Pairs] = (11, 11, 10)
    mrope_interleaved: Literal[True] = True
    factor: Real = Field(default=1.0, ge=1, le=_MOST_FACTOR)
    original_max_position_embeddings: Positions | None = None
    attention_factor: Real | None = Field(default=None, gt=0)
    beta_fast: Real = Field(default=32, gt=0)
    beta_slow: Real = Field(default=1, gt=0)
    mscale: Real | None = Field(default=None, ge=0)
    mscale_all_dim: Real | None = Field(default=None, ge=0)
    truncate: Flag = True

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if any(isinstance(value, dict) for value in values.values()):
            raise ValueError("one rotary embedding for all layers is supported, not one for each kind")
        return {name: value for name, value in values.items() if value is not None}

    @model_validator(mode="after")
    def _yarn_can_stretch(self) -> RopeParameters:
        if self.rope_type == "yarn" and "factor" not in self.model_fields_set:
            raise ValueError("rope_type yarn needs a factor")
        if self.rope_type == "yarn" and self.rope_theta <= 1:
            raise ValueError("rope_type yarn needs a rope_theta above 1")
        return self
