"""Where guesses at the next tokens come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen_runtime.speculative.sessions import StatefulSession, zeros

_LONGEST, _SHORTEST = 4, 2  # tokens of a match: of one token it is hardly ever right for long
_MOST_BY_HEAD = 3  # the further ones are seldom right, and each costs a run of the head
_OWN = "own_hidden_states"
# Tokens that the head reads before it drafts; older ones it does without. More are not right more often
# (docs/speculative.md), and where the head is asked seldom they are most of its time.
_MOST_UNSEEN = 32


@dataclass(frozen=True)
class Draft:
    """Tokens that may come next.

    Attributes:
        source: those of one source are right equally often.
        place: where the tokens stand in the text that they were found in.
    """

    tokens: Sequence[int]
    source: str
    place: int | None = None


class PromptLookup:
    """What followed the last tokens where they stand in the prompt or the answer already.

    The longest match of 4 to 2 tokens, and of several the latest. Source: Saxena, Prompt Lookup Decoding
    (2023); transformers' `prompt_lookup_num_tokens`.
    """

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}  # place after a run of tokens
        self._indexed = 0

    def draft(self, tokens: Sequence[int], most: int) -> Draft | None:
        """Args:
        tokens: prompt and answer so far; from call to call they only grow.
        """
        # What ends at the last token has nothing after it yet.
        for end in range(self._indexed + 1, len(tokens)):
            for size in range(_SHORTEST, min(_LONGEST, end) + 1):
                self._after[tuple(tokens[end - size : end])] = end
        self._indexed = max(self._indexed, len(tokens) - 1)
        for size in range(min(_LONGEST, len(tokens)), _SHORTEST - 1, -1):
            place = self._after.get(tuple(tokens[-size:]))
            if place is not None:
                return Draft(tokens[place : place + most], f"a match of {size} tokens", place)
        return None


class Head:
    """The checkpoint's multi-token-prediction head: one token from the decoder's last hidden state, and
    further ones from the head's own.

    Attributes:
        most: tokens of a draft.
    """

    source = "the MTP head"

    def __init__(self, session: Any, capacity: int) -> None:
        """Args:
        capacity: most tokens that it reads.
        """
        self._session = StatefulSession(session, zeros(session, capacity))
        shows = any(output.name == _OWN for output in session.get_outputs())  # earlier exports do not
        self.most = _MOST_BY_HEAD if shows else 1
        self._tokens: list[int] = []  # that it has not read
        self._hidden: list[npt.NDArray[Any]] = []  # for each, that of the token before
        self._last: npt.NDArray[Any] | None = None
        self._read = 0  # of the tokens that come next

    def saw(self, tokens: Sequence[int], hidden: npt.NDArray[Any]) -> None:
        """The decoder has read these; `hidden` [1, tokens, hidden_size] is what it made of them."""
        if (more := len(tokens) - _MOST_UNSEEN) > 0:
            self._read, self._last = 0, hidden[:, more - 1 : more]
            tokens, hidden = tokens[more:], hidden[:, more:]
        for at, token in enumerate(tokens):
            if self._read:
                self._read -= 1
            elif self._last is not None:
                self._tokens.append(token)
                self._hidden.append(self._last)
            self._last = hidden[:, at : at + 1]
        del self._tokens[:-_MOST_UNSEEN], self._hidden[:-_MOST_UNSEEN]

    def draft(self, token: int, count: int = 1) -> Draft | None:
        """The `count` tokens, at least 1, after `token`, which the decoder reads next."""
        if self._last is None or self._read:
            return None
        unseen, hidden = [*self._tokens, token], np.concatenate([*self._hidden, self._last], axis=1)
        found = self._session(unseen, hidden_states=hidden)
        self._session.keep(len(unseen))
        self._tokens, self._hidden, self._read = [], [], 1
        guesses = [int(found["logits"][0, -1].argmax())]
        for _ in range(count - 1):
            found = self._session(guesses[-1:], hidden_states=found[_OWN])
            self._session.keep(1)
            guesses.append(int(found["logits"][0, -1].argmax()))
        # Its keys and values of guesses are made of its own states: those of the decoder come in their place.
        self._session.forget(count - 1)
        return Draft(guesses, self.source)
