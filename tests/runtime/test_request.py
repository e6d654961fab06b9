"""The one form in which an answer is asked for."""

from __future__ import annotations

import pickle
import threading

import pytest
from qwen_common.errors import UserError
from qwen_runtime import Guidance, Model, Sampling
from qwen_runtime.request import Request

QUESTION = [{"role": "user", "content": "What is assert?"}]
GREEDY = Sampling(temperature=0)


def test_it_is_what_generate_makes_of_its_arguments(model: Model) -> None:
    tools = [{"type": "function", "function": {"name": "clock"}}]
    sampling = Sampling(temperature=1, seed=4, logit_bias={7: -2.0})
    request = Request(
        QUESTION,
        30,
        sampling,
        stop="q",
        thinking=True,
        tools=tools,
        guidance=Guidance("regex", ".*"),
        logprobs=1,
    )
    sent = pickle.loads(pickle.dumps(request))
    assert sent == request
    found = model.answer(sent)
    expected = model.generate(
        QUESTION,
        max_tokens=30,
        sampling=sampling,
        stop="q",
        thinking=True,
        tools=tools,
        guidance=Guidance("regex", ".*"),
        logprobs=1,
    )
    assert found.run() == expected.run() and found.logprobs == expected.logprobs
    assert found.finish_reason == expected.finish_reason and len(found.tokens) > 3


def test_mistakes_are_known_without_a_model() -> None:
    for request, message in (
        (Request("The", max_tokens=-1), "max_tokens is -1"),
        (Request("The", prediction=None), "prediction must be a text"),  # type: ignore[arg-type]
        (Request("The", logprobs=-1), "logprobs is -1"),
        (Request("The", sampling=Sampling(top_p=2)), "top_p is 2"),
    ):
        with pytest.raises(UserError, match=message):
            request.check()


def test_cancelled_before_it_began(model: Model) -> None:
    cancelled = threading.Event()
    generation = model.answer(Request(QUESTION, sampling=GREEDY), cancelled)
    cancelled.set()
    assert list(generation) == [] and generation.finish_reason == "cancelled"
