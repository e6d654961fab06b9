"""Several answers to one request: to each of its prompts, or more than one to the same."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

from qwen_runtime.request import Request
from qwen_runtime.serve.common import SEEDS, usage
from qwen_runtime.serve.engine import Answer
from qwen_runtime.serve.served import Served
from qwen_runtime.speculative.acceptance import Acceptance


def variants(request: Request, count: int) -> list[Request]:
    """`request`, `count` times, with seeds that follow one another where it has one.

    Without one the prompt is read once where states are kept: nothing is read ahead before the last answer.
    """
    seed = request.sampling.seed
    seeds = [None if seed is None else (seed + at) % SEEDS for at in range(count)]
    return [
        replace(request, sampling=replace(request.sampling, seed=seed), read_ahead=at == count - 1)
        for at, seed in enumerate(seeds)
    ]


class Answers:
    """The answers to `requests`, one after the other: each waits for its turn. Close it whatever happens.

    Args:
        each: how many of them have the same prompt; they follow one another.

    Attributes:
        usage: OpenAI's, of the answers that have ended. A prompt with several answers counts once.
    """

    def __init__(self, served: Served, requests: Sequence[Request], each: int = 1) -> None:
        self._served, self._requests, self._each = served, requests, each
        self._current: Answer | None = None
        self._read = self._cached = self._written = 0
        self._predicted: Acceptance | None = None  # where a prediction was given and can be of use

    async def start(self) -> None:
        """Wait until the first prompt was accepted.

        Raises:
            ApiError: as `Engine.submit`.
        """
        self._current = await self._served.submit(self._requests[0])

    async def __aiter__(self) -> AsyncIterator[tuple[int, Answer]]:
        """Each with its place; iterate it to its end before the next.

        Raises:
            ApiError: as `Engine.submit`, of a later prompt.
        """
        for at, request in enumerate(self._requests):
            if at:
                self._current = await self._served.submit(request, admitted=True)
            answer = self._current
            assert answer is not None, "start first"
            yield at, answer
            if at % self._each == 0:
                self._read += answer.prompt_tokens
                self._cached += answer.cached_tokens
            self._written += answer.completion_tokens
            if request.prediction and (found := answer.acceptance) is not None:
                total = self._predicted = self._predicted or Acceptance()
                total.predicted += found.predicted
                total.accepted_predicted += found.accepted_predicted

    @property
    def usage(self) -> dict[str, Any]:
        found = usage(self._read, self._written, self._cached)
        if (predicted := self._predicted) is not None:
            found["completion_tokens_details"] = {
                "accepted_prediction_tokens": predicted.accepted_predicted,
                "rejected_prediction_tokens": predicted.predicted - predicted.accepted_predicted,
            }
        return found

    def progress(self) -> str | None:
        """As `Answer.progress`, of the one at work."""
        return None if self._current is None else self._current.progress()

    def close(self) -> None:
        if self._current is not None:
            self._current.close()
