"""Given tokens and answers see the same logits."""

from __future__ import annotations

import numpy as np
import pytest
from qwen_common.errors import UserError
from qwen_runtime import Model, Sampling

GREEDY = Sampling(temperature=0)


def test_an_answer_is_the_likeliest_tokens(model: Model) -> None:
    prompt = model.encode("The statement")
    generation = model.generate("The statement", max_tokens=12, sampling=GREEDY, logprobs=1)
    generation.run()
    tokens = [*prompt, *generation.tokens]
    scored = list(model.score(tokens, len(prompt)))
    assert [int(logits.argmax()) for logits in scored[:-1]] == generation.tokens
    assert len(scored) == 13 and scored[0].dtype == np.float32
    found = model.logprobs(tokens)[len(prompt) - 1 :]
    assert found == pytest.approx([entry.logprob for entry in generation.logprobs], abs=1e-3)
    assert len(list(model.pace(tokens, len(prompt)))) == 13


def test_tokens_that_do_not_fit(model: Model) -> None:
    with pytest.raises(UserError, match="8192 tokens do not fit the context of 8192"):
        next(model.score([1] * 8192, 1))
