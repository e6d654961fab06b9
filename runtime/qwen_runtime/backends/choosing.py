"""The next token from logits, for libraries that only compute those: sampling, and guidance by llguidance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from qwen_runtime.backends.protocol import Logits

# Settings where nobody says otherwise.
DEFAULTS: dict[str, Any] = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "random_seed": None,
}


class Guide(Protocol):
    """What an answer is held to."""

    def mask(self, logits: Logits) -> None:
        """Rule out, in `logits` [vocab], each token that cannot come next."""

    def take(self, token: int) -> None:
        """This one comes next."""

    def forced(self) -> Sequence[int]:
        """Those that must come next, as far as that is known; none where there is a choice."""


class ChoosingGenerator:
    """One sequence, a `LogitsGenerator`. What computes the logits is a subclass's `_read`."""

    def __init__(self, settings: Mapping[str, Any], max_length: int, guide: Guide | None = None) -> None:
        """Args:
        settings: of the names in `DEFAULTS`; others are left alone.
        """
        self._settings = {**DEFAULTS, **settings}
        self._max_length = max_length
        self._guide = guide
        self._random = np.random.default_rng(self._settings["random_seed"])
        self._tokens: list[int] = []  # that were read
        self._pending: list[int] = []  # a token that was chosen, and is read when the next logits are wanted
        self._logits: Logits = np.zeros((1, 1, 0), np.float32)

    def append_tokens(self, tokens: npt.NDArray[np.int32]) -> None:
        new = [*self._pending, *(int(token) for token in tokens)]
        self._logits = self._read(new)
        self._tokens += new
        self._pending = []

    def get_logits(self) -> Logits:
        """float32 [1, 1, vocab] after the last token."""
        if self._pending:
            self.append_tokens(np.empty(0, np.int32))
        return self._logits

    def set_logits(self, logits: Logits) -> None:
        self._logits = logits

    def generate_next_token(self) -> None:
        logits = self.get_logits().reshape(-1)
        if self._guide is not None:
            logits = logits.copy()
            self._guide.mask(logits)
        token = choose(logits, self._tokens, self._settings, self._random)
        if self._guide is not None:
            self._guide.take(token)
        self._pending = [token]

    def get_next_tokens(self) -> npt.NDArray[np.int64]:
        return np.array(self._pending, np.int64)

    def is_done(self) -> bool:
        return len(self._tokens) + len(self._pending) >= self._max_length

    def _read(self, tokens: Sequence[int]) -> Logits:
        """Run `tokens` after those that were read: the logits, float32 [1, 1, vocab], after the last one."""
        raise NotImplementedError


def choose(
    logits: npt.NDArray[np.float32],
    before: list[int],
    settings: Mapping[str, Any],
    random: np.random.Generator,
) -> int:
    """The next token's id: the likeliest, or drawn as temperature, top_k and top_p say.

    Args:
        logits: [vocab].
        before: prompt and answer so far, which `repetition_penalty` makes less likely.
    """
    if settings["repetition_penalty"] != 1 and before:
        seen = np.unique(before)
        scale = np.where(logits[seen] > 0, 1 / settings["repetition_penalty"], settings["repetition_penalty"])
        logits = logits.copy()
        logits[seen] *= scale
    if not settings["do_sample"]:
        return int(logits.argmax())
    count = settings["top_k"]
    # A vocabulary of 248,000 is sorted in 20 ms: only what can be drawn.
    likeliest = np.argpartition(-logits, count)[:count] if 0 < count < len(logits) else np.arange(len(logits))
    order = likeliest[np.argsort(-logits[likeliest], kind="stable")]
    weights = np.exp((logits[order] - logits[order[0]]).astype(np.float64) / settings["temperature"])
    weights /= weights.sum()
    kept = weights.cumsum() - weights < settings["top_p"]  # those before which the sum is not reached yet
    return int(random.choice(order[kept], p=weights[kept] / weights[kept].sum()))
