"""A limit on the memory of one process: a control group of version 1 (Linux, mostly as root).

Pages of files count for the group that read them first, so a file that lies in the page cache already costs
a limited process nothing; `drop_from_cache` before it starts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MOUNT = Path("/sys/fs/cgroup/memory")
_PROCESSES = "cgroup.procs"


@contextmanager
def limited(size: int) -> Iterator[Path]:
    """A control group that holds at most `size` bytes, swap included; its processes end before it does.

    Raises:
        SystemExit: this machine has no such groups, or does not let us make one.
    """
    group = _own_group() / f"benchmark-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        raise SystemExit(
            f"a memory limit needs control groups of version 1 that may be written ({error}): run as root on "
            "a system that has them, or leave --limit off"
        ) from error
    try:
        (group / "memory.limit_in_bytes").write_text(str(size))
        with_swap = group / "memory.memsw.limit_in_bytes"
        if with_swap.exists():
            with_swap.write_text(str(size))
        yield group
    finally:
        group.rmdir()


def join(group: Path) -> None:
    """Put this process under the limit of `group`; what it holds already stays counted elsewhere."""
    (group / _PROCESSES).write_text(str(os.getpid()))


def drop_from_cache(folder: Path) -> None:
    """Ask the system to forget the files of `folder`, which must be on the disk by now."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _own_group() -> Path:
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return _MOUNT / path.lstrip("/")
    return _MOUNT
