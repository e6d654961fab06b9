"""`/v1/embeddings`, and Ollama's `/api/embed` and `/api/embeddings`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import Field

from qwen_runtime.pooling import Pooling
from qwen_runtime.serve.schema.base import Body, Integer
from qwen_runtime.serve.schema.ollama import ModelName

_NO_DIMENSIONS: Mapping[str, Sequence[Any]] = {"dimensions": ()}

Tokens = Annotated[list[Integer], Field(min_length=1)]


class EmbeddingsRequest(Body):
    """`pooling` is this server's own."""

    unsupported: ClassVar[Mapping[str, Sequence[Any]]] = _NO_DIMENSIONS

    model: str | None = None
    input: str | Tokens | Annotated[list[str] | list[Tokens], Field(min_length=1)]
    encoding_format: Literal["float", "base64"] = "float"
    pooling: Pooling = "mean"

    @property
    def texts(self) -> Sequence[str | Sequence[int]]:
        one = isinstance(self.input, str) or isinstance(self.input[0], int)
        return cast(Sequence[str | Sequence[int]], [self.input] if one else self.input)


class EmbedRequest(Body):
    unsupported: ClassVar[Mapping[str, Sequence[Any]]] = _NO_DIMENSIONS

    model: ModelName | None = None
    input: str | list[str]


class OldEmbedRequest(Body):
    model: ModelName | None = None
    prompt: str
