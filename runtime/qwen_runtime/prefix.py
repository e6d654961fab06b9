"""Generators kept between answers, so that the history of a conversation is not read again.

A recurrent state cannot be cut back as a KV cache can. ONNX Runtime GenAI can return to one earlier point of
a generator, where its state was copied (`snapshot_state`, `rewind_to`). So a generator stays open after its
answer, with that point as far into the prompt as a next turn will surely agree with it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from qwen_runtime.backends.protocol import RewindableGenerator
from qwen_runtime.prefill import Cancelled, Prefill, append

# ONNX Runtime's INT8 matrix products take rows by fours, and round those left over at a run's end otherwise.
# With all runs but the last a multiple of that, a prompt in chunks gives the same bits as one read at once.
_ROWS = 8


@dataclass
class KeptGenerator:
    """An open generator, to go on from.

    Attributes:
        options: what the generator was made with, which cannot be changed; but for max_length.
        max_length: most tokens that it can hold.
        tokens: ids up to the point to which it can return.
    """

    generator: RewindableGenerator
    options: Mapping[str, Any]
    max_length: int
    tokens: Sequence[int] = ()

    def prefill(
        self,
        prompt: Sequence[int],
        snapshot: int,
        chunk_size: int | None,
        release: Callable[[KeptGenerator], object],
    ) -> Prefill:
        """As `read`, later.

        Args:
            release: called with this when it can be used again.
        """
        return Prefill(
            self.generator,
            len(prompt),
            partial(self.read, prompt, snapshot, chunk_size),
            cached_tokens=len(self.tokens),
            release=partial(release, self),
        )

    def read(
        self, prompt: Sequence[int], snapshot: int, chunk_size: int | None, cancelled: Cancelled
    ) -> bool:
        """Bring the generator to the end of `prompt`, which begins with `tokens`.

        Args:
            snapshot: how far into the prompt it shall be able to return afterwards, but for a few tokens.
            chunk_size, cancelled: as in `append`.

        Returns:
            Whether the whole prompt was read.
        """
        snapshot -= snapshot % _ROWS
        start = done = len(self.tokens)
        if start:
            self.generator.rewind_to(start)
        if done < snapshot:
            done += append(self.generator, prompt[done:snapshot], chunk_size, cancelled, done)
            if done > start and done % _ROWS == 0:
                self.generator.snapshot_state()
                self.tokens = prompt[:done]
            if done < snapshot:
                return False
        return done + append(self.generator, prompt[done:], chunk_size, cancelled, done) == len(prompt)


class KeptGenerators:
    """Those used last. Safe to use from several threads: one that is taken belongs to the taker.

    Args:
        size: most generators to keep; each holds a KV cache.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._kept: list[KeptGenerator] = []  # the one used last at the end
        self._lock = threading.Lock()

    def take(
        self, prompt: Sequence[int], options: Mapping[str, Any], max_length: int
    ) -> KeptGenerator | None:
        """The one that spares most of `prompt`, or None; then there is room for a new one."""
        with self._lock:
            fitting = [
                kept
                for kept in self._kept
                if kept.options == options
                and kept.max_length >= max_length
                and len(kept.tokens) < len(prompt)
                and list(prompt[: len(kept.tokens)]) == list(kept.tokens)
            ]
            if fitting:
                best = max(fitting, key=lambda kept: len(kept.tokens))
                self._kept.remove(best)
                return best
            self._drop_all_but(self.size - 1)
            return None

    def put(self, kept: KeptGenerator) -> None:
        """Keep it, if it can return to anything."""
        if not kept.tokens:
            return
        with self._lock:
            self._kept.append(kept)
            self._drop_all_but(self.size)

    def clear(self) -> None:
        with self._lock:
            self._drop_all_but(0)

    def _drop_all_but(self, count: int) -> None:
        del self._kept[: max(0, len(self._kept) - max(0, count))]


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Number of ids at the beginning that are the same."""
    return next(
        (at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )
