"""How drafted tokens fare."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Acceptance:
    """How many tokens were drafted and checked, and how many of them were chosen.

    Attributes:
        predicted: how many of those drafted were taken from `Request.prediction`.
        accepted_predicted: how many of those were chosen.
    """

    drafted: int = 0
    accepted: int = 0
    predicted: int = 0
    accepted_predicted: int = 0

    @property
    def rate(self) -> float:
        return self.accepted / max(1, self.drafted)
