"""`/v1/completions` through the official `openai` client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from qwen_runtime import Model, Sampling

from benchmarks.support.artifacts import float_profile
from benchmarks.support.checkpoints import TINY
from tests.support.exported import Exported
from tests.support.servers import Server, endless, serving

GREEDY = Sampling(temperature=0)


def test_completions(client: OpenAI, model: Model) -> None:
    text = "".join(model.generate("The", max_tokens=12, sampling=GREEDY))
    options: dict[str, Any] = {"model": model.info.name, "prompt": "The", "max_tokens": 12, "temperature": 0}
    answer = client.completions.create(**options)
    assert answer.choices[0].text == text and answer.usage and answer.usage.completion_tokens == 12
    chunks = list(client.completions.create(**options, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == text
    assert chunks[-1].choices[0].finish_reason == "length"


def test_text_offset_of_characters_in_several_tokens(client: OpenAI, model: Model) -> None:
    ids = model.encode("é x")
    assert len(ids) == 3
    options: dict[str, Any] = {"model": model.info.name, "prompt": "The", "max_tokens": 6, "logprobs": 0}
    options |= {"temperature": 2, "logit_bias": {str(token): 100 for token in ids}}
    options |= {"presence_penalty": 2, "frequency_penalty": 2}
    for seed in range(100):
        choice = client.completions.create(**options, seed=seed).choices[0]
        if "é x" in choice.text:
            break
    assert choice.logprobs and choice.logprobs.tokens and choice.logprobs.text_offset
    whole = 0
    for token, offset in zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True):
        if token == " x" and "é" in choice.text[:offset]:
            assert choice.text[offset:].startswith(token)
            whole += 1
    assert whole
    stream = client.completions.create(**options, seed=seed, stream=True)
    pieces = [chunk.choices[0].logprobs for chunk in stream]
    assert [at for piece in pieces if piece for at in piece.text_offset or ()] == choice.logprobs.text_offset


TEXTS = ("The assert statement checks a condition.", "A list is mutable. é 中")


@pytest.fixture(scope="module")
def exact(exported: Exported) -> Iterator[tuple[Server, Model]]:
    """An artifact that quantises nothing."""
    artifact = exported(TINY, float_profile("fused"))
    with serving(artifact) as server, Model.load(artifact) as model:
        yield server, model


def test_prompt_is_told_with_its_log_probabilities(exact: tuple[Server, Model]) -> None:
    """As evaluators ask for them, and as transformers computes them in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    server, model = exact
    client = server.client()
    reference = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    prompts = [model.encode(text) for text in TEXTS]
    answer = client.completions.create(
        model="any", prompt=prompts, max_tokens=1, temperature=0, logprobs=2, echo=True
    )
    for choice, text, ids in zip(answer.choices, TEXTS, prompts, strict=True):
        with torch.no_grad():
            expected = torch.log_softmax(reference(torch.tensor([ids])).logits[0], -1)
        told = choice.logprobs
        assert told and told.tokens and told.token_logprobs and told.top_logprobs and told.text_offset
        assert choice.text.startswith(text) and len(told.tokens) == len(ids) + 1
        assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
        found = told.token_logprobs[1 : len(ids)]
        assert found == pytest.approx(expected[range(len(ids) - 1), ids[1:]].tolist(), abs=2e-3)
        likeliest = [max(top.values()) for top in told.top_logprobs[1:] if top]
        assert likeliest == pytest.approx(expected.max(-1).values.tolist(), abs=2e-3)
        for token, offset in zip(told.tokens, told.text_offset, strict=True):
            assert token == "\ufffd" or choice.text[offset:].startswith(token)
    assert answer.usage and answer.usage.prompt_tokens == sum(map(len, prompts))
    assert answer.usage.completion_tokens == 2


