"""Keep a kiosk answering: check a version, start its server, watch it, and start it again.

What is tried, in order, when a server keeps failing: the same again, the CPU instead of the device's own
provider, and the last good version. Every start is checked, and a version whose files changed is not started.
"""

from __future__ import annotations

import errno
import http.client
import logging
import logging.handlers
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import FrameType

from qwen_common.errors import USER_ERROR, UserError
from qwen_common.providers import CPU

from qwen_launcher import orphan
from qwen_launcher.account import become_owner
from qwen_launcher.installed import Installed, Release
from qwen_launcher.program import command, environment

_log = logging.getLogger("qwen_edge.kiosk")
_LOG_BYTES, _LOG_FILES = 1_000_000, 5
_STEP = 0.1  # seconds
_ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # addresses to listen on that are none to ask


@dataclass(frozen=True)
class Patience:
    """When the watchdog acts; seconds but for the counts.

    Attributes:
        loading: a server may take this long to be ready, at its start and where it loads its model again.
        interval: between two looks at it.
        answer: a look may take this long.
        missed: looks without any answer after which a server that was ready is started again.
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


class _Ended(Enum):
    """How it went with one version and provider."""

    FAILED = "it kept failing"
    REFUSED = "it refused its options"
    DAMAGED = "its files changed"
    REPLACED = "another version is to be used"
    STOPPED = "we were told to stop"


def supervise(
    target: Path, host: str, port: int, serve_options: Sequence[str], patience: Patience | None = None
) -> None:
    """Check the release in use and serve it until SIGTERM or Ctrl-C.

    Raises:
        UserError: no version can be trusted, each of them refuses the options, or the kiosk runs already.
    """
    installed = Installed(target)
    if not installed.target.is_dir():
        raise UserError(f"no folder {target}: run the bundle's install script")
    logs = installed.target / "logs"
    user = become_owner([installed.state, logs])
    installed.keys()
    _log_to(logs)
    if user is not None:
        _log.info("started by root, runs as user %d, to whom %s belongs", user, installed.state)
    stopping = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        stopping.set()

    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, stop)
    if orphan.end_orphan(installed):
        _log.warning("ended the server that a killed supervisor left behind")
    _Supervisor(installed, host, port, serve_options, patience or Patience(), stopping).run()


class _Supervisor:
    def __init__(
        self,
        installed: Installed,
        host: str,
        port: int,
        serve_options: Sequence[str],
        patience: Patience,
        stopping: threading.Event,
    ) -> None:
        self._installed = installed
        self._host, self._port = host, port
        self._options = serve_options
        self._patience = patience
        self._stopping = stopping
        self._said = ""  # the last line of a server

    def run(self) -> None:
        while (ended := self._round()) is not _Ended.STOPPED:
            if ended is _Ended.FAILED:
                self._stopping.wait(self._patience.pause)

    def _round(self) -> _Ended:
        """Try every version, the one in use first."""
        chosen = self._installed.current
        outcomes: list[_Ended] = []
        for release in self._installed.candidates():
            if outcomes:
                _log.warning("trying version %s instead", release.name)
            for provider in ("auto", CPU.key):
                ended = self._serve_while_good(release, provider, chosen)
                if ended in (_Ended.STOPPED, _Ended.REPLACED):
                    return ended
                outcomes.append(ended)
                if ended is not _Ended.FAILED:
                    break
        if not outcomes:
            raise UserError(
                f"nothing is installed in {self._installed.target}: run the bundle's install script"
            )
        if all(ended is _Ended.DAMAGED for ended in outcomes):
            raise UserError(f"every version in {self._installed.target} is damaged: install a bundle again")
        if _Ended.FAILED not in outcomes:
            raise UserError(f"the server does not start: {self._said}")
        return _Ended.FAILED

    def _serve_while_good(self, release: Release, provider: str, chosen: Release | None) -> _Ended:
        failures = 0
        while failures < self._patience.failures:
            if (ended := self._wait_for_port(chosen)) is not None:
                return ended
            try:
                self._installed.check(release)
            except UserError as error:
                _log.error("version %s is not started: %s", release.name, error)
                return _Ended.DAMAGED
            started = time.monotonic()
            _log.info("starting version %s, provider %s", release.name, provider)
            refused = self._serve_once(release, provider, chosen)
            if self._stopping.is_set():
                return _Ended.STOPPED
            if self._installed.current != chosen:
                _log.info("another version is to be used")
                return _Ended.REPLACED
            if refused and self._port_is_free():
                _log.error("the server refused to start: %s", self._said)
                return _Ended.REFUSED
            failures = failures + 1 if time.monotonic() - started < self._patience.short else 0
            _log.warning("the server ended: starting it again")
            if self._stopping.wait(self._patience.pause):
                return _Ended.STOPPED
        return _Ended.FAILED

    def _serve_once(self, release: Release, provider: str, chosen: Release | None) -> bool:
        """Until the server ends, does not answer, is replaced, or we are told to stop.

        Returns:
            Whether it ended before it was ever ready, with the exit code of a mistake that the user can mend.
        """
        options = ["--provider", provider, "--host", self._host, "--port", str(self._port), *self._options]
        arguments = ["--while-stdin-is-open", "serve", str(release.artifact), *options]
        try:
            process = subprocess.Popen(
                command(release, *arguments),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=environment(_empty_folder(self._installed.state / "compiled")),
                cwd=self._installed.target,
                start_new_session=True,
            )
        except OSError as error:  # no memory or process to be had, or a Python that is being replaced
            _log.error("cannot start it: %s", error)
            return False
        orphan.note(self._installed, process.pid, release.name)
        reader = threading.Thread(target=self._copy_lines, args=(process,), daemon=True)
        reader.start()
        answered = False
        try:
            answered = self._watch(process, release, chosen)
        finally:
            process.terminate()
            try:
                process.wait(timeout=35)  # `serve` lets answers finish for 30 seconds
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            reader.join(timeout=5)
            if process.stdin is not None:
                process.stdin.close()
        return not answered and process.returncode == USER_ERROR

    def _watch(self, process: subprocess.Popen[bytes], release: Release, chosen: Release | None) -> bool:
        """Whether it was ever ready."""
        started = ready = time.monotonic()
        answered, missed, good = False, 0, False
        while self._still_running(process):
            if self._installed.current != chosen:
                return answered
            now = time.monotonic()
            status = self._health()
            if status == http.HTTPStatus.OK:
                answered, missed, ready = True, 0, now
                if not good and now - started > self._patience.short:
                    good = True
                    self._installed.remember(self._installed.state / "good", release.name)
                continue
            missed = missed + answered if status is None else 0
            if missed >= self._patience.missed or now - ready > self._patience.loading:
                _log.error("the server %s", "does not answer" if status is None else "does not get ready")
                break
        return answered

    def _still_running(self, process: subprocess.Popen[bytes]) -> bool:
        """After the time between two looks; at once where it ended or we are told to stop."""
        end = time.monotonic() + self._patience.interval
        while process.poll() is None and time.monotonic() < end:
            if self._stopping.wait(_STEP):
                return False
        return process.poll() is None

    def _health(self) -> int | None:
        """The status that the server answers a look with, if it does."""
        address = _ANY.get(self._host, self._host)
        connection = http.client.HTTPConnection(address, self._port, timeout=self._patience.answer)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()

    def _wait_for_port(self, chosen: Release | None) -> _Ended | None:
        """Until whoever has the port leaves it: a server that cannot listen says nothing of its version."""
        if not self._port_is_free():
            _log.warning("port %d is taken: waiting", self._port)
        while not self._port_is_free():
            if self._stopping.wait(self._patience.pause):
                return _Ended.STOPPED
            if self._installed.current != chosen:
                return _Ended.REPLACED
        return None

    def _port_is_free(self) -> bool:
        try:
            family = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)[0][0]
            socket.create_server((self._host, self._port), family=family).close()
        except OSError as error:
            return error.errno != errno.EADDRINUSE
        return True

    def _copy_lines(self, process: subprocess.Popen[bytes]) -> None:
        if process.stdout is None:
            return
        for line in process.stdout:
            text = line.decode("utf-8", "replace").rstrip()
            self._said = text or self._said
            _log.info("%s", text)


def _empty_folder(folder: Path) -> Path | None:
    """For what this run compiles; nothing that an earlier one or another program left is used."""
    with suppress(OSError):
        shutil.rmtree(folder)
    with suppress(OSError):
        folder.parent.mkdir(exist_ok=True)
        folder.mkdir(mode=0o700)  # fails where something was left
        return folder
    return None


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
