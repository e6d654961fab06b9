"""llama-server's `/tokenize` and `/detokenize`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field

from qwen_runtime.serve.schema.base import Body, Integer


class TokenizeRequest(Body):
    """`add_special` changes nothing: Qwen's tokenizer puts no token before a text."""

    unsupported: ClassVar[Mapping[str, Sequence[Any]]] = {"parse_special": (True,)}

    model: str | None = None
    content: str
    with_pieces: bool = False


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: list[Annotated[Integer, Field(ge=0, lt=2**31)]]
