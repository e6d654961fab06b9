"""Several models in one server, one in memory at a time, and memory that is freed when nobody asks."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import openai
import pytest
from qwen_common.errors import UserError
from qwen_profiles.schema import load_profile
from qwen_runtime import Model
from qwen_runtime.request import Request
from qwen_runtime.serve.engine import Engine
from qwen_runtime.serve.errors import ApiError
from qwen_runtime.serve.models import Models
from qwen_runtime.serve.worker import ModelSettings

from benchmarks.support.checkpoints import TINY_MOE
from tests.support.commands import run
from tests.support.exported import Exported
from tests.support.servers import endless, health, held, serving, wait_until_idle, workers
from tests.support.waiting import PATIENCE, until

QUESTION = [{"role": "user", "content": "What is assert?"}]
GREEDY: dict[str, Any] = {"messages": QUESTION, "temperature": 0, "max_tokens": 8}


@pytest.fixture(scope="module")
def moe_artifact(exported: Exported) -> Path:
    return exported(TINY_MOE, load_profile("cpu"))


def test_a_model_is_in_memory_when_it_is_asked(cpu_artifact: Path, moe_artifact: Path, model: Model) -> None:
    with serving(cpu_artifact, "--model", f"experts={moe_artifact}") as server:
        client = server.client()
        assert [served.id for served in client.models.list()] == ["tiny-dense", "experts"]
        answers = {}
        for name in ("tiny-dense", "experts", "tiny-dense"):
            found = client.chat.completions.create(model=name, **GREEDY)
            assert found.model == name == health(server)["model"]
            assert len(workers(server)) == 1
            content = found.choices[0].message.content
            assert answers.setdefault(name, content) == content
        assert answers["tiny-dense"] != answers["experts"]
        other = client.chat.completions.create(model="gpt-4o", **GREEDY)  # whichever is in memory
        assert other.choices[0].message.content == answers["tiny-dense"]
        assert client.models.retrieve("experts").id == "experts"
        with pytest.raises(openai.NotFoundError, match="this server has 'tiny-dense', 'experts'"):
            client.models.retrieve("gpt-4o")


def test_an_answer_ends_before_another_model_comes(cpu_artifact: Path, moe_artifact: Path) -> None:
    with serving(cpu_artifact, "--model", f"experts={moe_artifact}") as server:
        client = server.client()
        endlessly: dict[str, Any] = {"max_tokens": 8000, "logit_bias": endless(cpu_artifact)}
        long = client.chat.completions.create(model="tiny-dense", messages=QUESTION, **endlessly, stream=True)
        pieces = iter(long)
        next(pieces)
        found: list[str] = []

        def ask(name: str) -> None:
            found.append(client.chat.completions.create(model=name, **GREEDY).model)

        threads = []
        with held(server):
            for number, name in enumerate(("experts", "tiny-dense")):  # the second waits behind the first
                threads.append(threading.Thread(target=ask, args=(name,)))
                threads[-1].start()
                until(lambda number=number: health(server)["waiting"] > number)
        for _ in range(20):
            next(pieces)
        assert not found and len(workers(server)) == 1
        long.close()
        for thread in threads:
            thread.join()
        assert found == ["experts", "tiny-dense"]


def test_a_model_that_nobody_asks_leaves_memory(cpu_artifact: Path, tmp_path: Path) -> None:
    with serving(cpu_artifact, "--unload-after", "1", "--state-dir", str(tmp_path)) as server:
        client = server.client()
        messages = [{"role": "system", "content": "The statement is a word. " * 40}, *QUESTION]
        first = client.chat.completions.create(model="any", **{**GREEDY, "messages": messages})
        until(lambda: health(server)["status"] == "asleep" and not workers(server))
        again = client.chat.completions.create(model="any", **{**GREEDY, "messages": messages})
        assert again.choices[0].message == first.choices[0].message
        assert again.usage and again.usage.prompt_tokens_details
        assert (again.usage.prompt_tokens_details.cached_tokens or 0) > 200


def test_a_model_that_cannot_be_loaded_again(cpu_artifact: Path, copied: Path) -> None:
    with serving(cpu_artifact, "--model", f"broken={copied}") as server:
        client = server.client()
        for path in copied.iterdir():
            path.unlink()
        for _ in range(2):
            with pytest.raises(openai.InternalServerError, match="broken cannot be loaded"):
                client.chat.completions.create(model="broken", **GREEDY)
        assert client.chat.completions.create(model="tiny-dense", **GREEDY).model == "tiny-dense"
        wait_until_idle(server)


def test_who_leaves_while_the_model_is_loaded(cpu_artifact: Path) -> None:
    async def ask() -> None:
        engine = Engine(ModelSettings(cpu_artifact))
        models = Models([engine])
        running = asyncio.create_task(models.supervise())
        try:
            impatient = asyncio.create_task(engine.submit(Request("The", max_tokens=2)))
            await asyncio.sleep(0.2)
            impatient.cancel()
            answer = await asyncio.wait_for(engine.submit(Request("The", max_tokens=2)), PATIENCE)
            assert "".join([piece.text async for piece in answer])
            await asyncio.wait_for(engine.sleep(), PATIENCE)
            assert engine.asleep and not engine.alive and not engine.idle_for < 0
            with pytest.raises(ApiError, match="not fit the context"):
                await engine.submit(Request([{"role": "user", "content": ""}] * 10_000))
        finally:
            running.cancel()
            models.close()

    asyncio.run(ask())


def test_names(cpu_artifact: Path) -> None:
    with pytest.raises(UserError, match="two artifacts are named tiny-dense: name one with --model"):
        Models([Engine(ModelSettings(cpu_artifact)) for _ in range(2)])
    for arguments, said in ((("--model", "name"), "give NAME=FOLDER"), ((), "no artifact")):
        refused = run("serve", *arguments)
        assert refused.returncode == 2 and said in refused.stderr
