"""How tokens are chosen, and options that are out of range."""

from __future__ import annotations

import math

import pytest
from qwen_common.errors import UserError
from qwen_runtime import Model, Sampling
from qwen_runtime.guidance import Guidance

QUESTION = [{"role": "user", "content": "What is assert?"}]


def test_seed(model: Model) -> None:
    def text(seed: int) -> str:
        return "".join(
            model.generate("The", max_tokens=30, sampling=Sampling(temperature=1.0, top_k=50, seed=seed))
        )

    assert text(1) == text(1)
    assert len({text(seed) for seed in range(5)}) > 1


def test_more_top_k_than_there_are_tokens(model: Model) -> None:
    sampling = Sampling(temperature=1.0, top_k=2**40, seed=3)
    assert "".join(model.generate("The", max_tokens=5, sampling=sampling))


@pytest.mark.parametrize("min_p", [0.0, 0.2])
def test_min_p_rules_the_unlikely_out(model: Model, min_p: float) -> None:
    """At the temperature, and among all tokens: what it lets through would be chosen too without `top_k`."""
    sampling = Sampling(temperature=1.5, top_p=1.0, top_k=2**40, seed=5, min_p=min_p)
    generation = model.generate(QUESTION, max_tokens=60, sampling=sampling, logprobs=1)
    generation.run()
    shares = [math.exp((entry.logprob - entry.top[0][1]) / 1.5) for entry in generation.logprobs]
    assert len(shares) > 20 and min(shares) < 0.9  # it still samples
    assert (min(shares) >= 0.2) == (min_p == 0.2)


def test_min_p_leaves_what_a_grammar_needs(model: Model) -> None:
    guidance = Guidance("regex", "(yes|no), zebra")
    sampling = Sampling(temperature=1.0, seed=5, min_p=1.0)
    assert model.generate(QUESTION, sampling=sampling, guidance=guidance).run() in ("yes, zebra", "no, zebra")


@pytest.mark.parametrize(
    "options,message",
    [
        ({"sampling": Sampling(min_p=1.5)}, "min_p is 1.5, but must be from 0 to 1"),
        ({"sampling": Sampling(temperature=-1)}, "temperature is -1, but must be 0 or more"),
        ({"sampling": Sampling(top_p=0)}, "top_p is 0, but must be above 0"),
        ({"sampling": Sampling(top_k=0)}, "top_k is 0"),
        ({"sampling": Sampling(repetition_penalty=0)}, "repetition_penalty is 0"),
        ({"sampling": Sampling(seed=-1)}, "seed is -1"),
        ({"max_tokens": -1}, "max_tokens is -1"),
    ],
)
def test_options_out_of_range(model: Model, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        model.generate("The", **options)
