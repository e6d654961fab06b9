"""A server's beginning and end."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from qwen_runtime import Model

from tests.support.commands import heed_interrupts
from tests.support.servers import RUN, Server, health, request, serving, workers
from tests.support.waiting import PATIENCE, until

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
        assert server.process.wait(timeout=PATIENCE) == 0


def test_ctrl_c_ends_it(cpu_artifact: Path) -> None:
    with serving(cpu_artifact) as server:
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(timeout=PATIENCE) == 130


@pytest.mark.parametrize("grace", [0, 600])
def test_answers_that_are_cut_off_leave_no_traceback(
    cpu_artifact: Path, grace: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """When the grace is over, and at a second Ctrl-C. The answer has more tokens than its reader takes."""
    with serving(cpu_artifact, "--grace", str(grace)) as server, server.client() as client:
        stream = client.chat.completions.create(
            model="any", messages=QUESTION, max_tokens=8000, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        server.process.send_signal(signal.SIGINT)
        if grace:
            with pytest.raises(ConnectionRefusedError):  # it has heard the first
                while True:
                    socket.create_connection(("127.0.0.1", urlsplit(server.url).port or 0)).close()
                    time.sleep(0.01)
            server.process.send_signal(signal.SIGINT)
        assert server.process.wait(timeout=60) == 130
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_while_the_first_model_is_loaded(cpu_artifact: Path, asked: signal.Signals) -> None:
    """However long it takes: a process that is stopped takes for ever. The signal reaches both, as from
    a terminal, and the other one is at its imports."""
    process = subprocess.Popen(
        [*RUN, "serve", str(cpu_artifact), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed_interrupts,
    )
    server = Server(process, "")
    found = until(lambda: workers(server))
    if asked is signal.SIGTERM:
        found[0].suspend()
    os.killpg(process.pid, asked)
    said = process.communicate(timeout=PATIENCE)
    assert (process.returncode, "".join(said)) in ((0, ""), (130, "interrupted\n"))
    assert not found[0].is_running()


HELD = """
import os, signal, threading, time
from qwen_runtime.serve.process import signals_held

signal.signal(signal.SIGTERM, lambda *_: print("told", flush=True))
threading.Thread(target=time.sleep, args=(600,), daemon=True).start()  # one without the mask, which gets them
try:
    with signals_held():
        for number in signal.SIGTERM, signal.SIGINT:
            os.kill(os.getpid(), number)
        time.sleep(0.5)
        print("whole", flush=True)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def test_a_signal_does_not_cut_off_a_start() -> None:
    """Whichever thread of the process gets it."""
    done = subprocess.run(
        [sys.executable, "-c", HELD], capture_output=True, text=True, preexec_fn=heed_interrupts
    )
    whole, *after = done.stdout.split()
    assert whole == "whole" and sorted(after) == ["interrupted", "told"], done


def test_it_ends_while_another_model_is_loaded(cpu_artifact: Path) -> None:
    with serving(cpu_artifact, "--model", f"other={cpu_artifact}") as server:
        [first] = workers(server)
        asking = http.client.HTTPConnection(urlsplit(server.url).netloc)
        body = json.dumps({"model": "other", "messages": QUESTION, "max_tokens": 1})
        asking.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        found = until(lambda: [worker for worker in workers(server) if worker != first])
        found[0].suspend()
        asking.close()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=PATIENCE) == 0
        assert not found[0].is_running()


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
