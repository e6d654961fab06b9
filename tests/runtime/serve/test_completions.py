"""`/v1/completions` through the official `openai` client."""

from __future__ import annotations

from typing import Any

from openai import OpenAI
from qwen_runtime import Model, Sampling

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
