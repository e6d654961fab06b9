"""Answers as they grow: length, stop strings, characters, cancelling."""

from __future__ import annotations

import gc
import threading
import weakref
from pathlib import Path

import numpy as np
import onnxruntime_genai as og
import pytest
from qwen_common.errors import UserError
from qwen_runtime import Model, Sampling
from qwen_runtime.guidance import Guidance

GREEDY = Sampling(temperature=0)


def test_length_and_usage(model: Model) -> None:
    generation = model.generate("The statement", max_tokens=5, sampling=GREEDY)
    pieces = list(generation)
    assert len(generation.tokens) == 5
    assert generation.finish_reason == "length"
    assert generation.prompt_tokens == len(model.encode("The statement"))
    assert "".join(pieces) == model.decode(generation.tokens)


def test_stop_strings_never_show(model: Model) -> None:
    whole = "".join(model.generate("The", max_tokens=60, sampling=GREEDY))
    stop = whole[20:31]  # over several tokens
    generation = model.generate("The", max_tokens=60, sampling=GREEDY, stop=["not in there", stop])
    assert "".join(generation) == whole[: whole.index(stop)]
    assert generation.finish_reason == "stop"


def test_characters_of_several_tokens_come_whole(model: Model) -> None:
    """To this small vocabulary they are bytes. They are put in the model's mouth."""
    text = "a🙂b é 中文 ünï"
    said = iter(model.encode(text))
    assert len(model.encode(text)) > len(text)

    class Puppet(og.Generator):
        def get_next_tokens(self) -> np.ndarray:
            return np.array([next(said)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("onnxruntime_genai.Generator", Puppet)
        pieces = list(model.generate("The", max_tokens=len(model.encode(text)), sampling=GREEDY))
    assert "".join(pieces) == text
    assert "🙂" in pieces and "中" in pieces and "�" not in "".join(pieces)


def test_answers_that_end_in_the_middle_of_a_character(model: Model) -> None:
    """By their bytes. They are put in the model's mouth."""
    begun = model.encode("a🙂")[:-1]
    said = iter(begun)

    class Puppet(og.Generator):
        def get_next_tokens(self) -> np.ndarray:
            return np.array([next(said)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("onnxruntime_genai.Generator", Puppet)
        generation = model.generate("The", max_tokens=len(begun), sampling=GREEDY)
        assert list(generation) == ["a", "�"]
    assert generation.text == model.decode(begun) and generation.finish_reason == "length"


def test_cancel_from_another_thread(model: Model) -> None:
    generation = model.generate("The", max_tokens=4000, sampling=GREEDY)
    first = next(generation)
    thread = threading.Thread(target=generation.cancel)
    thread.start()
    thread.join()
    assert list(generation) == []
    assert generation.text == first
    assert generation.finish_reason == "cancelled"


def test_cancel_during_a_long_prompt(model: Model) -> None:
    generation = model.generate("word " * 4000, max_tokens=1)
    generation.cancel()
    assert list(generation) == [] and generation.finish_reason == "cancelled"


def test_a_closed_generation_yields_nothing_more(model: Model) -> None:
    generation = model.generate("The", max_tokens=100)
    next(generation)
    generation.close()
    assert list(generation) == []


def test_a_dropped_generation_is_freed_at_once(model: Model) -> None:
    gc.disable()
    try:
        generation = model.generate("The", max_tokens=100)
        next(generation)
        running = weakref.ref(generation._pieces)
        del generation
        assert running() is None
    finally:
        gc.enable()
    with model.generate("The", max_tokens=100) as generation:
        first = next(generation)
    assert list(generation) == [] and generation.text == first


def test_answers_end_where_the_context_does(cpu_artifact: Path) -> None:
    with Model.load(cpu_artifact) as model:
        prompt = model.decode(model.encode("word " * 8200)[:8185])
        generation = model.generate(prompt, sampling=GREEDY, max_tokens=100)
        list(generation)
        assert generation.prompt_tokens + len(generation.tokens) <= 8192


def test_guidance_that_fails_on_the_way(model: Model) -> None:
    """GenAI 0.18 loses the tokens of a character that its grammar forces. The model stays usable."""
    with pytest.raises(UserError, match="could not be held to the guidance: Parser Error"):
        list(model.generate("The", max_tokens=5, sampling=GREEDY, guidance=Guidance("regex", "中")))
    assert list(model.generate("The", max_tokens=5, sampling=GREEDY))
