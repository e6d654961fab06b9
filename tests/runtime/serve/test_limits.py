"""Small bodies that ask for much, long prompts that tell how far they are, and turns in their order."""

from __future__ import annotations

import asyncio
import io
import json
import threading
from base64 import b64encode
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image
from qwen_profiles.schema import load_profile
from qwen_runtime.serve import http

from benchmarks.support.checkpoints import TINY_VL
from tests.support.exported import Exported
from tests.support.servers import (
    Server,
    endless,
    health,
    held,
    processor_seconds,
    request,
    serving,
    wait_until_idle,
)
from tests.support.waiting import until

QUESTION = [{"role": "user", "content": "What is assert?"}]


def post(server: Server, **body: Any) -> tuple[int, dict[str, Any]]:
    status, _, answer = request(server, "POST", "/v1/chat/completions", json.dumps(body).encode())
    return status, json.loads(answer)


@pytest.mark.parametrize(
    ("messages", "status", "said"),
    [
        pytest.param(
            [{"role": "user", "content": ""}] * 850_000, 413, "more than 1000000 values", id="values"
        ),
        pytest.param([{"role": "user", "content": ""}] * 300_000, 400, "300000 messages", id="messages"),
        pytest.param(
            [{"role": "user", "content": [{"type": "text", "text": "word "}] * 200_000}],
            400,
            "1000",
            id="parts",
        ),
        pytest.param([{"role": "user", "content": "word " * 6_000_000}], 400, "characters", id="characters"),
    ],
)
def test_what_cannot_fit_is_refused_at_once(server: Server, messages: Any, status: int, said: str) -> None:
    before = processor_seconds(server)
    found, answer = post(server, messages=messages, max_tokens=1)
    assert found == status and said in answer["error"]["message"], answer
    assert status == 413 or "not fit the context" in answer["error"]["message"]
    assert processor_seconds(server) - before < 25  # it was minutes
    assert post(server, messages=QUESTION, max_tokens=1)[0] == 200


def png(width: int, height: int) -> dict[str, Any]:
    file = io.BytesIO()
    Image.new("1", (width, height)).save(file, "PNG", optimize=True)
    url = "data:image/png;base64," + b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def test_a_small_file_of_many_pixels(exported: Exported) -> None:
    def ask(server: Server, *images: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        return post(server, messages=[{"role": "user", "content": list(images)}], max_tokens=1)

    with serving(exported(TINY_VL, load_profile("cpu")), "--kiosk") as server:
        [worker] = [
            child
            for child in psutil.Process(server.process.pid).children()
            if "spawn_main" in " ".join(child.cmdline())
        ]
        assert ask(server, png(100, 100))[0] == 200
        before = worker.memory_info().rss
        for images, said in (
            ([png(10_000, 10_000)], "10000 x 10000 pixels, and the most is 16 million"),
            ([png(3000, 3000)] * 2, "18000000 pixels together, and the most is 16 million"),
        ):
            status, answer = ask(server, *images)
            assert status == 400 and said in answer["error"]["message"]
        assert worker.memory_info().rss < before + 20e6  # bytes: nothing was unpacked
        assert ask(server, png(4000, 4000))[0] == 200
        wait_until_idle(server)
        until(lambda: worker.memory_info().rss < before + 60e6)  # it took 100 MB, and gives them back


def test_a_long_prompt_tells_how_far_it_is(cpu_artifact: Path) -> None:
    with serving(cpu_artifact, "--keep", "0") as server:
        content = "The statement is a word. " * 900
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 2, "stream": True}
        slots: list[dict[str, Any]] = []
        answered = threading.Event()

        def watch() -> None:
            while not answered.is_set():
                slots.append(json.loads(request(server, "GET", "/slots")[2])[0])

        watcher = threading.Thread(target=watch)
        watcher.start()
        status, _, answer = request(server, "POST", "/v1/chat/completions", json.dumps(body).encode())
        answered.set()
        watcher.join()
        assert status == 200 and b"data: [DONE]" in answer
        [idle] = json.loads(request(server, "GET", "/slots")[2])
    slots = [slot for slot in slots if slot["is_processing"] and slot["n_prompt_tokens"]]
    read = [slot["n_prompt_tokens_processed"] for slot in slots]
    assert read == sorted(read) and len(set(read)) > 2
    assert {count % 512 for count in read if count < slots[0]["n_prompt_tokens"]} == {0}
    assert not idle["is_processing"] and idle["n_ctx"] == 8192


def test_turns_are_in_the_order_of_the_requests(cpu_artifact: Path) -> None:
    ended: list[int] = []

    def ask(server: Server, number: int) -> None:
        assert post(server, messages=QUESTION, max_tokens=2)[0] == 200
        ended.append(number)

    with serving(cpu_artifact) as server:
        client = server.client()
        first = client.chat.completions.create(
            model="any", messages=QUESTION, max_tokens=8000, logit_bias=endless(cpu_artifact), stream=True
        )
        next(iter(first))
        threads = []
        with held(server):
            for number in range(4):
                threads.append(threading.Thread(target=ask, args=(server, number)))
                threads[-1].start()
                until(lambda number=number: health(server)["waiting"] > number)
        first.close()
        for thread in threads:
            thread.join()
    assert ended == sorted(ended)


def test_silence_is_filled_with_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_SILENCE", 0.05)
    sent: list[bytes] = []

    async def receive() -> Any:
        await asyncio.sleep(60)

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))

    read = ["prompt: 0 of 9 tokens", "prompt: 8 of 9 tokens"]

    async def slow() -> AsyncIterator[dict[str, Any] | None]:
        yield {"first": 1}
        while read:
            await asyncio.sleep(0.01)
        yield None

    stream = http.EventStream(slow(), lambda: sent.append(b"closed"), lambda: read.pop(0) if read else None)
    asyncio.run(stream({"type": "http"}, receive, send))
    assert sent == [
        b"",
        b'data: {"first": 1}\n\n',
        b": prompt: 0 of 9 tokens\n\n",
        b": prompt: 8 of 9 tokens\n\n",
        b"data: [DONE]\n\n",
        b"",
        b"closed",
    ]
