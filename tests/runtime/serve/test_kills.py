"""The model's process killed at any moment: every request is answered, and the next one works."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from qwen_runtime.request import Request
from qwen_runtime.sampling import Sampling
from qwen_runtime.serve import supervisor
from qwen_runtime.serve.engine import Engine
from qwen_runtime.serve.errors import ApiError
from qwen_runtime.serve.models import Models
from qwen_runtime.serve.worker import ModelSettings

from tests.support.servers import (
    Server,
    endless,
    health,
    held,
    request,
    serving,
    wait_until_idle,
    workers,
)
from tests.support.waiting import PATIENCE, until

QUESTION = [{"role": "user", "content": "What is assert?"}]
LONG = [{"role": "user", "content": "What is assert? " * 1000}]  # 7,000 tokens, of 8,192


@pytest.fixture(scope="module")
def server(cpu_artifact: Path) -> Iterator[Server]:
    """Of two models, which are the same one."""
    with serving(cpu_artifact, "--model", f"other={cpu_artifact}") as running:
        yield running


def ask(server: Server, model: str, **options: Any) -> Any:
    client = server.client(timeout=PATIENCE)
    asked: dict[str, Any] = {"model": model, "messages": QUESTION, "max_tokens": 4, **options}
    return client.chat.completions.create(**asked)


def ask_beside(server: Server, ends: list[str], model: str, **options: Any) -> threading.Thread:
    """In a thread, which adds the model that answered to `ends`, or the words of the server's error."""

    def end() -> None:
        try:
            ends.append(ask(server, model, **options).model)
        except openai.InternalServerError as error:
            ends.append(str(error))

    thread = threading.Thread(target=end)
    thread.start()
    return thread


def until_answered(server: Server, model: str) -> None:
    def answered() -> bool:
        try:
            return bool(ask(server, model).choices[0].message.content)
        except openai.InternalServerError:
            return False

    until(answered)
    wait_until_idle(server)


def another_worker(server: Server, than: psutil.Process) -> psutil.Process:
    return until(lambda: [worker for worker in workers(server) if worker != than])[0]


def test_in_an_answer(server: Server, cpu_artifact: Path) -> None:
    until_answered(server, "tiny-dense")
    bias = endless(cpu_artifact)
    stream = ask(server, "tiny-dense", max_tokens=8000, logit_bias=bias, stream=True)
    next(iter(stream))
    [worker] = workers(server)
    worker.kill()
    with pytest.raises(openai.APIError, match="the model's process ended: try again"):
        list(stream)
    until_answered(server, "tiny-dense")


def test_in_a_prompt(server: Server) -> None:
    said = ["tiny-dense"]
    while said == ["tiny-dense"]:  # on a busy machine the answer may be there first
        until_answered(server, "tiny-dense")
        [worker] = workers(server)
        said = []
        thread = ask_beside(server, said, "tiny-dense", messages=LONG)
        until(lambda said=said: health(server)["running"] or said)
        worker.kill()
        thread.join(PATIENCE)
    assert "the model's process ended: try again" in said[0]
    until_answered(server, "tiny-dense")


def test_while_requests_wait_for_both_models(server: Server, cpu_artifact: Path) -> None:
    """Those for the model that dies are told so, those for the other have their turn."""
    until_answered(server, "tiny-dense")
    stream = ask(server, "tiny-dense", max_tokens=8000, logit_bias=endless(cpu_artifact), stream=True)
    next(iter(stream))
    ends: list[str] = []
    threads = []
    with held(server):
        for waiting, model in enumerate(("tiny-dense", "other", "tiny-dense", "other")):
            threads.append(ask_beside(server, ends, model))
            until(lambda waiting=waiting: health(server)["waiting"] > waiting)
        [worker] = workers(server)
        worker.kill()
    for thread in threads:
        thread.join(PATIENCE)
    # The one behind "other" waits for the model that is loaded after it.
    assert [end for end in ends if "being loaded again" not in end] == ["other", "other", "tiny-dense"]
    assert len(ends) == 4
    wait_until_idle(server)


def test_while_a_model_is_loaded(server: Server) -> None:
    said = ["other"]
    while said == ["other"]:  # on a busy machine it may be loaded first
        until_answered(server, "tiny-dense")
        [first] = workers(server)
        said = []
        thread = ask_beside(server, said, "other")
        another_worker(server, first).kill()
        thread.join(PATIENCE)
    assert "other cannot be loaded: the model's process ended with" in said[0]
    until_answered(server, "other")
    until_answered(server, "tiny-dense")


