"""How fast all cores together read memory: python -m benchmarks.peers.bandwidth [--bytes 1e9]"""

from __future__ import annotations

import argparse
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from benchmarks.peers.turns import Measure, take_turns

_PASSES = 3


def load(size: int) -> tuple[Measure, dict[str, Any]]:
    threads = os.cpu_count() or 1
    parts = np.array_split(np.ones(size // 8, np.int64), threads)
    pool = ThreadPoolExecutor(threads)

    def read() -> float:
        started = time.perf_counter()
        list(pool.map(np.bitwise_or.reduce, parts))
        return size / (time.perf_counter() - started)

    return lambda: {"bandwidth": max(read() for _ in range(_PASSES))}, {"threads": threads}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bytes", type=float, default=1e9, help="more than the caches hold")
    size = int(parser.parse_args().bytes)
    take_turns(lambda: load(size))


if __name__ == "__main__":
    main()
