"""One answer on its way from the worker process to its client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable

from qwen_runtime.logits import TokenLogprob
from qwen_runtime.serve.errors import request_failed
from qwen_runtime.serve.worker import Done, Failed, Piece, Reply, Started
from qwen_runtime.speculative.acceptance import Acceptance


class Answer:
    """One answer as it grows. Iterate it for pieces of text, and close it whatever happens.

    Attributes:
        prompt_tokens: number of tokens of the prompt.
        prompt_read: how many of them are read, those of `cached_tokens` too.
        cached_tokens: how many of them did not have to be read.
        completion_tokens: number of tokens of the answer, once it has ended.
        logprobs: of the tokens whose text was not in a piece, once it has ended.
        finish_reason: "stop" or "length", once it has ended.
        stop_string: the text that stopped it, if it was one.
        acceptance: of drafted tokens, once it has ended; None unless decoding is speculative.
    """

    def __init__(self, job_id: int, cancel: Callable[[int], None]) -> None:
        self.id = job_id
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.completion_tokens = 0
        self.logprobs: tuple[TokenLogprob, ...] = ()
        self.finish_reason = ""
        self.stop_string: str | None = None
        self.acceptance: Acceptance | None = None
        self.replies: asyncio.Queue[Reply] = asyncio.Queue()
        self.ended = False  # the worker has nothing more to say about it
        self.begun = time.monotonic()
        self.prompt_read = 0
        self.spoke = False
        self._cancel = cancel

    async def start(self) -> None:
        """Wait until the worker has accepted the prompt.

        Raises:
            ApiError: the prompt or an option is at fault, or the worker failed.
        """
        reply = await self._next()
        assert isinstance(reply, Started)
        self.prompt_tokens = reply.prompt_tokens
        self.cached_tokens = reply.cached_tokens

    def progress(self) -> str | None:
        """How far the prompt is read, in a line; None once the answer has begun."""
        return None if self.spoke else f"prompt: {self.prompt_read} of {self.prompt_tokens} tokens"

    def __aiter__(self) -> AsyncIterator[Piece]:
        return self

    async def __anext__(self) -> Piece:
        reply = await self._next()
        if isinstance(reply, Piece):
            return reply
        assert isinstance(reply, Done)
        self.completion_tokens = reply.completion_tokens
        self.finish_reason = reply.finish_reason
        self.stop_string = reply.stop_string
        self.logprobs = reply.logprobs
        self.acceptance = reply.acceptance
        raise StopAsyncIteration

    async def _next(self) -> Reply:
        reply = await self.replies.get()
        if isinstance(reply, Failed):
            raise request_failed(reply.message, reply.user_error, reply.sizes)
        return reply

    def close(self) -> None:
        """Stop the work, if there is any left."""
        if not self.ended:
            self._cancel(self.id)
