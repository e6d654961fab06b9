"""Bytes are spent on the parts of a model where they spare most.

Parts' costs add up, as is true of small errors, so the choices are made by taking, again and again, the step
that spares most for what it takes, and at the end by exchanges of two parts. Several things may be limited at
once: a step is priced by the shares of what there is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from qwen_profiles.schema import WeightFormat

from qwen_export.quantize.sensitivity import LayerRole

_FREE = 1e-15  # the price of a step that takes nothing more
_EXCHANGES = 200  # at most: each is a few percent of what the steps before them left, and less


@dataclass(frozen=True)
class Choice:
    """One form of one part.

    Attributes:
        takes: bytes, of each thing that is limited.
        cost: the KL divergence that is expected of it, in nats.
    """

    form: WeightFormat
    takes: tuple[float, ...]
    cost: float


def smallest(
    choices: Mapping[LayerRole, Sequence[Choice]], prices: Sequence[float]
) -> dict[LayerRole, Choice]:
    """For each part the choice that takes least, at a price for a byte of each thing; of equals the best."""

    def price(choice: Choice) -> tuple[float, float]:
        return sum(a * b for a, b in zip(choice.takes, prices, strict=True)), choice.cost

    return {part: min(options, key=price) for part, options in choices.items()}


def allocate(
    choices: Mapping[LayerRole, Sequence[Choice]], budgets: Sequence[float]
) -> dict[LayerRole, Choice]:
    """For each part one of its choices; together at most `budgets`, where the smallest ones are.

    From the smallest on, each step goes from one part's choice to the one that spares most for its bytes,
    until none fits. Then two parts change at once, the one for less and the other for more, while that spares
    anything.

    Args:
        budgets: bytes of each thing that is limited; infinity for no limit.
    """
    prices = [1 / max(budget, 1) for budget in budgets]
    chosen = smallest(choices, prices)
    left = [budget - sum(choice.takes[at] for choice in chosen.values()) for at, budget in enumerate(budgets)]
    while True:
        ways = []
        for part, options in choices.items():
            now = chosen[part]
            for option in options:
                more = [b - a for a, b in zip(now.takes, option.takes, strict=True)]
                if option.cost < now.cost and all(a <= max(b, 0) for a, b in zip(more, left, strict=True)):
                    price = max(sum(a * b for a, b in zip(more, prices, strict=True)), _FREE)
                    ways.append(((now.cost - option.cost) / price, part, option))
        if not ways:
            break
        _, part, option = max(ways, key=lambda way: way[0])
        left = [a + b - c for a, b, c in zip(left, chosen[part].takes, option.takes, strict=True)]
        chosen[part] = option
    for _ in range(_EXCHANGES):
        both = _exchange(choices, chosen, left)
        if not both:
            break
        for part, option in both.items():
            left = [a + b - c for a, b, c in zip(left, chosen[part].takes, option.takes, strict=True)]
            chosen[part] = option
    return chosen


def _exchange(
    choices: Mapping[LayerRole, Sequence[Choice]], chosen: Mapping[LayerRole, Choice], left: Sequence[float]
) -> dict[LayerRole, Choice]:
    """The two parts' other choices that fit and spare most together; empty: none."""
    moves = [
        (at, part, option)
        for at, (part, options) in enumerate(choices.items())
        for option in options
        if option != chosen[part]
    ]
    spared = np.array([chosen[part].cost - option.cost for _, part, option in moves])
    fits = np.not_equal.outer(*[np.array([at for at, *_ in moves])] * 2)
    for thing, room in enumerate(left):
        if np.isfinite(room):
            more = np.array([option.takes[thing] - chosen[part].takes[thing] for _, part, option in moves])
            fits &= np.add.outer(more, more) <= max(room, 0)
    together = np.where(fits, np.add.outer(spared, spared), 0)
    if not together.size or together.max() <= 0:
        return {}
    return {moves[at][1]: moves[at][2] for at in np.unravel_index(int(together.argmax()), together.shape)}
