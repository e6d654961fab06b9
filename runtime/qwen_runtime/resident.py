"""Memory after loading: what nobody reads is given back to the system, what is read lies in huge pages.

ONNX Runtime maps the data file and MatMulNBits repacks its codes from it into memory of its own; the mapped
pages that were read for that stay resident, and nobody reads them again.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

# sys/mman.h of Linux; the last since 6.1.
_MADV_DONTNEED, _MADV_HUGEPAGE, _MADV_COLLAPSE = 4, 14, 25
_HUGE_PAGE = 2 * 1024 * 1024
# Of a mapping's pages, the share that must be there already: the others would become resident too.
_FULL = 0.9


def release_mapped(*folders: Path) -> None:
    """Drop the resident pages of files of `folders` that this process maps; what is read again comes back
    from the file. Linux only, elsewhere nothing happens."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    prefixes = tuple(str(folder.resolve()) + "/" for folder in folders)
    for start, end in _unchanged(Path("/proc/self/smaps").read_text(), prefixes):
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)


def settle(*folders: Path) -> None:
    """After a model of `folders` has been loaded on the CPU: `release_mapped` at once, and `use_huge_pages`
    beside what comes next, since it takes a second or two for each GB."""
    release_mapped(*folders)
    Thread(target=use_huge_pages, name="huge pages", daemon=True).start()


def use_huge_pages() -> None:
    """Move the repacked weights, all of which each token reads, into pages of 2 MB: the processor's table of
    addresses covers them then. Linux from 6.1 on, elsewhere nothing happens.

    Most distributions give huge pages to those who ask, and ONNX Runtime does not ask. Where the system has
    none, or they are switched off, everything stays as it is.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    for start, end in _full(Path("/proc/self/smaps").read_text()):
        first, last = -(-start // _HUGE_PAGE) * _HUGE_PAGE, end // _HUGE_PAGE * _HUGE_PAGE
        for advice in (_MADV_HUGEPAGE, _MADV_COLLAPSE) if first < last else ():
            libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), advice)


def release_freed() -> None:
    """Give back to the system what this process has freed and malloc still holds, such as of images. With
    glibc only, elsewhere nothing happens."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def _unchanged(smaps: str, prefixes: tuple[str, ...]) -> Iterator[tuple[int, int]]:
    """Mappings of files below `prefixes` that nothing was written into: that alone would be lost."""
    for mapping in _mappings(smaps):
        if mapping.path.startswith(prefixes) and not mapping.kilobytes["Anonymous"]:
            yield mapping.start, mapping.end


def _full(smaps: str) -> Iterator[tuple[int, int]]:
    """Mappings of no file, most of whose pages are there."""
    for mapping in _mappings(smaps):
        size, there = mapping.end - mapping.start, mapping.kilobytes["Anonymous"] * 1024
        if not mapping.path and size >= _HUGE_PAGE and there >= _FULL * size:
            yield mapping.start, mapping.end


@dataclass(frozen=True)
class _Mapping:
    """One of /proc/self/smaps: `path` of its file, "" for none, and its sizes by their names there."""

    start: int
    end: int
    path: str
    kilobytes: dict[str, int]


def _mappings(smaps: str) -> Iterator[_Mapping]:
    found: _Mapping | None = None
    for line in smaps.splitlines():
        key, *values = line.split(maxsplit=5)
        if not key.endswith(":"):
            if found is not None:
                yield found
            start, _, end = key.partition("-")
            found = _Mapping(int(start, 16), int(end, 16), values[4] if len(values) == 5 else "", {})
        elif found is not None and values[0].isdigit():
            found.kilobytes[key.removesuffix(":")] = int(values[0])
    if found is not None:
        yield found
