"""`/v1/completions`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from qwen_runtime.serve.schema.base import Integer
from qwen_runtime.serve.schema.shared import SharedRequest
from qwen_runtime.serve.schema.unsupported import COMPLETIONS

_MOST_CHOICES = 2048  # of one request

Tokens = Annotated[list[int], Field(min_length=1)]


class CompletionRequest(SharedRequest):
    unsupported: ClassVar[Mapping[str, Sequence[Any]]] = COMPLETIONS

    prompt: str | Annotated[list[str | Tokens], Field(min_length=1)] | Tokens
    max_tokens: Integer = Field(16, ge=0)
    echo: bool = False
    logprobs: Integer | None = Field(None, ge=0, le=20)

    @property
    def prompts(self) -> Sequence[str | Sequence[int]]:
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt

    @model_validator(mode="after")
    def _check_count(self) -> CompletionRequest:
        if len(self.prompts) * self.n > _MOST_CHOICES:
            raise ValueError(f"prompt and n ask for more than {_MOST_CHOICES} choices")
        return self
