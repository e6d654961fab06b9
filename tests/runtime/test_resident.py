"""Mapped weights after loading: given back, and nothing is lost."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest
from qwen_runtime.resident import release_mapped

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="madvise through /proc")

_SIZE = 8 * 1024 * 1024


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
