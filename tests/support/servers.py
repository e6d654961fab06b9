"""`qwen-run serve` as a child process, for tests."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from openai import OpenAI

RUN = [sys.executable, "-c", "from qwen_runtime.cli import main; main()"]


class Server:
    """A running server; `url` has no slash at its end."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process = process
        self.url = url

    def client(self, api_key: str = "unused", **options: object) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, **options)  # type: ignore[arg-type]


@contextmanager
def serving(artifact: Path, *options: str) -> Iterator[Server]:
    """A server for `artifact` on a free port, ended by SIGTERM."""
    process = subprocess.Popen(
        [*RUN, "serve", str(artifact), "--port", "0", *options],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=_heed_interrupts,
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


def _heed_interrupts() -> None:
    """A background job's children ignore Ctrl-C unless told otherwise; the tests may run in one."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
