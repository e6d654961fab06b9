"""What is asked of the model's process beside answers. Each function runs there; see `Engine.ask`."""

from __future__ import annotations

from collections.abc import Sequence

from qwen_runtime.model import Model
from qwen_runtime.pooling import Pooling, Vector
from qwen_runtime.request import Request


def tokenize(model: Model, text: str) -> list[int]:
    return model.encode(text)


def token_bytes(model: Model, tokens: list[int]) -> list[bytes]:
    return [model.token_bytes(token) for token in tokens]


def detokenize(model: Model, tokens: list[int]) -> str:
    """With the special tokens, so that it can be tokenized again."""
    return model.decode(tokens, special=True)


def prompt_text(model: Model, request: Request) -> str:
    """As the chat template makes it."""
    return model.prompt(request).text


def prompt_tokens(model: Model, request: Request) -> int:
    """How many a request's prompt has, those of its images included."""
    return len(model.prompt(request).tokens)


def embed(model: Model, text: str | Sequence[int], pooling: Pooling) -> tuple[Vector, int]:
    """The vector, and how many tokens the text has."""
    tokens = model.encode(text) if isinstance(text, str) else text
    return model.embed(tokens, pooling), len(tokens)
