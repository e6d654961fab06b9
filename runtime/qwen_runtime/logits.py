"""Logits: what changes them before a token is chosen, and what is reported of them."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from qwen_runtime.backends.protocol import Logits
from qwen_runtime.sampling import Sampling
from qwen_runtime.tokenizer import Tokenizer

_NO_CHANCE = 1000.0  # its exponential is infinite, and float32 still tells such logits apart


class Candidate(NamedTuple):
    """A token that might have been chosen; text, raw and logprob as of a `TokenLogprob`."""

    text: str
    logprob: float
    raw: bytes


@dataclass(frozen=True)
class TokenLogprob:
    """How likely the model found a token that it wrote or read, before temperature and penalties.

    Attributes:
        text: the token, alone; a part of a character shows as U+FFFD.
        raw: its bytes, which together with its neighbours' are those of the text.
        offset: where its text begins in the answer, in characters; each part of a character where that does.
        logprob: natural logarithm of its probability; None where nothing is before it.
        top: the likeliest tokens at its place, likeliest first.
    """

    text: str
    raw: bytes
    offset: int
    logprob: float | None
    top: tuple[Candidate, ...]

    @classmethod
    def first(cls, token: int, tokenizer: Tokenizer) -> TokenLogprob:
        """Of a prompt's first token."""
        return cls(tokenizer.decode([token], special=True), tokenizer.raw(token), 0, None, ())


@dataclass(frozen=True)
class LogitsProcessor:
    """Penalties, bias and min_p, unknown to ONNX Runtime GenAI.

    Attributes:
        presence_penalty: subtracted from the logit of each token that the answer has already.
        frequency_penalty: the same, as often as it has it.
        logit_bias: added to these tokens' logits at each place.
        min_p: tokens less than this many times as likely as the likeliest are ruled out; 0 rules none out.
        temperature: at which they are compared.
        not_before: how many tokens the answer has before an id may be chosen.
    """

    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    min_p: float = 0.0
    temperature: float = 1.0
    not_before: Mapping[int, int] = field(default_factory=dict)

    @classmethod
    def from_sampling(
        cls, sampling: Sampling, options: Mapping[str, Any], not_before: Mapping[int, int]
    ) -> LogitsProcessor:
        """Args:
        options: the search options that `sampling` comes to, with the artifact's own defaults.
        """
        samples = options.get("do_sample", False)
        min_p = options.get("min_p", 0.0) if sampling.min_p is None else sampling.min_p
        return cls(
            presence_penalty=sampling.presence_penalty or 0.0,
            frequency_penalty=sampling.frequency_penalty or 0.0,
            logit_bias=sampling.logit_bias or {},
            min_p=min_p if samples else 0.0,  # the likeliest is never ruled out
            temperature=options.get("temperature", 1.0),
            not_before=not_before,
        )

    def search_options(self) -> dict[str, Any]:
        """Those that change something, but bias, as OpenVINO GenAI's own options."""
        options = {name: getattr(self, name) for name in ("presence_penalty", "frequency_penalty", "min_p")}
        return {name: value for name, value in options.items() if value}

    def changes(self, counts: Mapping[int, int]) -> bool:
        """Whether it changes anything after an answer that has these tokens so often."""
        fixed = bool(self.logit_bias) or self.min_p > 0
        return fixed or self._penalises(counts) or bool(self._early(counts))

    def __call__(self, logits: Logits, counts: Mapping[int, int]) -> None:
        """Change `logits`, [..., vocab], in place."""
        if self._penalises(counts):
            tokens = np.fromiter(counts, np.int64)
            often = np.fromiter(counts.values(), np.float32)
            logits[..., tokens] -= self.presence_penalty + self.frequency_penalty * often
        if self.logit_bias:
            logits[..., list(self.logit_bias)] += np.fromiter(self.logit_bias.values(), np.float32)
        if early := self._early(counts):
            logits[..., early] -= _NO_CHANCE * self.temperature  # a grammar may leave nothing else
        if self.min_p > 0:
            unlikely = logits < logits.max() + self.temperature * math.log(self.min_p)
            # Not to minus infinity: a grammar, which comes next, may leave none of the others.
            logits[unlikely] -= _NO_CHANCE * self.temperature

    def _early(self, counts: Mapping[int, int]) -> list[int]:
        """Ids whose time has not come."""
        if not self.not_before:
            return []
        written = sum(counts.values())
        return [token for token, fewest in self.not_before.items() if written < fewest]

    def _penalises(self, counts: Mapping[int, int]) -> bool:
        return bool(counts) and (self.presence_penalty != 0 or self.frequency_penalty != 0)


def token_logprob(logits: Logits, token: int, offset: int, count: int, tokenizer: Tokenizer) -> TokenLogprob:
    """What is reported of `token`, with the `count` likeliest.

    Args:
        logits: [vocab], at its place.
    """

    def candidate(token: int) -> Candidate:
        return Candidate(
            tokenizer.decode([token], special=True), float(logprobs[token]), tokenizer.raw(token)
        )

    highest = logits.max()
    logprobs = logits - (highest + np.log(np.exp(logits - highest, dtype=np.float64).sum()))
    likeliest = np.argpartition(-logits, count)[:count]
    likeliest = likeliest[np.argsort(-logits[likeliest])]
    top = tuple(candidate(int(other)) for other in likeliest)
    found = candidate(token)
    return TokenLogprob(found.text, found.raw, offset, found.logprob, top)


def within(logprobs: Sequence[TokenLogprob], length: int) -> int:
    """How many of these tokens begin in the first `length` characters of their answer."""
    return bisect_left(logprobs, length, key=lambda entry: entry.offset)
