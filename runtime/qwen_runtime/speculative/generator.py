"""An answer whose next tokens are guessed, and checked by the model several in one run.

A run gives the logits after each guess as well. They are used for as long as the tokens that are chosen are
those that were guessed, however they are chosen: likeliest or drawn, with penalties, bias or a grammar. So a
guess is accepted with the probability that the model itself gives it, and otherwise the token is drawn from
the others, as speculative sampling asks (Leviathan et al., 2023; Chen et al., 2023) for drafts without a
distribution of their own.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from qwen_common.providers import CPU

from qwen_runtime.artifact import Artifact
from qwen_runtime.backends.choosing import Guide
from qwen_runtime.backends.ort import Ort, OrtGenerator
from qwen_runtime.backends.protocol import Logits
from qwen_runtime.speculative import Speculative
from qwen_runtime.speculative.acceptance import Acceptance
from qwen_runtime.speculative.drafts import Draft, Head, PromptLookup
from qwen_runtime.speculative.sessions import Sessions, StatefulSession, without_pending
from qwen_runtime.speculative.switch import Switch
from qwen_runtime.state import Point

_SHOWN = "hidden_states"


class SpeculativeOrt(Ort):
    """An artifact in ONNX Runtime whose answers are speculative.

    Attributes:
        sessions: the graphs for it.
        switch: what all answers learn.
    """

    how = Speculative.FAST
    reason = f"{CPU.title}: ONNX Runtime itself, with speculative decoding"
    asked_for = "speculative decoding runs", "--speculative"

    def __init__(self, artifact: Artifact) -> None:
        """Raises:
        UserError: the artifact has no graphs for it.
        """
        self.sessions = Sessions.load(artifact, self.how)
        super().__init__(artifact)
        if self.decoder is self.sessions.decoder:
            self.outputs, self.given = without_pending(self.decoder)
        self.switch = Switch(self.sessions.most)

    def _open_decoder(self, artifact: Artifact, session: Callable[[str], Any]) -> Any:
        """The graph for several tokens does for one and for prompts, so that weights are loaded once. Those
        of an artifact that sees are embedded by another graph."""
        if self.how == Speculative.FAST and "embedding" not in artifact.genai_config["model"]:
            return self.sessions.decoder
        return super()._open_decoder(artifact, session)

    def _open(self, settings: Mapping[str, Any], max_length: int, guide: Guide | None) -> OrtGenerator:
        return SpeculativeGenerator(self, settings, max_length, guide)


class ExactSpeculativeOrt(SpeculativeOrt):
    """One whose answers have the bits of plain decoding."""

    how = Speculative.EXACT


BACKENDS = {kind.how: kind for kind in (SpeculativeOrt, ExactSpeculativeOrt)}


class SpeculativeGenerator(OrtGenerator):
    """One sequence.

    Attributes:
        acceptance: counts as the answer grows.
    """

    def __init__(
        self, backend: SpeculativeOrt, settings: Mapping[str, Any], max_length: int, guide: Guide | None
    ) -> None:
        super().__init__(backend, settings, max_length, guide)
        self.acceptance = Acceptance()
        self._sessions, self._switch = backend.sessions, backend.switch
        self._lookup = PromptLookup()
        self._expected: list[int] = []
        self._head = Head(self._sessions.head, max_length + 1) if self._sessions.head is not None else None
        self._run: StatefulSession | None = None  # has the states while it is there
        self._memory: dict[str, list[Any]] = {}  # more of it for states, which only such runs need
        self._kept: list[int] = []  # tokens of its last run that stay
        self._shown: dict[str, npt.NDArray[Any]] = {}  # what that run has shown of all its tokens
        self._draft: Draft | None = None  # for the token that is chosen next, and those after it
        self._predicted = 0  # how many of its tokens are from what was expected
        self._checked: deque[tuple[int, Logits]] = deque()  # its tokens, and the logits after each

    def expect(self, tokens: Sequence[int]) -> None:
        """The answer may be like these; said before it begins."""
        self._expected = list(tokens)

    def point(self) -> Point:
        assert not self._pending, "points are made of prompts"
        return super().point()

    def _read(self, tokens: Sequence[int]) -> Logits:
        if not self._pending:  # a part of the prompt
            return self._plain(tokens)
        if (logits := self._accept(tokens[0])) is not None and len(tokens) == 1:
            return logits
        self._go_on()
        if len(tokens) == 1:
            self._draft, count = self._make_draft(tokens[0])
            if self._draft is not None and count:
                self._predicted = self._of_prediction(self._draft, count)
                return self._check(tokens[0], self._draft.tokens[:count])
        return self._settle(tokens)

    def _accept(self, token: int) -> Logits | None:
        """The logits after `token`, which was chosen, if it is the one that was drafted and checked."""
        if self._draft is None:
            return None
        if not self._checked:
            if self._run is None:  # of a draft that was not worth checking the first token tells enough
                self._switch.judged(self._draft.source, token == self._draft.tokens[0])
            return None
        drafted, logits = self._checked.popleft()
        self._switch.judged(self._draft.source, token == drafted)
        if token != drafted:
            self._checked.clear()
            return None
        self._switch.yielded()
        self.acceptance.accepted += 1
        # The first of `_kept` is the token that the draft came after.
        self.acceptance.accepted_predicted += len(self._kept) <= self._predicted
        self._kept.append(token)
        return logits

    def _make_draft(self, token: int) -> tuple[Draft | None, int]:
        """What may come after `token`, and how much of it is worth checking."""
        room = min(self._sessions.most, self._max_length - len(self._tokens) - 1)
        if room < 1:
            return None, 0
        if self._guide is not None and (forced := self._guide.forced()):
            draft: Draft | None = Draft(forced[:room], "the grammar")
        else:
            draft = self._lookup.draft([*self._expected, *self._tokens, token], room)
        if draft is not None and (count := self._switch.count(draft)):
            return draft, count
        if self._head is None:
            return draft, 0
        count = self._switch.count(Draft([token] * min(room, self._head.most), Head.source))
        if not count:
            return draft, 0
        started = time.perf_counter()
        guess = self._head.draft(token, count)
        self._switch.drafted(Head.source, time.perf_counter() - started, count)
        return (draft, 0) if guess is None else (guess, count)

    def _of_prediction(self, draft: Draft, count: int) -> int:
        """How many of the first `count` tokens of `draft` were taken from what was expected."""
        return 0 if draft.place is None else max(0, min(count, len(self._expected) - draft.place))

    def _check(self, token: int, drafted: Sequence[int]) -> Logits:
        """Run `token` and what was drafted after it; the logits after `token`."""
        if self._run is None:
            sessions = self._sessions
            self._run = StatefulSession(
                sessions.decoder, self._values, len(self._tokens), sessions.rows, self._memory
            )
        started = time.perf_counter()
        tokens = [token, *drafted]
        self._shown = self._run(tokens, position_ids=self._places(tokens))
        self._switch.took(len(tokens), time.perf_counter() - started)
        self.acceptance.drafted += len(drafted)
        self.acceptance.predicted += self._predicted
        self._kept = [token]
        logits = self._shown["logits"]
        self._checked = deque((guess, logits[:, at : at + 1]) for at, guess in enumerate(drafted, 1))
        return logits[:, :1]

    def _go_on(self) -> None:
        """After those tokens of the last run that stay."""
        if self._run is not None:
            self._run.keep(len(self._kept))
            self._show(self._kept, self._shown.get(_SHOWN))

    def _settle(self, tokens: Sequence[int]) -> Logits:
        """Run `tokens` as plain decoding does, which has the states from now on."""
        if self._run is None:
            return self._plain(tokens)
        run, self._run = self._run, None
        found = None
        if run.pending:
            started = time.perf_counter()
            found = run(tokens, settle=True, position_ids=self._places(tokens))
            self._switch.settled(time.perf_counter() - started)
        self._values, self._memory, self._bound = run.values, run.spare, None
        if found is None:
            return self._plain(tokens)
        self._show(tokens, found.get(_SHOWN))
        return found["logits"][:, -1:]

    def _plain(self, tokens: Sequence[int]) -> Logits:
        started = time.perf_counter()
        logits = super()._read(tokens)
        if self._pending and len(tokens) == 1:
            self._switch.took(1, time.perf_counter() - started)
        if self._head is not None:
            self._show(tokens, self.get_output(_SHOWN))
        return logits

    def _show(self, tokens: Sequence[int], hidden: npt.NDArray[Any] | None) -> None:
        if self._head is not None and hidden is not None:
            self._head.saw(tokens, hidden[:, : len(tokens)])

    def _places(self, tokens: Sequence[int]) -> npt.NDArray[np.int64]:
        """int64 [3, 1, tokens]."""
        start = len(self._tokens)
        return np.ascontiguousarray(self._positions(start, start + len(tokens))[:, None])
