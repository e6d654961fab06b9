"""How far a load is, on a terminal."""

from __future__ import annotations

import os
import re
import sys
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from qwen_runtime.load_progress import LoadProgress

_LOAD = """
import sys
from pathlib import Path
from qwen_runtime import load_progress
load_progress._SHOWN_BYTES = int(sys.argv[2])
with load_progress.shown_load(Path(sys.argv[1])):
    held = b"x" * 300_000_000
    input()
print("loaded")
"""


def test_a_share_never_falls() -> None:
    sizes = deque([0, 40, 30, 60, 200])

    def memory() -> SimpleNamespace:
        return SimpleNamespace(rss=sizes.popleft())

    def ended() -> SimpleNamespace:
        raise psutil.NoSuchProcess(1)

    processes = [SimpleNamespace(memory_info=memory), SimpleNamespace(memory_info=ended)]
    progress = LoadProgress(lambda: processes, 100)  # type: ignore[arg-type, return-value]
    assert [progress.share() for _ in range(5)] == [0, 0.4, 0.4, 0.6, 0.99]
    assert LoadProgress(list, 0).share() == 0


def shares(said: bytes) -> list[int]:
    return [int(share) for share in re.findall(rb"\rloading 1\.0 GB: (\d+)%", said)]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("shown", [True, False])
def test_a_terminal_shows_large_artifacts_only(tmp_path: Path, shown: bool) -> None:
    import pty

    with (tmp_path / "data").open("wb") as file:
        file.truncate(1_000_000_000)
    least = 1 if shown else 10**12
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", _LOAD, str(tmp_path), str(least)])
    said, go_on = b"", [b"\n"]
    try:
        if not shown:
            os.write(terminal, go_on.pop())
        while part := os.read(terminal, 4096):
            said += part
            if go_on and max(shares(said), default=0) >= 30:
                os.write(terminal, go_on.pop())
    except OSError:  # the other end is closed
        pass
    assert os.waitpid(pid, 0)[1] == 0
    assert said.endswith(b"loaded\r\n")
    assert bool(shares(said)) == shown and shares(said) == sorted(shares(said))