def test_between_requests_and_once_more(server: Server) -> None:
    until_answered(server, "tiny-dense")
    [first] = workers(server)
    first.kill()
    another_worker(server, first).kill()
    until_answered(server, "tiny-dense")
    until_answered(server, "other")
    assert len(workers(server)) == 1
    assert request(server, "GET", "/health")[0] == 200


def test_a_model_that_died_is_wanted_again_before_it_would_be_started(
    cpu_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another model was in memory meanwhile."""
    monkeypatch.setattr(supervisor, "_RESTART_PAUSE", 600.0)

    async def answer(engine: Engine) -> str:
        answer = await engine.submit(Request("The", max_tokens=2))
        return "".join([piece.text async for piece in answer])

    async def try_it() -> None:
        one, other = (Engine(ModelSettings(cpu_artifact, name=name)) for name in ("one", "other"))
        models = Models([one, other])
        running = asyncio.create_task(models.supervise())
        try:
            assert await asyncio.wait_for(answer(one), PATIENCE)
            process = one._model._process
            assert process is not None
            os.kill(process._process.pid or 0, signal.SIGKILL)
            while one.alive:
                await asyncio.sleep(0.01)
            for engine in (other, one):
                assert await asyncio.wait_for(answer(engine), PATIENCE)
            assert one._model._process is not process
        finally:
            running.cancel()
            models.close()

    asyncio.run(try_it())


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell")
@pytest.mark.parametrize("goes_on", [True, False])
def test_a_process_that_is_stopped(
    goes_on: bool, cpu_artifact: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, seconds in {"_LOOK": 0.2, "_TOLD": 2.0, "_LONGEST_SILENCE": 600.0 if goes_on else 4.0}.items():
        monkeypatch.setattr(supervisor, name, seconds)
    bias = {int(token): value for token, value in endless(cpu_artifact).items()}

    async def try_it() -> None:
        engine = Engine(ModelSettings(cpu_artifact))
        models = Models([engine])
        running = asyncio.create_task(models.supervise())
        try:
            request = Request("The", max_tokens=300 if goes_on else 8000, sampling=Sampling(logit_bias=bias))
            answer = await asyncio.wait_for(engine.submit(request), PATIENCE)
            process = engine._model._process
            assert process is not None
            os.kill(process.pid, signal.SIGSTOP)
            async with asyncio.timeout(PATIENCE):
                while not engine.frozen:
                    await asyncio.sleep(0.01)
            assert "has not run for 2 seconds" in caplog.text
            if goes_on:
                os.kill(process.pid, signal.SIGCONT)
                assert [piece async for piece in answer]
                async with asyncio.timeout(PATIENCE):
                    while engine.frozen:
                        await asyncio.sleep(0.01)
            else:
                with pytest.raises(ApiError, match="the model's process ended: try again"):
                    async with asyncio.timeout(PATIENCE):
                        async for _ in answer:
                            pass
                async with asyncio.timeout(PATIENCE):
                    while not engine.alive:
                        await asyncio.sleep(0.01)
            assert not engine.frozen and (engine._model._process is process) == goes_on
            answer = await asyncio.wait_for(engine.submit(Request("The", max_tokens=2)), PATIENCE)
            assert [piece async for piece in answer]
        finally:
            running.cancel()
            models.close()

    asyncio.run(try_it())


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell")
def test_health_tells_of_a_process_that_is_stopped(server: Server) -> None:
    until_answered(server, "tiny-dense")
    [worker] = workers(server)
    worker.suspend()
    found = until(lambda: (found := request(server, "GET", "/health"))[0] != 200 and found)
    assert found and found[0] == 503 and b'"frozen"' in found[2]
    worker.resume()
    until_answered(server, "tiny-dense")
    assert workers(server) == [worker]


def test_who_leaves_while_another_model_is_ended(cpu_artifact: Path) -> None:
    """What it began is done to its end: there is never more than one in memory."""

    async def try_it() -> None:
        one, other = (Engine(ModelSettings(cpu_artifact, name=name)) for name in ("one", "other"))
        models = Models([one, other])
        running = asyncio.create_task(models.supervise())
        try:
            for _ in range(3):
                for engine in (one, other):
                    leaving = asyncio.create_task(engine.submit(Request("The", max_tokens=2)))
                    await asyncio.sleep(0.02)
                    leaving.cancel()
                    answer = await asyncio.wait_for(engine.submit(Request("The", max_tokens=2)), PATIENCE)
                    assert [piece async for piece in answer]
                    assert one.alive != other.alive
            assert models.metrics.restarts._value.get() == 0
        finally:
            running.cancel()
            models.close()

    asyncio.run(try_it())
