"""How likely given tokens are, and how fast answers come: for measurements, not for answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from qwen_common.errors import UserError

from qwen_runtime.backends.protocol import Backend, Logits, LogitsGenerator
from qwen_runtime.prefill import append
from qwen_runtime.sampling import GREEDY


def feed(generator: LogitsGenerator, token: int, appends: bool) -> None:
    """Go on with `token`, as if it had been generated.

    Args:
        appends: the generator takes tokens after others; otherwise it is made to choose this one.
    """
    if appends:
        generator.append_tokens(np.asarray([token], np.int32))
        return
    logits = generator.get_logits()
    logits[...] = -np.inf
    logits[..., token] = 0
    generator.set_logits(logits)
    generator.generate_next_token()


@dataclass(frozen=True)
class Scorer:
    """Runs given tokens through a loaded artifact.

    Attributes:
        context_length: most tokens of a sequence.
        end_tokens: ids that end an answer.
    """

    backend: Backend
    context_length: int
    end_tokens: frozenset[int]

    def score(self, tokens: Sequence[int], prompt: int) -> Iterator[Logits]:
        """As `Model.score`."""
        self._check(tokens)
        appends = self.backend.chunk_size is not None
        if not appends and not self.end_tokens.isdisjoint(tokens[prompt:]):
            raise UserError(f"on {self.backend.provider} the text must not have tokens that end an answer")
        generator = self.backend.logits_generator(GREEDY, None, len(tokens) + 1)
        append(generator, tokens[:prompt], self.backend.chunk_size, lambda done: False)
        for token in [*tokens[prompt:], None]:
            logits = generator.get_logits()
            yield logits.reshape(-1, logits.shape[-1])[-1].copy()
            if token is not None:
                feed(generator, token, appends)

    def logprobs(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """As `Model.logprobs`."""
        if self.backend.shows_logits:
            scored = [
                logits[token] - np.logaddexp.reduce(logits, dtype=np.float64)
                for logits, token in zip(self.score(tokens[:-1], 1), tokens[1:], strict=True)
            ]
            return np.asarray(scored, np.float32)
        self._check(tokens)
        return self.backend.logprobs(tokens)

    def pace(self, tokens: Sequence[int], prompt: int) -> Iterator[None]:
        """As `Model.pace`."""
        if self.backend.shows_logits:
            yield from (None for _ in self.score(tokens, prompt))
            return
        options = {**GREEDY, "ignore_eos": True}
        generator = self.backend.generator(options, None, len(tokens) + 2)
        generator.append_tokens(np.asarray(tokens[:prompt], np.int32))
        for _ in range(len(tokens) - prompt + 1):
            generator.generate_next_token()
            while not len(generator.get_next_tokens()):  # a chunk of a long prompt was read
                generator.generate_next_token()
            yield

    def _check(self, tokens: Sequence[int]) -> None:
        if len(tokens) >= self.context_length:
            raise UserError(f"{len(tokens)} tokens do not fit the context of {self.context_length}")
