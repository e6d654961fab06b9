"""Reading a prompt into a generator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen_runtime.backends.protocol import Generator, ImageGenerator

# Asked before each chunk with the tokens of the prompt that are held: whether to stop there.
Cancelled = Callable[[int], bool]


@dataclass(frozen=True)
class Prefill:
    """A prompt that is about to be read.

    Attributes:
        generator: what reads it, and goes on from its end.
        prompt_tokens: how many there are.
        read: reads them, and returns whether it read them all; what it is given says whether to stop.
        cached_tokens: how many the generator holds already.
        release: called at the end, if the generator can be used again.
    """

    generator: Generator
    prompt_tokens: int
    read: Callable[[Cancelled], bool]
    cached_tokens: int = 0
    release: Callable[[], object] = lambda: None


def prefill_tokens(generator: Generator, tokens: Sequence[int], chunk_size: int | None) -> Prefill:
    """Args:
    chunk_size: as `Backend.chunk_size`.
    """

    def read(cancelled: Cancelled) -> bool:
        return append(generator, tokens, chunk_size, cancelled) == len(tokens)

    return Prefill(generator, len(tokens), read)


def prefill_images(generator: ImageGenerator, prompt_tokens: int, inputs: Any) -> Prefill:
    """All at once: only a generator's first run takes images and their positions.

    Args:
        inputs: prompt and images, as the backend's `image_inputs` made them.
    """

    def read(cancelled: Cancelled) -> bool:
        generator.set_inputs(inputs)
        return True

    return Prefill(generator, prompt_tokens, read)


def append(
    generator: Generator,
    tokens: Sequence[int],
    chunk_size: int | None,
    cancelled: Cancelled,
    before: int = 0,
) -> int:
    """Append `tokens` in chunks, so that cancelling works in a long prompt too.

    Args:
        chunk_size: most tokens at a time; None: all of them.
        before: tokens of the prompt that the generator holds.

    Returns:
        How many were appended: all, unless cancelled.
    """
    done = 0
    while done < len(tokens) and not cancelled(before + done):
        chunk = tokens[done : done + (chunk_size or len(tokens))]
        generator.append_tokens(np.asarray(chunk, np.int32))
        done += len(chunk)
    return done
