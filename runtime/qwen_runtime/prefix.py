"""States kept between answers, so that the history of a conversation is not read again.

A recurrent state cannot be cut back as a KV cache can. ONNX Runtime GenAI can return to one earlier point of
a generator, where its state was copied (`snapshot_state`, `rewind_to`). So a generator stays open after its
answer, with that point as far into the prompt as a next turn will surely agree with it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# ONNX Runtime's INT8 matrix products take rows by fours, and round those left over at a run's end otherwise.
# With all runs but the last a multiple of that, a prompt in parts gives the same bits as one read at once.
_ROWS = 8


@dataclass
class State:
    """An open generator.

    Attributes:
        generator: an onnxruntime_genai.Generator.
        options: what it was made with, which cannot be changed; but for max_length.
        max_length: most tokens that it can hold.
        tokens: ids up to the point to which it can return.
    """

    generator: Any
    options: Mapping[str, Any]
    max_length: int
    tokens: Sequence[int] = ()

    def read(
        self, prompt: Sequence[int], snapshot: int | None, step: int, cancelled: Callable[[], bool]
    ) -> bool:
        """Bring the generator to the end of `prompt`, which begins with `tokens`.

        Args:
            snapshot: how far into the prompt it shall be able to return afterwards, but for a few tokens;
                None: nowhere.
            step: most tokens to append at a time.
            cancelled: asked before each step.

        Returns:
            Whether the whole prompt was read.
        """
        if snapshot is not None:
            snapshot -= snapshot % _ROWS
        at = len(self.tokens)
        if at:
            self.generator.rewind_to(at)
        while at < len(prompt):
            if cancelled():
                if snapshot is not None and len(self.tokens) < at < snapshot and at % _ROWS == 0:
                    self._mark(prompt[:at])
                return False
            end = min(at + step, len(prompt))
            if snapshot is not None and at < snapshot:
                end = min(end, snapshot)
            self.generator.append_tokens(np.asarray(prompt[at:end], np.int32))
            at = end
            if at == snapshot:
                self._mark(prompt[:at])
        return True

    def _mark(self, tokens: Sequence[int]) -> None:
        self.generator.snapshot_state()
        self.tokens = tokens


class StateCache:
    """The states used last. Safe to use from several threads: a state that is taken belongs to the taker.

    Args:
        size: most states to keep; each holds a KV cache.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._states: list[State] = []  # the one used last at the end
        self._lock = threading.Lock()

    def take(self, prompt: Sequence[int], options: Mapping[str, Any], max_length: int) -> State | None:
        """The state that spares most of `prompt`, or None; then there is room for a new one."""
        with self._lock:
            fitting = [
                state
                for state in self._states
                if state.options == options
                and state.max_length >= max_length
                and len(state.tokens) < len(prompt)
                and list(prompt[: len(state.tokens)]) == list(state.tokens)
            ]
            if fitting:
                best = max(fitting, key=lambda state: len(state.tokens))
                self._states.remove(best)
                return best
            self._drop_all_but(self.size - 1)
            return None

    def put(self, state: State) -> None:
        with self._lock:
            self._states.append(state)
            self._drop_all_but(self.size)

    def clear(self) -> None:
        with self._lock:
            self._drop_all_but(0)

    def _drop_all_but(self, count: int) -> None:
        del self._states[: max(0, len(self._states) - max(0, count))]


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Number of ids at the beginning that are the same."""
    return next(
        (at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )
