"""Inputs of matrices as activations are, and what working on them takes."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np


def correlated(tokens: int, k: int, seed: int = 0) -> np.ndarray:
    """Inputs [tokens, k] that mostly lie in few directions, as activations do."""
    generator = np.random.default_rng(seed)
    directions = generator.standard_normal((k // 4, k))
    mixed = generator.standard_normal((tokens, k // 4)) @ directions
    return (mixed + 0.5 * generator.standard_normal((tokens, k))).astype(np.float32)


def peak_bytes(work: Callable[[], object]) -> int:
    """Of what `work` allocates, at most at a time."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
