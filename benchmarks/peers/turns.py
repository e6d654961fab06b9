"""How a peer takes its turns: load, say so, then one measurement for each line that comes in.

A peer is a command. It prints one JSON line once it is loaded, `{"load_seconds": s}` and what else it likes
to tell of itself, and one for each line on its standard input: `{"prefill": tokens/s, "decode": tokens/s}`.
Only the standard library, so that a peer may live in an environment of its own.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

Measure = Callable[[], dict[str, float]]


def take_turns(load: Callable[[], tuple[Measure, dict[str, Any]]]) -> None:
    """`load` returns what measures once, and what to tell about the peer."""
    started = time.perf_counter()
    measure, facts = load()
    _say({"load_seconds": time.perf_counter() - started, **facts})
    for _ in sys.stdin:
        _say(measure())


def _say(content: dict[str, Any]) -> None:
    print(json.dumps(content), flush=True)
