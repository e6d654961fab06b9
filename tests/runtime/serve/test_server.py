"""A server's beginning and end."""

from __future__ import annotations

import signal
import socket
import subprocess
from pathlib import Path

from qwen_runtime import Model

from tests.support.servers import RUN, health, request, serving

QUESTION = [{"role": "user", "content": "What is assert?"}]


def test_sigterm_lets_answers_finish(cpu_artifact: Path, model: Model) -> None:
    with serving(cpu_artifact) as server:
        stream = server.client().chat.completions.create(
            model=model.info.name, messages=QUESTION, max_tokens=300, stream=True, temperature=1, seed=3
        )
        chunks = [next(iter(stream))]
        server.process.send_signal(signal.SIGTERM)
        chunks += list(stream)
        assert chunks[-1].choices[0].finish_reason
        assert server.process.wait(timeout=20) == 0


def test_ctrl_c_ends_it(cpu_artifact: Path) -> None:
    with serving(cpu_artifact) as server:
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(timeout=20) == 130


def test_ipv6(cpu_artifact: Path) -> None:
    with serving(cpu_artifact, "--host", "::1") as server:
        assert health(server)["status"] == "ok"
        assert request(server, "GET", "/health", Host="evil.example")[0] == 400


def test_port_that_is_taken(cpu_artifact: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        refused = subprocess.run(
            [*RUN, "serve", str(cpu_artifact), "--port", port], capture_output=True, text=True
        )
    assert refused.returncode == 2 and "choose another with --port" in refused.stderr
