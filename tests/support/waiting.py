"""Waiting for what another thread, process or machine does.

A test waits for a condition and not for a time: what takes a second here takes ten where other programs run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

PATIENCE = 300.0  # seconds: only what never happens takes so long


def until(condition: Callable[[], T]) -> T:
    """What `condition` returns, once that is true."""
    deadline = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < deadline, "what was waited for did not happen"
        time.sleep(0.02)
    return found
