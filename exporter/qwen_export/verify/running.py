"""An artifact's next-token logits, from the runtime in a process of its own.

A provider that ends its process, or takes more memory than there is, then costs the measurement and not the
export.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

import numpy as np
from qwen_common.errors import UserError
from qwen_runtime import Model
from qwen_runtime.child import Child, ChildEnded, child
from qwen_runtime.load_options import LoadOptions

P = ParamSpec("P")
T = TypeVar("T")


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

    def __init__(self, model: Child) -> None:
        self._child = model
        loaded = model.loaded
        self.started = Started(
            loaded.info.provider,
            loaded.info.reason,
            loaded.seconds,
            loaded.resident - loaded.resident_before,
            loaded.scores_apart,
        )

    def score(self, tokens: Sequence[int], prompt: int) -> tuple[np.ndarray, Timing]:
        """float32 logits [positions, vocab]; see `Model.score`.

        Raises:
            UserError: the process ended.
        """
        return self._call(_score, list(tokens), prompt)

    def answering(self, tokens: Sequence[int]) -> np.ndarray:
        """What `Model.logprobs` gives for all but the first of `tokens`.

        Raises:
            UserError: the process ended.
        """
        return self._call(_answering, list(tokens))

    def _call(self, task: Callable[Concatenate[Model, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return self._child.call(task, *args, **kwargs)
        except ChildEnded as error:
            raise UserError(
                f"{self.started.provider} ended the process while it ran the artifact: try another provider"
            ) from error


@contextmanager
def running(artifact: Path, provider: str) -> Iterator[Runner]:
    """Load `artifact` in another process, which ends with the context.

    Raises:
        UserError: the provider cannot load it.
    """
    with ExitStack() as stack:
        try:
            model = stack.enter_context(child(artifact, LoadOptions(provider)))
        except ChildEnded as error:
            raise UserError(
                f"{artifact} ended the process that loaded it: is there enough memory? --no-verify leaves "
                "the check out"
            ) from error
        yield Runner(model)


def _score(model: Model, tokens: Sequence[int], prompt: int) -> tuple[np.ndarray, Timing]:
    logits, times = [], [time.perf_counter()]
    for found in model.score(tokens, prompt):
        logits.append(found)
        times.append(time.perf_counter())
    if model.scores_apart:  # it is the answers' speed that counts
        times = [time.perf_counter(), *(time.perf_counter() for _ in model.pace(tokens, prompt))]
    seconds = np.diff(times)
    return np.stack(logits), Timing(float(seconds[0]), seconds[1:].tolist())


def _answering(model: Model, tokens: Sequence[int]) -> np.ndarray:
    return model.logprobs(tokens)
