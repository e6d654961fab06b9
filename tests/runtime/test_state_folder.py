"""One folder of states, with other processes and other people in it."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qwen_runtime.state import KeptState, Point
from qwen_runtime.state_folder import StateFolder

SIZE = 10**9
KEYS = np.arange(400)


def kept(*points: int) -> KeptState:
    fixed = {"state": np.zeros((1, 2), np.float32)}
    caches = {"cache": np.zeros((1, 1, len(KEYS), 1), np.float32)}
    return KeptState(KEYS, caches, [Point(length, fixed) for length in points])


def folder(root: Path) -> StateFolder:
    return StateFolder(root, "model", SIZE)


def lengths(found: KeptState | None) -> Sequence[int]:
    return [] if found is None else [point.length for point in found.points]


def test_a_file_that_another_process_writes_again(tmp_path: Path) -> None:
    """With the same tokens and other points: what was known of it is no longer so."""
    first = folder(tmp_path)
    first.put(kept(100, 300))
    text = KEYS[:200]
    assert lengths(first.find(text, 0, lambda state: True)) == [100, 300]
    [file] = tmp_path.rglob("*.npz")
    elsewhere = tmp_path / "elsewhere"
    folder(elsewhere).put(kept(300))
    [other] = elsewhere.rglob("*.npz")
    os.replace(other, file)
    assert first.find(text, 0, lambda state: True) is None
    assert lengths(first.find(KEYS, 0, lambda state: True)) == [300]


def test_a_file_that_another_process_takes_away(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = folder(tmp_path)
    first.put(kept(300))
    [file] = tmp_path.rglob("*.npz")
    content = file.read_bytes()

    def leaves(state: KeptState) -> bool:
        file.unlink()
        raise ValueError("it is gone")

    with caplog.at_level(logging.WARNING):
        assert first.find(KEYS, 0, leaves) is None
        assert first.find(KEYS, 0, lambda state: True) is None
    assert not caplog.records
    file.write_bytes(content)
    assert lengths(first.find(KEYS, 0, lambda state: True)) == [300]


def test_the_next_best_where_the_best_is_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = folder(tmp_path)
    for length in (100, 300):
        state = kept(length)
        first.put(KeptState(state.keys, state.caches, [Point(length, state.points[0].fixed, shared=True)]))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert lengths(first.find(KEYS, 0, lambda state: state.length < 300)) == [100]
    assert ["not this model's" in record.getMessage() for record in caplog.records] == [True]


def test_a_file_whose_times_cannot_be_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is somebody else's, or the disk is read only."""
    first = folder(tmp_path)
    first.put(kept(300))

    def refuse(path: Path) -> None:
        raise PermissionError(path)

    monkeypatch.setattr(os, "utime", refuse)
    assert lengths(first.find(KEYS, 0, lambda state: True)) == [300]


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A disk that is full after so many bytes, as writes see it."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_is_full(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What is there stays and can be read; it is told once, until there is room again."""
    first = folder(tmp_path)
    first.put(kept(100))
    there = list(tmp_path.rglob("*"))
    with files_of_at_most(1000):
        for length in (300, 390, 300):
            first.put(kept(length))
    assert len(caplog.records) == 1 and "states are not written to" in caplog.text
    assert list(tmp_path.rglob("*")) == there
    assert lengths(first.find(KEYS, 0, lambda state: True)) == [100]
    first.put(kept(300))
    assert lengths(folder(tmp_path).find(KEYS, 0, lambda state: True)) == [300]
    with files_of_at_most(1000):
        first.put(kept(390))
    assert len(caplog.records) == 2


WRITER = """
import sys
from pathlib import Path
import numpy as np
from qwen_runtime.state import KeptState, Point
from qwen_runtime.state_folder import StateFolder

folder = StateFolder(Path(sys.argv[1]), "model", 400_000)  # some five of them
for turn in range(60):
    keys = np.arange(1000) + turn % 7 * 10_000
    fixed = {"state": np.full((1, 2), turn % 7, np.float32)}
    caches = {"cache": np.full((1, 1, 1000, 16), turn % 7, np.float32)}
    folder.put(KeptState(keys, caches, [Point(1000, fixed)]))
    found = folder.find(keys, 0, lambda state: True)
    if found is not None:
        assert (found.caches["cache"] == turn % 7).all()
        assert (found.points[0].fixed["state"] == turn % 7).all()
print("done")
"""


def test_two_processes_and_little_room(tmp_path: Path) -> None:
    """Neither fails, says anything, or reads what the other does not mean."""
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, tmp_path], **options) for _ in range(2)]
    assert [writer.communicate()[0].strip() for writer in writers] == ["done", "done"]
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.npz")) <= 400_000
    assert not list(tmp_path.rglob("*.partial"))
