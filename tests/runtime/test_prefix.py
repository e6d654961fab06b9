"""States kept between answers: the same tokens as without, and how much of the prompt they spare."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnxruntime_genai as og
import pytest
from qwen_common.errors import UserError
from qwen_runtime import Guidance, Model, Sampling
from qwen_runtime.prefix import KeptGenerator, KeptGenerators, common_prefix

from benchmarks.support.artifacts import directml_profile
from benchmarks.support.checkpoints import TINY
from tests.support.exported import Exported

GREEDY = Sampling(temperature=0)
LONG = {"role": "user", "content": "The statement is a word. " * 60 + "What is assert?"}
NEXT = {"role": "user", "content": "What is yield?"}


@pytest.fixture(scope="module")
def fresh(cpu_artifact: Path) -> Iterator[Model]:
    with Model.load(cpu_artifact) as model:
        yield model


@pytest.fixture
def kept(cpu_artifact: Path) -> Iterator[Model]:
    with Model.load(cpu_artifact, keep=2) as model:
        yield model


def answer(model: Model, messages: Any, **options: Any) -> Any:
    generation = model.generate(messages, **{"max_tokens": 20, "sampling": GREEDY, **options})
    list(generation)
    return generation


@pytest.mark.parametrize("thinking", [False, True])
def test_every_turn_goes_on_where_the_last_question_ended(kept: Model, fresh: Model, thinking: bool) -> None:
    messages = [LONG]
    held = 0
    for _ in range(4):
        found = answer(kept, messages, thinking=thinking)
        assert found.tokens == answer(fresh, messages, thinking=thinking).tokens
        assert found.cached_tokens == held
        # All but the thought that the template begins an answer with, and drops from history.
        ending = "<think>\n" if thinking else "<think>\n\n</think>\n\n"
        held = (found.prompt_tokens - len(fresh.encode(ending))) // 8 * 8
        messages += [{"role": "assistant", "content": found.text}, NEXT]


def test_the_same_question_again(kept: Model, fresh: Model) -> None:
    first, second = answer(kept, [LONG]), answer(kept, [LONG])
    assert second.tokens == first.tokens == answer(fresh, [LONG]).tokens
    assert second.prompt_tokens - second.cached_tokens < 16


def test_raw_prompts(kept: Model, fresh: Model) -> None:
    prompt = "The statement is a word. " * 60
    held = (answer(kept, prompt).prompt_tokens - 1) // 8 * 8
    assert answer(kept, prompt).cached_tokens == held
    longer = answer(kept, prompt + " The")
    assert longer.cached_tokens == held
    assert longer.tokens == answer(fresh, prompt + " The").tokens


def test_two_conversations_at_a_time_and_a_third(kept: Model) -> None:
    def ask(name: str, **options: Any) -> int:
        system = {"role": "system", "content": f"{name} " * 100}
        return int(answer(kept, [system, NEXT], max_tokens=3, **options).cached_tokens)

    assert [ask(name) > 0 for name in ("one", "two", "one", "two")] == [False, False, True, True]
    assert ask("three") == 0
    assert ask("two") > 0
    assert ask("one") == 0  # the one used longest ago made room


def test_what_a_state_was_made_with_is_not_changed(kept: Model) -> None:
    schema = Guidance("json_schema", json.dumps({"type": "integer"}))
    assert answer(kept, [LONG]).cached_tokens == 0
    assert answer(kept, [LONG], sampling=Sampling(temperature=1)).cached_tokens == 0
    assert answer(kept, [LONG], guidance=schema).cached_tokens == 0
    assert answer(kept, [LONG], guidance=schema).cached_tokens > 0
    seeded = Sampling(temperature=1, seed=1)
    texts = [answer(kept, [LONG], sampling=seeded) for _ in range(2)]
    assert texts[0].tokens == texts[1].tokens and texts[1].cached_tokens == 0


def test_longer_answers_than_a_state_has_room_for(kept: Model, fresh: Model) -> None:
    assert answer(kept, [LONG], max_tokens=3).cached_tokens == 0
    assert answer(kept, [LONG], max_tokens=3000).cached_tokens > 0
    longer = kept.generate([LONG], max_tokens=5000, sampling=GREEDY)
    assert longer.cached_tokens == 0
    longer.close()


def test_answers_that_stop_early(kept: Model, fresh: Model) -> None:
    expected = answer(fresh, [LONG]).tokens
    with kept.generate([LONG], sampling=GREEDY) as running:
        next(running)
    assert answer(kept, [LONG]).cached_tokens > 0
    dropped = kept.generate([LONG], sampling=GREEDY)
    next(dropped)
    del dropped
    again = answer(kept, [LONG])
    assert again.cached_tokens > 0 and again.tokens == expected
    stopped = answer(kept, [LONG], stop="e")
    assert stopped.finish_reason == "stop" and answer(kept, [LONG]).tokens == expected


def test_a_prompt_cancelled_half_way_is_not_read_again(
    kept: Model, fresh: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept._backend, "chunk_size", 100)
    appended = []

    class Counting(og.Generator):
        def append_tokens(self, tokens: Any) -> None:
            appended.append(len(tokens))
            super().append_tokens(tokens)
            if len(appended) == 2:
                cancelled.cancel()

    with monkeypatch.context() as patch:
        patch.setattr("onnxruntime_genai.Generator", Counting)
        cancelled = kept.generate([LONG], sampling=GREEDY)
    assert list(cancelled) == [] and cancelled.finish_reason == "cancelled" and appended == [100, 100]
    again = answer(kept, [LONG])
    assert again.cached_tokens == 200
    assert again.tokens == answer(fresh, [LONG]).tokens


def test_a_state_that_failed_is_not_used_again(kept: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(kept, [LONG])

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("qwen_runtime.generation._process_logits", fail)
        with pytest.raises(RuntimeError):
            answer(kept, [LONG])
    assert answer(kept, [LONG]).cached_tokens == 0


def test_reading_ahead_leaves_only_the_question(kept: Model, fresh: Model) -> None:
    first = answer(kept, [LONG], max_tokens=100)
    messages = [LONG, {"role": "assistant", "content": first.text}]
    kept.read_ahead(messages, sampling=GREEDY)
    for said in ("What is yield?", "  \n\nWhat?", "中"):
        kept.read_ahead(messages, sampling=GREEDY)
        turn = [*messages, {"role": "user", "content": said}]
        second = answer(kept, turn)
        assert second.tokens == answer(fresh, turn).tokens
        if said == "What is yield?":
            assert second.prompt_tokens - second.cached_tokens < 40
    asked = []

    def twice() -> bool:
        asked.append(None)
        return len(asked) > 2

    other = [{**LONG, "content": "Other. " + LONG["content"]}]
    held = answer(kept, other, max_tokens=200).prompt_tokens
    turn = [*other, {"role": "assistant", "content": "word " * 200}]
    kept.read_ahead(turn, sampling=GREEDY, cancelled=twice)
    third = answer(kept, [*turn, NEXT])
    assert held - 20 + 128 <= third.cached_tokens < held + 128
    assert third.tokens == answer(fresh, [*turn, NEXT]).tokens
    kept.read_ahead([{"role": "user", "content": "Never seen."}])  # nothing to go on from


def test_portable_artifacts_read_everything(exported: Exported) -> None:
    with Model.load(exported(TINY, directml_profile()), keep=2) as model:
        first, second = answer(model, [LONG]), answer(model, [LONG])
        assert second.cached_tokens == 0 and first.tokens == second.tokens


def test_context_may_be_smaller(cpu_artifact: Path) -> None:
    with Model.load(cpu_artifact, context_length=300, keep=1) as model:
        assert model.info.context_length == 300
        with pytest.raises(UserError, match="the context is 300"):
            model.generate([LONG])
        assert answer(model, [NEXT], max_tokens=1000).finish_reason in ("stop", "length")


def test_the_same_bits(cpu_artifact: Path) -> None:
    """Log probabilities show more than tokens do."""
    messages = [LONG, {"role": "assistant", "content": "It is a word. " * 9}, NEXT]
    with Model.load(cpu_artifact, keep=1) as kept, Model.load(cpu_artifact) as fresh:
        expected = answer(fresh, messages, logprobs=20).logprobs
        for ahead in (False, True):
            answer(kept, [LONG])
            if ahead:
                kept.read_ahead(messages[:2], sampling=GREEDY)
            found = answer(kept, messages, logprobs=20)
            assert found.cached_tokens > 300 and found.logprobs == expected


def test_cache_takes_the_longest(kept: Model) -> None:
    cache = KeptGenerators(3)
    for length in (1, 3, 2):
        cache.put(KeptGenerator(None, {}, 10, tuple(range(length))))
    taken = cache.take(range(5), {}, 10)  # type: ignore[arg-type]
    assert taken is not None and list(taken.tokens) == [0, 1, 2]
    assert cache.take([0], {}, 10) is None  # nothing would be left to read
    assert common_prefix([1, 2, 3], [1, 2]) == 2 and common_prefix([1], [2]) == 0


def test_guidance_penalties_and_logprobs(fresh: Model) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    found = answer(fresh, [NEXT], guidance=Guidance("json_schema", json.dumps(schema)), max_tokens=200)
    assert isinstance(json.loads(found.text)["n"], int)
    with pytest.raises(UserError, match=r"the guidance is not valid: .*Invalid type: nope"):
        fresh.generate([NEXT], guidance=Guidance("json_schema", '{"type": "nope"}'))
    twice = answer(fresh, "The a", sampling=Sampling(temperature=0, presence_penalty=100.0), max_tokens=40)
    assert len(set(twice.tokens)) == 40
    same = answer(fresh, "The a", sampling=Sampling(temperature=0, frequency_penalty=-100.0), max_tokens=40)
    assert len(set(same.tokens)) == 1
    likely = answer(fresh, "The a", logprobs=3)
    assert len(likely.logprobs) == 20
    for token, entry in zip(likely.tokens, likely.logprobs, strict=True):
        assert entry.text == fresh.decode([token]) == entry.top[0][0] and entry.logprob == entry.top[0][1]
        assert len(entry.top) == 3 and entry.top[0][1] >= entry.top[1][1] >= entry.top[2][1]
    with pytest.raises(UserError, match="logprobs is 21"):
        fresh.generate("The", logprobs=21)
