"""Stop strings in streamed text."""

from __future__ import annotations

import pytest
from qwen_runtime.stop import StopFilter


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_stop_filter_holds_back_only_what_it_must(size: int) -> None:
    text = "abcabxabcabcabd"
    stop = StopFilter(["abcabd", ""])
    shown = "".join(stop.feed(text[at : at + size]) for at in range(0, len(text), size))
    assert shown == "abcabxabc" and stop.stopped
    held = StopFilter(["xyz"])
    assert held.feed("ab") == "ab"
    assert held.feed("xy") == "" and held.flush() == "xy"
