"""The queue, and a model's process that dies."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from qwen_runtime import Model
from qwen_runtime.load_options import LoadOptions
from qwen_runtime.request import Request
from qwen_runtime.serve import queries
from qwen_runtime.serve.engine import Engine
from qwen_runtime.serve.process import ModelProcess
from qwen_runtime.serve.worker import Job, ModelSettings, Piece
from qwen_runtime.states import StateSettings

from tests.support.servers import Server, endless, health, held, restarts, serving, wait_until_idle
from tests.support.waiting import PATIENCE, until

QUESTION = [{"role": "user", "content": "What is assert?"}]


def test_busy_server_says_when_to_come_back(cpu_artifact: Path, model: Model) -> None:
    with serving(cpu_artifact, "--queue", "1") as server:
        client = server.client()
        options: dict[str, Any] = {"model": model.info.name, "messages": QUESTION, "max_tokens": 8000}
        options["logit_bias"] = endless(cpu_artifact)
        first = client.chat.completions.create(**options, stream=True)
        next(iter(first))
        second = threading.Thread(
            target=lambda: client.chat.completions.create(**{**options, "max_tokens": 1})
        )
        with held(server):
            second.start()
            until(lambda: health(server)["waiting"])
            with pytest.raises(openai.RateLimitError) as caught:
                client.chat.completions.create(**options)
        assert int(caught.value.response.headers["Retry-After"]) >= 1
        first.close()
        second.join()
        wait_until_idle(server)


def test_model_process_that_dies_is_started_again(cpu_artifact: Path, model: Model) -> None:
    with serving(cpu_artifact) as server:
        client = server.client()
        options: dict[str, Any] = {"model": model.info.name, "messages": QUESTION, "max_tokens": 8000}
        options["logit_bias"] = endless(cpu_artifact)
        stream = client.chat.completions.create(**options, stream=True)
        next(iter(stream))
        children = psutil.Process(server.process.pid).children()
        [worker] = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(openai.APIError, match="the model's process ended"):
            list(stream)
        until_started_again(server, 1)
        assert client.chat.completions.create(**{**options, "max_tokens": 2}).choices


REMOVED_DEVICE = """
# Stands for a CUDA device that is removed while it works: this install's CPU, claimed to be CUDA.
# The token that loading tries is the last one that it makes.
import onnxruntime_genai as og

cuda, made = [], []
og.is_cuda_available = lambda: True
og.Config.append_provider = lambda self, name: cuda.append(name)
og.Config.set_provider_option = lambda self, *option: None
generate_next_token = og.Generator.generate_next_token


def removed(self):
    if cuda and made:
        raise RuntimeError("CUDA failure 46: device is not available")
    made.append(True)
    generate_next_token(self)


og.Generator.generate_next_token = removed
"""


def test_removed_device_is_left_for_the_cpu(
    cpu_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(REMOVED_DEVICE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with serving(cpu_artifact, "--provider", "cuda") as server:
        client = server.client()
        assert health(server)["provider"] == "cuda"
        options: dict[str, Any] = {"model": "tiny-dense", "messages": QUESTION, "max_tokens": 8}
        for times in (1, 2):
            with pytest.raises(openai.APIError):
                client.chat.completions.create(**options)
            until_started_again(server, times)
        assert health(server)["provider"] == "cpu"
        assert client.chat.completions.create(**options).choices[0].message.content


def until_started_again(server: Server, times: int) -> None:
    """Wait until the model's process has died so many times, and is there again."""
    until(lambda: restarts(server) == times and health(server)["status"] == "ok")


def test_server_that_dies_takes_the_model_along(cpu_artifact: Path) -> None:
    with serving(cpu_artifact) as server:
        children = psutil.Process(server.process.pid).children()
        server.process.kill()
        _, alive = psutil.wait_procs(children, timeout=PATIENCE)
        assert not alive


def test_job_before_the_engine_attends(cpu_artifact: Path) -> None:
    """A request may see that the model is there again before the loop takes up its events."""

    async def ask() -> str:
        engine = Engine(ModelSettings(cpu_artifact))
        engine.load()
        asking = asyncio.create_task(engine.submit(Request("The", max_tokens=2)))
        await asyncio.sleep(0)
        running = asyncio.create_task(engine.supervise())
        try:
            answer = await asyncio.wait_for(asking, PATIENCE)
            return "".join([piece.text async for piece in answer])
        finally:
            running.cancel()
            engine.close()

    assert asyncio.run(ask())


def test_model_process_ends_in_the_middle_of_an_answer(cpu_artifact: Path) -> None:
    """By itself, and not by an abort that leaves a core dump."""
    process = ModelProcess(ModelSettings(cpu_artifact, options=LoadOptions(states=StateSettings())))
    process.start()
    process.wait()
    connection = process._connection
    question = [{"role": "user", "content": "What is assert?" * 60}]
    connection.send(Job(1, Request(question, max_tokens=600, ignore_eos=True)))
    while not isinstance(connection.recv(), Piece):
        pass
    time.sleep(0.05)
    connection.send(None)
    process._process.join(PATIENCE)
    assert process._process.exitcode == 0


def test_client_that_leaves_a_query_that_fails(cpu_artifact: Path, caplog: pytest.LogCaptureFixture) -> None:
    """asyncio reports no exception that nobody took."""

    async def ask() -> None:
        engine = Engine(ModelSettings(cpu_artifact))
        engine.load()
        running = asyncio.create_task(engine.supervise())
        asking = asyncio.create_task(engine.ask_in_turn(queries.embed, [-1], "mean"))
        while not engine._queries:
            await asyncio.sleep(0)
        asking.cancel()
        while engine.idle_for == 0:
            await asyncio.sleep(0.05)
        gc.collect()
        await asyncio.sleep(0)
        running.cancel()
        engine.close()

    asyncio.run(ask())
    assert not [record for record in caplog.records if "never retrieved" in record.getMessage()]
