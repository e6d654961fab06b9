"""The automatic switch on a machine whose times are known."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from qwen_runtime.speculative.drafts import Draft
from qwen_runtime.speculative.switch import Switch

ONE = 0.03  # seconds


@dataclass
class Answer:
    """Tokens, each of which a draft foresees with the probability `rate`, where a run of n tokens takes
    `costs[n]` times as long as one of one; `noise` is the spread of that, and `drafting` the time of a
    token of a draft."""

    rate: float
    costs: dict[int, float]
    noise: float = 0.0
    drafting: float = 0.0

    def speed(self, switch: Switch, tokens: int, seed: int = 0) -> float:
        """Tokens a second, plain decoding = 1."""
        random = np.random.default_rng(seed)
        made, seconds = 0, 0.0
        draft = Draft([0] * 7, "a source")

        def run(length: int) -> float:
            return ONE * self.costs[length] * float(np.exp(self.noise * random.standard_normal()))

        while made < tokens:
            count = switch.count(draft)
            if count and self.drafting:
                switch.drafted(draft.source, count * self.drafting * ONE, count)
                seconds += count * self.drafting * ONE
            took = run(1 + count)
            switch.took(1 + count, took)
            seconds, made = seconds + took, made + 1
            for _ in range(max(1, count)):
                right = bool(random.random() < self.rate)
                switch.judged(draft.source, right)
                if not right or not count:
                    break
                switch.yielded()
                made += 1
        return made * ONE / seconds


def linear(further: float) -> dict[int, float]:
    return {length: 1 + further * (length - 1) for length in range(1, 9)}


@pytest.mark.parametrize("noise", [0.0, 0.2])
@pytest.mark.parametrize(("rate", "further"), [(0.0, 0.3), (0.3, 0.4), (0.8, 1.0), (0.5, 0.6)])
def test_no_more_than_two_percent_are_lost(rate: float, further: float, noise: float) -> None:
    for drafting in (0.0, 0.3):
        answer = Answer(rate, linear(further), noise, drafting)
        speeds = [answer.speed(Switch(7), 2000, seed) for seed in range(2)]
        still = float(np.exp(noise**2 / 2))  # of the mean over the median, which is none of its loss
        assert min(speeds) * still > 0.98 - 0.01 * (noise > 0), (drafting, speeds)


@pytest.mark.parametrize(("rate", "further"), [(0.9, 0.15), (0.95, 0.3), (0.7, 0.2)])
def test_what_there_is_to_win_is_won(rate: float, further: float) -> None:
    costs = linear(further)
    best = max(sum(rate**at for at in range(count + 1)) / costs[count + 1] for count in range(8))
    assert best > 1.3
    assert Answer(rate, costs).speed(Switch(7), 2000) > 0.9 * best


def test_the_next_answer_knows_what_the_last_one_found() -> None:
    switch = Switch(7)
    Answer(0.0, linear(0.3)).speed(switch, 500)
    assert switch.count(Draft([0] * 7, "a source")) == 0
    assert Answer(0.95, linear(0.15)).speed(switch, 1000) > 2  # what it drafts is right again


def test_of_pairs_one_draft_is_checked() -> None:
    switch = Switch(1, always=True)
    assert switch.count(Draft([0] * 7, "a source")) == 1
