"""What both kinds of completions share."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ConfigDict, Field

from qwen_runtime.serve.schema.base import Body, Integer, Number, Options
from qwen_runtime.serve.schema.messages import ResponseFormat

Choices = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=1000)]


class StreamOptions(Options):
    include_usage: bool = False


class StructuredOutputs(Options):
    """vLLM's."""

    model_config = ConfigDict(extra="forbid")

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    json_object: bool = False
    regex: str | None = None
    choice: Choices | None = None


class SharedRequest(Body):
    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Number | None = Field(None, ge=0, le=2)
    top_p: Number | None = Field(None, gt=0, le=1)
    top_k: Integer | None = Field(None, ge=-1)
    min_p: Number | None = Field(None, ge=0, le=1)
    repetition_penalty: Number | None = Field(None, gt=0)
    seed: Integer | None = None
    n: Integer = Field(1, ge=1, le=128)
    stop: str | Annotated[list[str], Field(max_length=1000)] | None = None
    logit_bias: (
        dict[Annotated[int, Field(strict=False)], Annotated[Number, Field(ge=-100, le=100)]] | None
    ) = None
    stop_token_ids: list[int] = Field(default_factory=list)
    min_tokens: Integer = Field(0, ge=0)
    ignore_eos: bool = False
    response_format: ResponseFormat | None = None
    json_schema: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    structured_outputs: StructuredOutputs | None = None
    presence_penalty: Number | None = Field(None, ge=-2, le=2)
    frequency_penalty: Number | None = Field(None, ge=-2, le=2)

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def stops(self) -> list[str]:
        """Texts at which to stop."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []
