"""An artifact's next-token logits, from the runtime in a process of its own.

A provider that ends its process, or takes more memory than there is, then costs the measurement and not the
export.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
from qwen_common.errors import UserError
from qwen_runtime import Model

T = TypeVar("T")
_model: Model | None = None  # the child's


@dataclass(frozen=True)
class Started:
    """Where the artifact runs.

    Attributes:
        reason: for the provider, in one line.
        load_bytes: resident after loading.
        scores_apart: its logits come from another path than its answers; see `Model.scores_apart`.
    """

    provider: str
    reason: str
    load_seconds: float
    load_bytes: int
    scores_apart: bool


@dataclass(frozen=True)
class Timing:
    """One text: seconds until its prompt was read, and for each further token."""

    first_seconds: float
    next_seconds: Sequence[float]


class Runner:
    """A loaded artifact in another process; see `running`."""

    def __init__(self, pool: ProcessPoolExecutor, started: Started) -> None:
        self._pool = pool
        self.started = started

    def score(self, tokens: Sequence[int], prompt: int) -> tuple[np.ndarray, Timing]:
        """float32 logits [positions, vocab]; see `Model.score`.

        Raises:
            UserError: the process ended.
        """
        return self._submit(_score, list(tokens), prompt)

    def answering(self, tokens: Sequence[int]) -> np.ndarray:
        """What `Model.logprobs` gives for all but the first of `tokens`.

        Raises:
            UserError: the process ended.
        """
        return self._submit(_answering, list(tokens))

    def _submit(self, task: Callable[..., T], *arguments: Any) -> T:
        try:
            return self._pool.submit(task, *arguments).result()
        except BrokenProcessPool as error:
            raise UserError(
                f"{self.started.provider} ended the process while it ran the artifact: try another provider"
            ) from error


@contextmanager
def running(artifact: Path, provider: str) -> Iterator[Runner]:
    """Load `artifact` in another process, which ends with the context.

    Raises:
        UserError: the provider cannot load it.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            started = pool.submit(_load, artifact, provider).result()
        except BrokenProcessPool as error:
            raise UserError(
                f"{artifact} ended the process that loaded it: is there enough memory? --no-verify leaves "
                "the check out"
            ) from error
        yield Runner(pool, started)


def _load(artifact: Path, provider: str) -> Started:
    global _model
    process = psutil.Process()
    before, start = process.memory_info().rss, time.perf_counter()
    _model = Model.load(artifact, provider)
    seconds, after = time.perf_counter() - start, process.memory_info().rss
    info = _model.info
    return Started(info.provider, info.reason, seconds, after - before, _model.scores_apart)


def _score(tokens: Sequence[int], prompt: int) -> tuple[np.ndarray, Timing]:
    assert _model is not None
    logits, times = [], [time.perf_counter()]
    for found in _model.score(tokens, prompt):
        logits.append(found)
        times.append(time.perf_counter())
    if _model.scores_apart:  # it is the answers' speed that counts
        times = [time.perf_counter(), *(time.perf_counter() for _ in _model.pace(tokens, prompt))]
    seconds = np.diff(times)
    return np.stack(logits), Timing(float(seconds[0]), seconds[1:].tolist())


def _answering(tokens: Sequence[int]) -> np.ndarray:
    assert _model is not None
    return _model.logprobs(tokens)
