"""After loading: mapped weights are given back, the others lie in huge pages, and nothing is lost."""

from __future__ import annotations

import mmap
import platform
import sys
from pathlib import Path

import pytest
from qwen_runtime.resident import release_mapped, use_huge_pages

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="madvise through /proc")

_SIZE = 8 * 1024 * 1024
_MADV_COLLAPSE = 25  # linux/mman.h


def resident(path: Path) -> int:
    """Bytes of `path` that this process has in memory."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if not line.split()[0].endswith(":"):
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            found += 1024 * int(line.split()[1])
    return found


@pytest.mark.parametrize("written", [False, True])
def test_pages_that_nothing_was_written_into_are_released(tmp_path: Path, written: bool) -> None:
    folder, other = tmp_path / "an artifact", tmp_path / "other"
    content = bytes(range(256)) * (_SIZE // 256)
    for path in (folder, other):
        path.mkdir()
        (path / "data").write_bytes(content)
    maps = []
    for path in (folder, other):
        with (path / "data").open("rb") as file:
            maps.append(
                mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
            )
    assert all(bytes(each) == content for each in maps)
    if written:
        maps[0][0] = 7
    before = resident(folder / "data")
    assert before and resident(other / "data") == _SIZE
    release_mapped(folder)
    assert resident(folder / "data") == (before if written else 0)
    assert resident(other / "data") == _SIZE
    expected = b"\x07" + content[1:] if written else content
    assert bytes(maps[0]) == expected and bytes(maps[1]) == content


def anonymous() -> dict[str, int]:
    """Bytes of this process that are of no file, and how many of them lie in huge pages."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    sizes = {key: 1024 * int(value.split()[0]) for key, value in (line.split(":") for line in lines)}
    return {key: sizes[key] for key in ("Anonymous", "AnonHugePages")}


def huge_pages_offered() -> bool:
    switch = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    release = tuple(int(part) for part in platform.release().split(".")[:2])
    return switch.exists() and "[never]" not in switch.read_text() and release >= (6, 1)


def private(size: int) -> mmap.mmap:
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def huge_pages_free(size: int) -> bool:
    """Whether the system finds some for `size` bytes: on one that ran for long, memory may be in pieces."""
    with private(size) as tried:
        tried[:] = bytes(size)
        try:
            tried.madvise(_MADV_COLLAPSE)
        except OSError:
            return False
    return True


@pytest.mark.skipif("not huge_pages_offered()")
def test_full_mappings_lie_in_huge_pages_and_sparse_ones_stay_sparse() -> None:
    if not huge_pages_free(5 * _SIZE):
        pytest.skip("no huge pages are free")
    full, sparse = private(4 * _SIZE), private(64 * _SIZE)
    os_pages = mmap.PAGESIZE
    # Mappings that are side by side would be one.
    for each, advice in (full, mmap.MADV_DONTFORK), (sparse, mmap.MADV_DONTDUMP):
        each.madvise(mmap.MADV_NOHUGEPAGE)
        each.madvise(advice)
    content = bytes(range(256)) * (len(full) // 256)
    full[:] = content
    for at in range(0, len(sparse), 16 * os_pages):
        sparse[at] = 1
    before = anonymous()
    use_huge_pages()
    after = anonymous()
    assert after["AnonHugePages"] - before["AnonHugePages"] >= len(full) - _SIZE
    assert after["Anonymous"] - before["Anonymous"] < _SIZE
    assert full[:] == content
