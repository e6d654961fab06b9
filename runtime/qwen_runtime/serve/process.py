"""The worker process, seen from the server, and the pipe to it."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import pickle
import queue
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection

from qwen_common.errors import UserError

from qwen_runtime.serve import worker
from qwen_runtime.serve.worker import Failed, ModelSettings, Ready, Reply

_CLOSE = b""


class ModelProcess:
    """Started with it, and it waits until the process has the model.

    Attributes:
        info: what was loaded.

    Raises:
        UserError: the artifact cannot be loaded.
    """

    def __init__(self, settings: ModelSettings) -> None:
        context = multiprocessing.get_context("spawn")  # a fork of a process with threads is not safe
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=worker.main, args=(settings, theirs), name="qwen-run model", daemon=True
        )
        try:
            self._process.start()
            theirs.close()
            message = self._connection.recv()
        except (EOFError, OSError):
            raise RuntimeError(f"the model's process ended with {self.exit_code()} while loading") from None
        if isinstance(message, Failed):
            raise UserError(message.message) if message.user_error else RuntimeError(message.message)
        assert isinstance(message, Ready)
        self.info = message.info
        self._outbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()

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

    def end(self, patience: float = 0.0) -> None:
        """End the process; only where `patience` seconds are not enough for that whatever it is doing."""
        if patience:
            self.send(pickle.dumps(None))
            self._process.join(patience)
        self._process.kill()
        self._process.join()

    def exit_code(self) -> str:
        self._process.join(timeout=5)
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
            loop.call_soon_threadsafe(dead.set)
