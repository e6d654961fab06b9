"""Stop strings in streamed text."""

from __future__ import annotations

from collections.abc import Sequence


class StopFilter:
    """Passes text through until one of `stops` appears, which is never passed on, not even in part.

    Holds back only what could still become a stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found: str | None = None  # the first of them

    def feed(self, text: str) -> str:
        """The text that may be shown now."""
        self._held += text
        found = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            at, self.found = min(found)
            shown, self._held = self._held[:at], ""
            return shown
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    @property
    def stopped(self) -> bool:
        return self.found is not None

    def flush(self) -> str:
        """What is left when the text has ended."""
        shown, self._held = self._held, ""
        return shown

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that begins `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((size for size in range(longest, 0, -1) if self._held.endswith(stop[:size])), 0)
