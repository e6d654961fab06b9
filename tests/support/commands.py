"""`qwen-run` as a child process, for tests."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

from tests.support.waiting import PATIENCE, until

RUN = [sys.executable, "-c", "from qwen_runtime.cli import main; main()"]


def run(*arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*RUN, *arguments], input=stdin, capture_output=True, text=True)


def heed_interrupts() -> None:
    """A background job's children ignore Ctrl-C unless told otherwise; the tests may run in one."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminal:
    """A program on a pseudo-terminal of its own."""

    def __init__(self, arguments: list[str]) -> None:
        self.pid, self._file = pty.fork()
        if self.pid == 0:
            heed_interrupts()
            os.environ["TERM"] = "dumb"
            os.execv(arguments[0], arguments)
        self._seen = ""  # since the last match

    def type(self, text: str) -> None:
        os.write(self._file, text.encode())

    def wait_for(self, pattern: str, every_second: str = "") -> None:
        """Wait until `pattern` shows, typing `every_second` meanwhile."""
        seconds = 0
        while not (match := re.search(pattern, self._seen)):
            if select.select([self._file], [], [], 1)[0]:
                self._seen += os.read(self._file, 4096).decode(errors="replace")
            else:
                seconds += 1
                assert seconds < PATIENCE, f"no {pattern!r} in {self._seen!r}"
                self.type(every_second)
        self._seen = self._seen[match.end() :]

    def leave(self) -> int:
        """End the input until the program is gone; returns its exit code.

        More than once, because an end that is typed between two lines is a character like others.
        """

        def gone() -> tuple[int, int] | None:
            self.type("\x04")
            time.sleep(0.2)
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            return (pid, status) if pid else None

        return os.waitstatus_to_exitcode(until(gone)[1])
