"""Keep the installed version answering: start the server, watch it, and start it again, otherwise if need be.

What is tried, in order, when a server keeps failing: the same again, the CPU instead of the device's own
provider, and the last good version.
"""

from __future__ import annotations

import http.client
import logging
import logging.handlers
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from qwen_common.errors import UserError
from qwen_common.providers import CPU

from qwen_runtime.kiosk.install import Installation, Release

_log = logging.getLogger("qwen_edge.kiosk")
_LOG_BYTES, _LOG_FILES = 1_000_000, 5


@dataclass(frozen=True)
class Patience:
    """When the watchdog acts; seconds but for the counts.

    Attributes:
        loading: a server may take this long to answer at all.
        interval: between two looks at it.
        answer: a look may take this long.
        missed: looks without an answer after which it is started again.
        failures: starts that ended within `short` after which something else is tried.
        short: a server that ran longer is a good one.
        pause: before it is started again.
    """

    loading: float = 600.0
    interval: float = 5.0
    answer: float = 10.0
    missed: int = 6
    failures: int = 3
    short: float = 120.0
    pause: float = 2.0


def supervise(
    target: Path, host: str, port: int, serve_options: Sequence[str], patience: Patience | None = None
) -> None:
    """Check the release in use and serve it until SIGTERM or Ctrl-C.

    Raises:
        UserError: nothing is installed, or neither version can be trusted.
    """
    installation = Installation(target)
    _log_to(target / "logs")
    stopping = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        stopping.set()

    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, stop)
    _Supervisor(installation, host, port, serve_options, patience or Patience(), stopping).run()


class _Supervisor:
    def __init__(
        self,
        installation: Installation,
        host: str,
        port: int,
        serve_options: Sequence[str],
        patience: Patience,
        stopping: threading.Event,
    ) -> None:
        self._installation = installation
        self._address = host, port
        self._options = serve_options
        self._patience = patience
        self._stopping = stopping

    def run(self) -> None:
        ways: list[tuple[str, Callable[[], Release], str]] = [
            ("its own provider", self._trusted, "auto"),
            ("the CPU", self._trusted, CPU.key),
            ("the last good version", self._last_good, "auto"),
        ]
        while not self._stopping.is_set():
            for name, release, provider in ways:
                try:
                    found = release()
                except UserError as error:
                    _log.error("%s", error)
                    continue
                _log.info("serving %s with %s", found.root.name, name)
                self._serve_while_good(found, provider)
                if self._stopping.is_set():
                    return
            self._stopping.wait(self._patience.pause)

    def _trusted(self) -> Release:
        """The release in use, or the one before it where that one's files changed."""
        current = self._installation.current
        if current is None:
            raise UserError(
                f"nothing is installed in {self._installation.target}: run the bundle's install script"
            )
        try:
            current.check(self._installation.key, full=False)
        except UserError as error:
            _log.error("%s", error)
            return self._installation.roll_back()
        return current

    def _last_good(self) -> Release:
        """Only for now: what made the newer one fail may pass, and the next start tries it again."""
        previous = self._installation.previous
        if previous is None:
            raise UserError("there is no earlier version to try")
        previous.check(self._installation.key, full=False)
        return previous

    def _serve_while_good(self, release: Release, provider: str) -> None:
        failures = 0
        while failures < self._patience.failures and not self._stopping.is_set():
            started = time.monotonic()
            self._serve_once(release, provider)
            failures = failures + 1 if time.monotonic() - started < self._patience.short else 0
            if not self._stopping.is_set():
                _log.warning("the server ended: starting it again")
                self._stopping.wait(self._patience.pause)

    def _serve_once(self, release: Release, provider: str) -> None:
        """Until the server ends, or does not answer, or we are told to stop."""
        host, port = self._address
        command = [str(release.command), "serve", str(release.artifact), "--provider", provider]
        command += ["--host", host, "--port", str(port), *self._options]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        reader = threading.Thread(target=_copy_lines, args=(process,), daemon=True)
        reader.start()
        try:
            self._watch(process)
        finally:
            process.terminate()
            try:
                process.wait(timeout=35)  # `serve` lets answers finish for 30 seconds
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            reader.join(timeout=5)

    def _watch(self, process: subprocess.Popen[str]) -> None:
        ready_by = time.monotonic() + self._patience.loading
        answered, missed = False, 0
        while process.poll() is None and not self._stopping.wait(self._patience.interval):
            if self._answers():
                answered, missed = True, 0
                continue
            missed += answered
            if missed >= self._patience.missed or (not answered and time.monotonic() > ready_by):
                _log.error("the server does not answer")
                return

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection(*self._address, timeout=self._patience.answer)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == http.HTTPStatus.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


def _copy_lines(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        _log.info("%s", line.rstrip())


def _log_to(folder: Path) -> None:
    """At most 5 MB of files; on a disk that is full or read-only, standard error alone."""
    logging.raiseExceptions = False  # a kiosk goes on without its log
    _log.setLevel(logging.INFO)
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    try:
        folder.mkdir(exist_ok=True)
        handlers.append(
            logging.handlers.RotatingFileHandler(
                folder / "kiosk.log", maxBytes=_LOG_BYTES, backupCount=_LOG_FILES - 1, encoding="utf-8"
            )
        )
    except OSError as error:
        print(f"no log in {folder}: {error.strerror}", file=sys.stderr)
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        _log.addHandler(handler)
