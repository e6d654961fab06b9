"""Bytes of weights that one decode step touches, by the pages that the system sees used. Linux.

    python tests/support/touched_bytes.py ARTIFACT

A process of its own, so that pages are small ones: those of 2 MiB would hide what lies beside an expert.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

_PR_SET_THP_DISABLE = 41  # sys/prctl.h of Linux


def touched(data: Path) -> int:
    """Bytes used since the marks were cleared, in the process's own memory and the data file's mapping."""
    found, counts = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, *values = line.split(maxsplit=5)
        if not key.endswith(":"):
            path = values[4] if len(values) == 5 else ""
            counts = path in ("", "[heap]", str(data))
        elif counts and key == "Referenced:":
            found += 1024 * int(values[0])
    return found


def main() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)
    from benchmarks.support.session import Session

    artifact = Path(sys.argv[1]).resolve()
    session = Session(artifact)
    for token in range(4):
        session.run([token])
    Path("/proc/self/clear_refs").write_text("1")
    session.run([7])
    print(touched(artifact / "model.onnx.data"))


if __name__ == "__main__":
    main()
