"""`/v1/completions`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field

from qwen_runtime.serve.schema.base import Integer
from qwen_runtime.serve.schema.shared import SharedRequest
from qwen_runtime.serve.schema.unsupported import COMPLETIONS


class CompletionRequest(SharedRequest):
    unsupported: ClassVar[Mapping[str, Sequence[Any]]] = COMPLETIONS

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=1)]
    max_tokens: Integer = Field(16, ge=1)
    logprobs: Integer | None = Field(None, ge=0, le=20)
