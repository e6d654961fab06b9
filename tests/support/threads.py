"""What Linux tells of the threads of this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def read_of_threads(name: str) -> Iterator[tuple[int, str]]:
    """Yield each thread's number and its file `name` of `/proc/self/task`, without those that end meanwhile.

    Threads of an earlier model may end at any time."""
    for folder in Path("/proc/self/task").iterdir():
        try:
            text = (folder / name).read_text()
        except (FileNotFoundError, ProcessLookupError):  # the latter between opening and reading
            continue
        yield int(folder.name), text
