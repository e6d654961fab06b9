"""Memory that is given back to the system: mapped weights that have been repacked, and what was freed.

ONNX Runtime maps the data file and MatMulNBits repacks its codes from it into memory of its own; the mapped
pages that were read for that stay resident, and nobody reads them again.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path

_MADV_DONTNEED = 4  # sys/mman.h of Linux


def release_mapped(*folders: Path) -> None:
    """Drop the resident pages of files of `folders` that this process maps; what is read again comes back
    from the file. Linux only, elsewhere nothing happens."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    prefixes = tuple(str(folder.resolve()) + "/" for folder in folders)
    for start, end in _unchanged(Path("/proc/self/smaps").read_text(), prefixes):
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)


def release_freed() -> None:
    """Give back to the system what this process has freed and malloc still holds, such as of images. With
    glibc only, elsewhere nothing happens."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def _unchanged(smaps: str, prefixes: tuple[str, ...]) -> Iterator[tuple[int, int]]:
    """Mappings of files below `prefixes` that nothing was written into: that alone would be lost."""
    found: tuple[int, int] | None = None
    for line in smaps.splitlines():
        key, *values = line.split(maxsplit=5)
        if not key.endswith(":"):
            start, _, end = key.partition("-")
            path = values[4] if len(values) == 5 else ""
            found = (int(start, 16), int(end, 16)) if path.startswith(prefixes) else None
        elif key == "Anonymous:" and found and values[0] == "0":
            yield found
