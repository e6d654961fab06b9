"""The runtime inside somebody's program: event loops, callbacks, threads, several models."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from qwen_common.errors import UserError
from qwen_runtime import Generation, Model, Sampling

QUESTIONS = ("What is assert?", "Explain numbers.", "Tell me about yield.")
GREEDY = Sampling(temperature=0)


def ask(model: Model, question: str, **options: Any) -> Generation:
    options = {"max_tokens": 40, "sampling": GREEDY, **options}
    return model.generate([{"role": "user", "content": question}], **options)


def endless(model: Model) -> Generation:
    """An answer of 5000 tokens: those that could end it are ruled out."""
    config = json.loads((model.info.path / "genai_config.json").read_text())
    bias = {token: -100.0 for token in config["model"]["eos_token_id"]}
    return ask(model, "What is assert?", max_tokens=5000, sampling=Sampling(temperature=0, logit_bias=bias))


def test_answers_on_an_event_loop(model: Model) -> None:
    expected = ["".join(ask(model, question)) for question in QUESTIONS]

    async def collect(question: str) -> str:
        return "".join([piece async for piece in ask(model, question)])

    async def together() -> list[str]:
        return await asyncio.gather(*map(collect, QUESTIONS))

    assert asyncio.run(together()) == expected


def test_the_event_loop_goes_on_meanwhile(model: Model) -> None:
    """The loop's thread makes no token itself."""
    threads: set[int] = set()

    async def watch() -> None:
        with ask(model, QUESTIONS[0]) as generation:
            make = generation._pieces

            def noting() -> Iterator[str]:
                for piece in make:
                    threads.add(threading.get_ident())
                    yield piece

            generation._pieces = noting()  # type: ignore[assignment]
            assert [piece async for piece in generation]

    asyncio.run(watch())
    assert threads and threading.get_ident() not in threads


def test_a_cancelled_task_stops_the_answer(model: Model) -> None:
    async def leave() -> Generation:
        begun = asyncio.Event()
        with endless(model) as generation:

            async def read() -> None:
                async for _ in generation:
                    begun.set()

            task = asyncio.create_task(read())
            await begun.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return generation

    generation = asyncio.run(leave())
    made = len(generation.tokens)
    assert 0 < made < 5000
    time.sleep(0.1)
    assert len(generation.tokens) == made and list(generation) == []


def test_callback(model: Model) -> None:
    pieces: list[str] = []
    generation = ask(model, QUESTIONS[0])
    assert generation.run(pieces.append) == "".join(pieces) == "".join(ask(model, QUESTIONS[0]))
    assert len(pieces) > 5


def test_two_models_and_several_threads(model: Model, cpu_artifact: Path) -> None:
    expected = [ask(model, question).run() for question in QUESTIONS]
    found: dict[tuple[int, str], str] = {}
    with Model.load(cpu_artifact) as other:

        def answer(which: int, question: str) -> None:
            found[which, question] = ask((model, other)[which], question).run()

        threads = [
            threading.Thread(target=answer, args=(which, text)) for which in (0, 1) for text in QUESTIONS
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [found[which, text] for which in (0, 1) for text in QUESTIONS] == expected * 2


def test_a_closed_model_says_so(cpu_artifact: Path) -> None:
    with Model.load(cpu_artifact) as model:
        generation = ask(model, QUESTIONS[0])
        assert next(generation)
    model.close()
    with pytest.raises(UserError, match="is closed: load it again"):
        ask(model, QUESTIONS[0])
    assert "".join(generation)  # holds what it needs until it ends
