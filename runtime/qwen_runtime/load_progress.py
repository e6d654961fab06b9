"""How far a model is loaded, seen from beside: ONNX Runtime GenAI holds Python's lock all the while.

The share is what the process holds of the artifact's bytes, repacked or mapped; on the CPU it grows as the
time does (measured), and reaches its end a little before the model is there.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psutil

_SHOWN_BYTES = 1_000_000_000  # less is loaded before anybody wonders
_LOOK = 0.5  # seconds
_MOST = 0.99  # until it is loaded


def artifact_bytes(folder: Path) -> int:
    """Of all its files."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


class LoadProgress:
    """Of the processes that `find` finds whenever it is asked, which load `size` bytes."""

    def __init__(self, find: Callable[[], Iterable[psutil.Process]], size: int) -> None:
        self._find, self._size = find, size
        self._most = 0.0

    def share(self) -> float:
        """0 to 0.99, and never less than before, though pages are let go of once they are repacked."""
        import psutil  # here, because small models start without it

        held = 0
        for process in self._find():
            with suppress(psutil.Error):  # it has just ended
                held += process.memory_info().rss
        self._most = max(self._most, min(held / max(self._size, 1), _MOST))
        return self._most


@contextmanager
def shown_load(artifact: Path) -> Iterator[None]:
    """Write to a terminal how far this process has loaded `artifact`, if it is a large one."""
    size = artifact_bytes(artifact) if artifact.is_dir() else 0
    if size < _SHOWN_BYTES or sys.stderr is None or not sys.stderr.isatty():
        yield
        return
    watcher = multiprocessing.get_context("spawn").Process(
        target=_show, args=(os.getpid(), size), daemon=True
    )
    watcher.start()
    try:
        yield
    finally:
        watcher.kill()
        watcher.join()
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def _show(pid: int, size: int) -> None:
    import psutil

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    parent, loading = multiprocessing.parent_process(), psutil.Process(pid)
    progress = LoadProgress(lambda: [loading], size)
    while parent is not None and parent.is_alive():
        print(f"\rloading {size / 1e9:.1f} GB: {progress.share():.0%}", end="", file=sys.stderr, flush=True)
        time.sleep(_LOOK)
