"""A model in a process of its own.

Its memory is the model's alone, and a provider that ends its process, or takes more memory than there is,
does not end ours.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import psutil

from qwen_runtime.load_options import LoadOptions
from qwen_runtime.model import Model, ModelInfo

P = ParamSpec("P")
T = TypeVar("T")

ChildEnded = BrokenProcessPool
_model: Model | None = None  # the child's


@dataclass(frozen=True)
class Loaded:
    """What loading took.

    Attributes:
        resident_before, resident: bytes resident in the process before it, and after it.
        scores_apart: see `Model.scores_apart`.
    """

    info: ModelInfo
    seconds: float
    resident_before: int
    resident: int
    scores_apart: bool


class Child:
    """A model that is loaded in another process; see `child`."""

    def __init__(self, pool: ProcessPoolExecutor, loaded: Loaded) -> None:
        self._pool = pool
        self.loaded = loaded

    def call(self, task: Callable[Concatenate[Model, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """task(model, ...) in the child; `task` is a function of a module, and all of it can be pickled.

        Raises:
            ChildEnded: the process ended.
        """
        return self._pool.submit(_call, task, *args, **kwargs).result()


@contextmanager
def child(artifact: Path, options: LoadOptions) -> Iterator[Child]:
    """Load `artifact` in another process, which ends with the context.

    Raises:
        UserError: the artifact cannot be loaded.
        ChildEnded: the process ended.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_end_quietly) as pool:
        yield Child(pool, pool.submit(_load, artifact, options).result())


def _end_quietly() -> None:
    """On Ctrl-C, which reaches it too: the parent says what there is to say. A job in the background ignores
    it, and so does this process then."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _load(artifact: Path, options: LoadOptions) -> Loaded:
    global _model
    process = psutil.Process()
    before, start = process.memory_info().rss, time.perf_counter()
    _model = Model.load_with(artifact, options)
    seconds, after = time.perf_counter() - start, process.memory_info().rss
    return Loaded(_model.info, seconds, before, after, _model.scores_apart)


def _call(task: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    assert _model is not None
    return task(_model, *args, **kwargs)