def test_prompt_alone(client: OpenAI, model: Model) -> None:
    ids = model.encode(TEXTS[0])
    for prompt in (TEXTS[0], ids, [ids], [TEXTS[0]]):
        answer = client.completions.create(model="any", prompt=prompt, max_tokens=0, echo=True, logprobs=0)
        choice = answer.choices[0]
        assert choice.text == TEXTS[0] and choice.finish_reason == "length"
        assert choice.logprobs and choice.logprobs.tokens and len(choice.logprobs.tokens) == len(ids)
        assert answer.usage and (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 0)
    plain = client.completions.create(model="any", prompt=ids, max_tokens=3, echo=True, temperature=0)
    stream = client.completions.create(
        model="any", prompt=ids, max_tokens=3, echo=True, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == plain.choices[0].text
    assert plain.choices[0].text.startswith(TEXTS[0]) and plain.choices[0].logprobs is None
    unsaid = client.completions.create(model="any", prompt=ids, max_tokens=0)
    assert unsaid.choices[0].text == ""


def test_every_token_has_an_entry_also_the_one_that_ends_the_answer(client: OpenAI, model: Model) -> None:
    """Evaluators count from the end."""
    end = model.encode("<|im_end|>")[0]
    options: dict[str, Any] = {"model": "any", "prompt": TEXTS[0], "max_tokens": 1, "logit_bias": {end: 100}}
    choice = client.completions.create(**options, echo=True, logprobs=1).choices[0]
    assert choice.finish_reason == "stop" and choice.text == TEXTS[0] and choice.logprobs
    assert choice.logprobs.tokens and choice.logprobs.tokens[-1] == "<|im_end|>"
    assert len(choice.logprobs.tokens) == len(model.encode(TEXTS[0])) + 1


def test_several_prompts_and_answers(client: OpenAI, model: Model) -> None:
    options: dict[str, Any] = {"model": "any", "max_tokens": 8, "temperature": 1}
    answer = client.completions.create(**options, prompt=["The", "A list"], n=2, seed=5)
    alone = [
        client.completions.create(**options, prompt=prompt, seed=seed).choices[0].text
        for prompt in ("The", "A list")
        for seed in (5, 6)
    ]
    assert [choice.text for choice in answer.choices] == alone and len(set(alone)) == 4
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    read = len(model.encode("The")) + len(model.encode("A list"))
    assert answer.usage and (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (read, 32)
    twice = client.completions.create(**options, prompt=["The", "The"], n=2)
    assert twice.usage and twice.usage.prompt_tokens == 2 * len(model.encode("The"))
    texts = ["", "", "", ""]
    stream = client.completions.create(
        **options, prompt=["The", "A list"], n=2, seed=5, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    for chunk in chunks[:-1]:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == alone and chunks[-1].usage == answer.usage


def test_lengths_and_ends(client: OpenAI, model: Model, cpu_artifact: Path) -> None:
    options: dict[str, Any] = {"model": "any", "prompt": "The", "temperature": 0}
    ends = list(endless(cpu_artifact))
    urged = {"logit_bias": dict.fromkeys(ends, 50)}
    assert client.completions.create(**options, **urged).choices[0].text == ""
    for further, written in (({"min_tokens": 5}, 5), ({"min_tokens": 5.0, "max_tokens": 4}, 4)):
        answer = client.completions.create(**options, **urged, extra_body=further)
        assert answer.usage and answer.usage.completion_tokens == written
        assert answer.choices[0].finish_reason == ("stop" if written == 5 else "length")
    answer = client.completions.create(**options, **urged, max_tokens=9, extra_body={"ignore_eos": True})
    assert answer.usage and answer.usage.completion_tokens == 9
    whole = model.generate("The", max_tokens=9, sampling=GREEDY)
    text = "".join(whole)
    stop = whole.tokens[4]
    expected = model.decode(whole.tokens[: whole.tokens.index(stop)])
    answer = client.completions.create(**options, extra_body={"stop_token_ids": [stop], "ignore_eos": True})
    assert answer.choices[0].text == expected != text and answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    "options,message",
    [
        ({"prompt": []}, "prompt: "),
        ({"prompt": [[]]}, "prompt.0: "),
        ({"prompt": ["a", 5]}, "prompt.1: "),
        ({"prompt": [10**8]}, "the prompt has token 100000000, but they go from 0 to"),
        ({"prompt": ["a"] * 600, "n": 4}, "more than 2048 choices"),
        ({"best_of": 2}, "best_of: only 1 is supported"),
        ({"suffix": "b"}, 'suffix: only "" is supported'),
        ({"max_tokens": -1}, "max_tokens: "),
        ({"logprobs": 21}, "logprobs: "),
        ({"prompt": ["The", ""], "max_tokens": 1}, "the prompt is empty"),
    ],
)
def test_requests_that_are_refused(client: OpenAI, options: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        client.completions.create(**{"model": "any", "prompt": "The", **options})
