"""What a model's name stands for: a loaded artifact, or an adapter of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from qwen_runtime.info import ModelInfo
from qwen_runtime.request import Request
from qwen_runtime.serve.answer import Answer
from qwen_runtime.serve.engine import Engine

T = TypeVar("T")


@dataclass(frozen=True)
class Served:
    """One of the models that a server lists.

    Attributes:
        adapter: what `engine` answers with; None: nothing, it is the model itself.
    """

    engine: Engine
    adapter: str | None = None

    @property
    def name(self) -> str:
        return self.adapter or self.engine.info.name

    @property
    def parent(self) -> str | None:
        """The model whose adapter it is."""
        return None if self.adapter is None else self.engine.info.name

    @property
    def info(self) -> ModelInfo:
        """Of the engine, with this name."""
        return replace(self.engine.info, name=self.name)

    async def submit(self, request: Request, admitted: bool = False) -> Answer:
        """As `Engine.submit`, answered with the adapter."""
        return await self.engine.submit(replace(request, adapter=self.adapter), admitted)

    async def ask(self, function: Callable[..., T], *arguments: Any) -> T:
        """As `Engine.ask`."""
        return await self.engine.ask(function, *arguments)

    async def ask_in_turn(self, function: Callable[..., T], *arguments: Any) -> T:
        """As `Engine.ask_in_turn`."""
        return await self.engine.ask_in_turn(function, *arguments)
