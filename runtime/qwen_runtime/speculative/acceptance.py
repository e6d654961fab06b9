"""How drafted tokens fare."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Acceptance:
    """How many tokens were drafted and checked, and how many of them were chosen."""

    drafted: int = 0
    accepted: int = 0

    @property
    def rate(self) -> float:
        return self.accepted / max(1, self.drafted)
