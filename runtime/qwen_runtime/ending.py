"""Which tokens end an answer, and from when on they may be chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwen_common.errors import UserError

from qwen_runtime.request import Request

_NEVER = 2**31


@dataclass(frozen=True)
class Ending:
    """Attributes:
    model: ids with which the model ends its answers.
    further: ids at which to stop too.
    min_tokens: how many tokens an answer has before any of them.
    ignored: whether the model's own are never chosen.
    """

    model: frozenset[int]
    further: frozenset[int] = frozenset()
    min_tokens: int = 0
    ignored: bool = False

    @classmethod
    def of(cls, request: Request, end_tokens: frozenset[int], vocab_size: int) -> Ending:
        """Raises:
        UserError: there is no such token.
        """
        further = frozenset(request.stop_token_ids)
        if wrong := [token for token in further if not 0 <= token < vocab_size]:
            raise UserError(f"stop_token_ids has {wrong[0]}, but they go from 0 to {vocab_size - 1}")
        return cls(end_tokens, further, request.min_tokens, request.ignore_eos)

    @property
    def tokens(self) -> frozenset[int]:
        return self.model | self.further

    @property
    def not_before(self) -> Mapping[int, int]:
        """How many tokens an answer has before an id may be chosen."""
        found = dict.fromkeys(self.tokens, self.min_tokens) if self.min_tokens else {}
        return {**found, **dict.fromkeys(self.model, _NEVER)} if self.ignored else found

    def search_options(self) -> dict[str, Any]:
        """As OpenVINO GenAI's own options. What it ignores it writes all the same, and goes on."""
        options = {
            "ignore_eos": self.ignored,
            "min_new_tokens": self.min_tokens,
            "stop_token_ids": set(self.further),
        }
        return {name: value for name, value in options.items() if value}
