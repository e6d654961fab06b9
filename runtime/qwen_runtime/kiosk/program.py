"""What a launcher starts of this version: `qwen-run`, which ends when the launcher does."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

_GRACE = 35  # seconds: `serve` lets running answers finish


def main() -> None:
    sys.argv[0] = "qwen-run"
    if sys.argv[1:2] == ["--while-stdin-is-open"]:
        del sys.argv[1]
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    from qwen_runtime.cli import main as run

    run()


def _end_with_stdin() -> None:
    """A launcher that was killed closes its end, and leaves nobody behind who holds the port."""
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE)
    os._exit(1)
