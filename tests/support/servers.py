"""`qwen-run serve` as a child process, for tests."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import psutil

from tests.support.commands import RUN, heed_interrupts
from tests.support.waiting import PATIENCE, until

if TYPE_CHECKING:
    from openai import OpenAI


class Server:
    """A running server; `url` has no slash at its end."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process = process
        self.url = url

    def client(self, api_key: str = "unused", **options: object) -> OpenAI:
        from openai import OpenAI

        return OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, **options)  # type: ignore[arg-type]


@contextmanager
def serving(artifact: Path, *options: str) -> Iterator[Server]:
    """A server for `artifact` on a free port, ended by SIGTERM."""
    process = subprocess.Popen(
        [*RUN, "serve", str(artifact), "--port", "0", *options],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.match(r"listening on (http://\S+)", line):
                break
        else:
            raise AssertionError(f"the server did not start: exit code {process.wait()}")
        yield Server(process, found[1].replace("0.0.0.0", "127.0.0.1"))
    finally:
        process.terminate()
        process.wait(timeout=PATIENCE)
        if process.stdout is not None:
            process.stdout.close()


def request(
    server: Server, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """A request that no well-behaved client would make."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=PATIENCE)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json", **headers})
        response = connection.getresponse()
        return (
            response.status,
            {name.lower(): value for name, value in response.getheaders()},
            response.read(),
        )
    finally:
        connection.close()


def health(server: Server) -> dict[str, Any]:
    return json.loads(request(server, "GET", "/health")[2])


def workers(server: Server) -> list[psutil.Process]:
    """The models' processes."""
    found = []
    for child in psutil.Process(server.process.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if "spawn_main" in " ".join(child.cmdline()):
                found.append(child)
    return found


def restarts(server: Server) -> int:
    """How often a model's process was started again."""
    text = request(server, "GET", "/metrics")[2].decode()
    found = re.search(r"^qwen_edge_model_restarts_total (\S+)$", text, re.MULTILINE)
    assert found
    return int(float(found[1]))


def processor_seconds(server: Server) -> float:
    """Taken by the server and its models' processes so far: other programs' work is not in it."""
    times = [process.cpu_times() for process in (psutil.Process(server.process.pid), *workers(server))]
    return sum(time.user + time.system for time in times)


@contextmanager
def held(server: Server) -> Iterator[None]:
    """The models' processes stand still: what they are at does not end, however long a test looks."""
    stopped = workers(server)
    for worker in stopped:
        worker.suspend()
    try:
        yield
    finally:
        for worker in stopped:
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.resume()


def wait_until_idle(server: Server) -> None:
    def idle() -> bool:
        found = health(server)
        return not found["running"] and not found["waiting"]

    until(idle)


def endless(artifact: Path) -> dict[str, int]:
    """`logit_bias` that rules out the tokens that end an answer: it goes on to `max_tokens`."""
    config = json.loads((artifact / "genai_config.json").read_text())
    return {str(token): -100 for token in config["model"]["eos_token_id"]}
