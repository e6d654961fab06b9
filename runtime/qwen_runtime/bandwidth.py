"""How fast this machine reads its memory: decoding reads every weight for each token, and is no faster."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

_BYTES = 256 * 1024 * 1024  # far more than any cache
_ROUNDS = 8


def read_bandwidth(threads: int | None = None) -> float:
    """Bytes per second that `threads` (default: one a CPU) read together; the best of several rounds."""
    threads = threads or os.cpu_count() or 1
    parts = np.array_split(np.ones(_BYTES // 8, np.int64), threads)
    with ThreadPoolExecutor(threads) as pool:
        return max(_round(pool, parts) for _ in range(_ROUNDS))


def _round(pool: ThreadPoolExecutor, parts: list[np.ndarray]) -> float:
    start = time.perf_counter()
    list(pool.map(np.bitwise_or.reduce, parts))  # keeps up with the memory, and lets other threads run
    return sum(part.nbytes for part in parts) / (time.perf_counter() - start)
