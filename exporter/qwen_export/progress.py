"""What a long task tells while it runs."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """What an export tells while it runs."""

    def note(self, message: str) -> None:
        """One line worth reading now."""

    def start(self, total: int) -> None:
        """`total` bytes of checkpoint are to be dealt with."""

    def advance(self, count: int) -> None:
        """`count` of them just were."""


class Silent:
    """Tells nobody."""

    def note(self, message: str) -> None: ...

    def start(self, total: int) -> None: ...

    def advance(self, count: int) -> None: ...
