"""The worker process, seen from the server, and the pipe to it."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import pickle
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from types import FrameType

from qwen_common.errors import UserError

from qwen_runtime.info import ModelInfo
from qwen_runtime.serve import worker
from qwen_runtime.serve.worker import Failed, ModelSettings, Ready, Reply

_CLOSE = b""
_ENDING = (signal.SIGINT, signal.SIGTERM)


class ModelProcess:
    """`start` it, and `wait` until it has the model."""

    def __init__(self, settings: ModelSettings) -> None:
        context = multiprocessing.get_context("spawn")  # a fork of a process with threads is not safe
        self._connection, self._theirs = context.Pipe()
        self._outbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._has_model = False
        self._process = context.Process(
            target=worker.main, args=(settings, self._theirs), name="qwen-run model", daemon=True
        )

    def start(self) -> None:
        """Not while it is made, for a signal that comes meanwhile would leave a process that nobody knows.

        Raises:
            RuntimeError: the system has none.
        """
        try:
            with signals_held():
                self._process.start()
        except OSError as error:
            raise RuntimeError(f"the model's process cannot be started: {error.strerror}") from error
        self._theirs.close()

    def wait(self) -> ModelInfo:
        """Until the process has the model; what was loaded.

        Raises:
            UserError: the artifact cannot be loaded.
            RuntimeError: the process has ended.
        """
        try:
            message = self._connection.recv()
        except (EOFError, OSError):
            raise RuntimeError(f"the model's process ended with {self.exit_code()} while loading") from None
        if isinstance(message, Failed):
            raise UserError(message.message) if message.user_error else RuntimeError(message.message)
        assert isinstance(message, Ready)
        self._has_model = True
        return message.info

    def send(self, packed: bytes) -> None:
        """A pickled message; it waits until somebody attends."""
        self._outbox.put(packed)

    async def attend(self, dispatch: Callable[[Reply], None]) -> None:
        """Send messages, and call `dispatch` with each reply, until the process has died."""
        dead = asyncio.Event()
        loop = asyncio.get_running_loop()
        for target, *arguments in (
            (_write, self._connection, self._outbox),
            (_read, self._connection, loop, dispatch, dead),
        ):
            threading.Thread(target=target, args=arguments, daemon=True).start()
        await dead.wait()
        self._outbox.put(_CLOSE)

    @property
    def pid(self) -> int:
        """Of a process that was started."""
        assert self._process.pid is not None
        return self._process.pid

    def kill(self) -> None:
        """What attends to it learns that it has died."""
        self._process.kill()

    def end(self, patience: float = 0.0) -> None:
        """End the process; only where `patience` seconds are not enough for that whatever it is doing.

        One that is loading the model has nothing to finish.
        """
        if self._process.pid is None:  # it was not started
            return
        if patience and self._has_model:
            self.send(pickle.dumps(None))
            self._process.join(patience)
        self._process.kill()
        self._process.join()

    def exit_code(self) -> str:
        """Of a process whose pipe is closed. It may hang all the same, and hold the model's memory."""
        self._process.join(timeout=5)
        self.end()
        return f"exit code {self._process.exitcode}"


def _write(connection: Connection, outbox: queue.SimpleQueue[bytes]) -> None:
    """In a thread: a large job blocks until the worker reads it, and that may be after a long prompt."""
    while message := outbox.get():
        try:
            connection.send_bytes(message)
        except OSError:
            return


def _read(
    connection: Connection,
    loop: asyncio.AbstractEventLoop,
    dispatch: Callable[[Reply], None],
    dead: asyncio.Event,
) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
        try:
            while True:
                loop.call_soon_threadsafe(dispatch, connection.recv())
        except (EOFError, OSError):
            pass
        finally:  # whatever it was, nobody may wait for a reply any more
            loop.call_soon_threadsafe(dead.set)


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """What is started meanwhile never gets those that ask to end: they reach the whole group, and a process
    that has not come to ignore them yet would end with a traceback. So would one that is still to be told
    what it is for: Python calls handlers in the main thread, whichever thread got the signal, so that a mask
    alone does not keep them from ending the start."""
    if sys.platform == "win32":
        yield
        return
    resource_tracker.ensure_running()  # starting it with the first process would let go of them
    handlers: dict[int, Callable[[int, FrameType | None], object]] = {}
    came: list[int] = []
    if threading.current_thread() is threading.main_thread():
        handlers = {number: own for number in _ENDING if callable(own := signal.getsignal(number))}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    for number in handlers:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, own in handlers.items():
            signal.signal(number, own)
        for number in came:
            signal.raise_signal(number)  # they wait for the mask
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
