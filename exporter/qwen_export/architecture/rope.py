"""The rotary embedding's parameters, as config.json has them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, model_validator


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
