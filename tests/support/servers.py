"""`qwen-run serve` as a child process, for tests."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import psutil

from tests.support.commands import RUN, heed_interrupts

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
        process.wait(timeout=60)
        if process.stdout is not None:
            process.stdout.close()


def request(
    server: Server, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """A request that no well-behaved client would make."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=30)
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


def wait_until_idle(server: Server) -> None:
    deadline = time.monotonic() + 20
    while (found := health(server))["running"] or found["waiting"]:
        assert time.monotonic() < deadline, found
        time.sleep(0.05)


def endless(artifact: Path) -> dict[str, int]:
    """`logit_bias` that rules out the tokens that end an answer: it goes on to `max_tokens`."""
    config = json.loads((artifact / "genai_config.json").read_text())
    return {str(token): -100 for token in config["model"]["eos_token_id"]}
