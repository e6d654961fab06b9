"""Whether drafts pay, and how many in a run: found out from what runs take and how often drafts are right."""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from statistics import median

from qwen_runtime.speculative.drafts import Draft

_PAYS = 1.05  # times as many tokens a second
_LOSS = (
    0.015  # most of the time that may be lost; the rest of 2% is what a plain step costs more than GenAI's
)
_GRACE = 1  # tokens' time that may be lost before that: the first runs are slower
_SURE = 3  # runs of a length, before it is believed to be slow
_PROBE = 64  # steps after which drafts that do not pay are tried again
_RECENT = 15  # runs of one length
_FORGET = 0.97  # weight of what is one token older
_MEMORY = 0.999  # the same of time that was lost
_ROW = 0.35  # of a run of one token, what each further one costs before it was measured
_PLAIN = 5  # runs of one token before drafts are compared with them
_STALE = 128  # runs of several after which one token is measured again: its time grows with the context


class Switch:
    """Of one loaded model; its answers learn from each other, those that are made at the same time too.

    Args:
        most: drafts in a run.
        always: check all drafts, whether they pay or not, for measurements.
    """

    def __init__(self, most: int, always: bool = False) -> None:
        self._most, self._always = most, always
        self._seconds: dict[int, deque[float]] = defaultdict(
            lambda: deque(maxlen=_RECENT)
        )  # by tokens in a run
        # By source, for each token.
        self._drafting: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_RECENT))
        self._right: dict[str, tuple[float, float]] = defaultdict(lambda: (1.0, 2.0))  # of so many drafts
        self._refused: dict[str, int] = defaultdict(int)  # in a row
        self._elapsed = self._lost = 0.0
        self._since_plain = 0  # runs of several tokens
        self._lock = threading.Lock()

    def count(self, draft: Draft) -> int:
        """How many tokens of `draft` to check in the next run; 0: it is one of one token."""
        longest = min(len(draft.tokens), self._most)
        if self._always:
            return longest
        with self._lock:
            return self._count(draft.source, longest)

    def _count(self, source: str, longest: int) -> int:
        if len(self._seconds[1]) < _PLAIN or self._since_plain >= _STALE:
            return 0
        if self._lost > _LOSS * self._elapsed + _GRACE * self._plain():
            return 0
        pays, count = max((self._pays(source, count), count) for count in range(longest + 1))
        if count and pays < _PAYS:
            count = 0
        self._refused[source] = 0 if count else self._refused[source] + 1
        if self._refused[source] >= _PROBE:
            self._refused[source], count = 0, min(1, longest)
        return count

    def took(self, tokens: int, seconds: float) -> None:
        """A run of so many tokens has; it brings the first of them."""
        with self._lock:
            self._seconds[tokens].append(seconds)
            self._since_plain = 0 if tokens == 1 else self._since_plain + 1
            self._pass(seconds, self._plain() if tokens > 1 else seconds)

    def settled(self, seconds: float) -> None:
        """Going back to runs of one token took so long, and brought one."""
        with self._lock:
            self._pass(seconds, self._plain())

    def drafted(self, source: str, seconds: float, tokens: int = 1) -> None:
        """A draft of so many took so long to make."""
        with self._lock:
            self._drafting[source].append(seconds / tokens)
            self._pass(seconds, 0.0)

    def yielded(self) -> None:
        """A token that was drafted is right."""
        with self._lock:
            self._pass(0.0, self._plain())

    def judged(self, source: str, right: bool) -> None:
        """A token of a draft was chosen, or another one."""
        with self._lock:
            found, total = self._right[source]
            self._right[source] = found * _FORGET + right, total * _FORGET + 1

    def _pass(self, seconds: float, spared: float) -> None:
        """Args:
        spared: what plain decoding would have taken.
        """
        self._elapsed = self._elapsed * _MEMORY + seconds
        self._lost = max(0.0, self._lost * _MEMORY + seconds - spared)  # what was won is not there to be lost

    def _pays(self, source: str, count: int) -> float:
        """Tokens a second with so many drafts in a run, without any = 1."""
        if not count:
            return 1.0
        found, total = self._right[source]
        rate, one = found / total, self._run(1)
        tokens = sum(rate**at for at in range(count + 1))
        drafting = count * min(self._drafting[source], default=0.0)
        return tokens * one / (self._run(count + 1) + drafting)

    def _plain(self) -> float:
        """Seconds that a run of one token takes, with what other work on the machine adds."""
        return median(self._seconds[1]) if self._seconds[1] else 0.0

    def _run(self, tokens: int) -> float:
        """Seconds that a run of so many takes where nothing disturbs it; of a length that was hardly tried,
        what the nearest one lets expect."""
        one = min(self._seconds[1])
        if tokens == 1:
            return one
        sure = {
            length: min(times)
            for length, times in self._seconds.items()
            if length > 1 and len(times) >= _SURE
        }
        if tokens in sure:
            return sure[tokens]
        nearest = min(sure, key=lambda length: abs(length - tokens), default=None)
        row = _ROW * one if nearest is None else (sure[nearest] - one) / (nearest - 1)
        return min([one + (tokens - 1) * row, *self._seconds.get(tokens, ())])
