"""The server's side of the worker process: a queue with a limit, and answers as they grow."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import multiprocessing
import pickle
import queue
import threading
import time
from collections.abc import Callable, Collection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from qwen_common.errors import UserError

from qwen_runtime.model import ModelInfo
from qwen_runtime.prompt import check_count
from qwen_runtime.request import ContextLengthError, Request
from qwen_runtime.serve import worker
from qwen_runtime.serve.answer import Answer as Answer
from qwen_runtime.serve.errors import ApiError, queue_full, reloading, request_failed
from qwen_runtime.serve.metrics import Metrics
from qwen_runtime.serve.worker import (
    Cancel,
    Done,
    Failed,
    Job,
    ModelSettings,
    Piece,
    Query,
    Reading,
    Ready,
    Reply,
    Result,
    Started,
)

T = TypeVar("T")

_log = logging.getLogger(__name__)

_RESTART_PAUSE = 1.0  # seconds, doubled with every failure in a row
_LONGEST_PAUSE = 60.0
_FIRST_GUESS = 5.0  # seconds that an answer takes, before any was made
_MEMORY = 0.2  # weight of the newest answer in that


class Engine:
    """The worker process and the requests that wait for it.

    Args:
        parallel: most answers that are made at the same time.
        waiting: most requests that wait for their turn.
    """

    def __init__(self, settings: ModelSettings, parallel: int = 1, waiting: int = 16) -> None:
        self.parallel = parallel
        self.alive = False
        self.metrics = Metrics()
        self.metrics.watch(lambda: self.running, lambda: self.waiting)
        self._settings = settings
        self._limit = waiting
        self._waiting = 0
        self._slots = asyncio.Semaphore(parallel)
        self._ids = itertools.count()
        self._answers: dict[int, Answer] = {}
        self._queries: dict[int, asyncio.Future[Reply]] = {}
        self._seconds = _FIRST_GUESS  # that an answer takes, lately
        self._info: ModelInfo | None = None
        self._process: BaseProcess | None = None
        self._outbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self.loaded = 0.0  # seconds since 1970

    @property
    def info(self) -> ModelInfo:
        assert self._info is not None, "load the model first"
        return self._info

    @property
    def answers(self) -> Collection[Answer]:
        """Those at work."""
        return self._answers.values()

    @property
    def waiting(self) -> int:
        return self._waiting

    @property
    def running(self) -> int:
        return len(self._answers)

    def load(self) -> None:
        """Start the worker process and wait until it has the model.

        Raises:
            UserError: the artifact cannot be loaded.
        """
        context = multiprocessing.get_context("spawn")  # a fork of a process with threads is not safe
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=worker.main, args=(self._settings, theirs), name="qwen-run model", daemon=True
        )
        self._process.start()
        theirs.close()
        try:
            message = self._connection.recv()
        except EOFError:
            raise RuntimeError(f"the model's process ended with {self._exit_code()} while loading") from None
        if isinstance(message, Failed):
            raise UserError(message.message) if message.user_error else RuntimeError(message.message)
        assert isinstance(message, Ready)
        self._info = message.info
        self._outbox = queue.SimpleQueue()  # before a request can see that the worker is there
        self.alive = True
        self.loaded = time.time()

    async def supervise(self) -> None:
        """Pass the worker's replies on until cancelled, and start it again when it dies.

        When it has died early twice, it gets the CPU in place of the device's own provider.
        """
        pause = _RESTART_PAUSE
        early = 0
        while True:
            if self.alive:
                started = time.monotonic()
                await self._attend()
                exit_code = await asyncio.to_thread(self._exit_code)
                _log.error("the model's process ended with %s; starting it again", exit_code)
                if time.monotonic() - started > _LONGEST_PAUSE:
                    pause, early = _RESTART_PAUSE, 0
                early += 1
                if early == 2 and self.info.provider != "cpu":
                    _log.error("%s has failed twice: going on with the CPU", self.info.provider)
                    self._settings = dataclasses.replace(self._settings, provider="cpu")
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
            try:
                await asyncio.to_thread(self.load)
            except Exception as error:
                _log.error("the model did not load again: %s", error)

    async def _attend(self) -> None:
        """Returns when the worker has died."""
        dead = asyncio.Event()
        loop = asyncio.get_running_loop()
        for target, *arguments in (
            (_write, self._connection, self._outbox),
            (_read, self._connection, loop, self._dispatch, dead),
        ):
            threading.Thread(target=target, args=arguments, daemon=True).start()
        await dead.wait()
        self._outbox.put(_CLOSE)
        self._forget("the model's process ended: try again")
        self.metrics.restarts.inc()

    async def submit(self, request: Request, admitted: bool = False) -> Answer:
        """Wait for a place, and start an answer. The caller must close it.

        Args:
            admitted: it is a part of what was begun, and is not refused because others wait.

        Raises:
            ApiError: too many requests wait, the worker is gone, or the request is at fault.
        """
        self._check_queue(admitted)
        if request.conversation is not None:
            try:
                check_count(request.conversation, self.info.context_length)
            except ContextLengthError as error:  # now, for only to send so many would take long
                sizes = (error.prompt_tokens, error.context_length)
                raise request_failed(str(error), True, sizes) from None
        job = Job(next(self._ids), request)
        packed = _packed(job)
        await self._turn()
        answer = Answer(job.id, self.cancel)
        self._answers[answer.id] = answer
        self._outbox.put(packed)
        try:
            await answer.start()
        except BaseException:
            answer.close()
            raise
        return answer

    def _check_queue(self, admitted: bool = False) -> None:
        """Args:
            admitted: as for `submit`.

        Raises:
            ApiError: too many requests wait, or the worker is gone.
        """
        if not self.alive:
            raise reloading()
        if not admitted and self._waiting >= self._limit and self._slots.locked():
            raise queue_full(self._waiting, self._seconds * (1 + self._waiting / self.parallel))

    async def _turn(self) -> None:
        """Wait for a place, which the caller must release."""
        self._waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self._waiting -= 1
        if not self.alive:
            self._slots.release()
            raise reloading()

    async def ask_in_turn(self, function: Callable[..., T], *arguments: Any) -> T:
        """As `ask`, of what takes the model some time, and so waits for a place as answers do.

        It is done to its end, and only then is the place free, also where the client leaves.
        """
        self._check_queue()
        await self._turn()
        asked = asyncio.ensure_future(self.ask(function, *arguments))
        asked.add_done_callback(lambda _: self._slots.release())
        return await asyncio.shield(asked)

    async def ask(self, function: Callable[..., T], *arguments: Any) -> T:
        """What `function`, of a module of the package, returns for the worker's model and `arguments`.

        For what is done in no time, and so waits for no turn, though for a chunk of a prompt perhaps.

        Raises:
            ApiError: too many others ask, the worker is gone, or the arguments are at fault.
        """
        if not self.alive:
            raise reloading()
        if len(self._queries) > self._limit:
            raise queue_full(len(self._queries), 1)
        query = Query(next(self._ids), function, arguments)
        packed = _packed(query)
        reply = self._queries[query.id] = asyncio.get_running_loop().create_future()
        try:
            self._outbox.put(packed)
            found = await reply
        finally:
            del self._queries[query.id]
        if isinstance(found, Failed):
            raise request_failed(found.message, found.user_error, found.sizes)
        assert isinstance(found, Result)
        value: T = found.value
        return value

    def cancel(self, job_id: int) -> None:
        self._outbox.put(pickle.dumps(Cancel(job_id)))

    def _dispatch(self, reply: Reply) -> None:
        assert reply.id is not None
        if reply.id not in self._answers:  # of a query, whose client may have left
            if (query := self._queries.get(reply.id)) and not query.done():
                query.set_result(reply)
            return
        answer = self._answers[reply.id]
        if isinstance(reply, Reading):
            answer.prompt_read = reply.tokens
            return
        answer.replies.put_nowait(reply)
        self._measure(answer, reply)
        if isinstance(reply, Done | Failed):
            self._end(answer)

    def _measure(self, answer: Answer, reply: Reply) -> None:
        seconds = time.monotonic() - answer.begun
        if isinstance(reply, Started):
            answer.prompt_read = reply.cached_tokens
            self.metrics.prompt_tokens.inc(reply.prompt_tokens)
            self.metrics.cached_tokens.inc(reply.cached_tokens)
        elif isinstance(reply, Piece) and not answer.spoke:
            answer.spoke, answer.prompt_read = True, answer.prompt_tokens
            self.metrics.first_token.observe(seconds)
        elif isinstance(reply, Done):
            self.metrics.completion_tokens.inc(reply.completion_tokens)
            self.metrics.answer.observe(seconds)

    def _end(self, answer: Answer) -> None:
        """Only now, not when the client left, is the place free: the worker really stopped."""
        answer.ended = True
        self._seconds += _MEMORY * (time.monotonic() - answer.begun - self._seconds)
        del self._answers[answer.id]
        self._slots.release()

    def _forget(self, reason: str) -> None:
        self.alive = False
        for answer in list(self._answers.values()):
            answer.replies.put_nowait(Failed(answer.id, reason, user_error=False))
            self._end(answer)
        for query_id, query in self._queries.items():
            if not query.done():
                query.set_result(Failed(query_id, reason, user_error=False))

    def close(self) -> None:
        """End the worker process, whatever it is doing."""
        self.alive = False
        if self._process is not None:
            self._process.kill()
            self._process.join()

    def _exit_code(self) -> str:
        assert self._process is not None
        self._process.join(timeout=5)
        return f"exit code {self._process.exitcode}"


_CLOSE = b""


def _packed(message: Job | Query) -> bytes:
    """Here, where what cannot be sent is this request's failure alone."""
    try:
        return pickle.dumps(message)
    except RecursionError:
        raise ApiError(400, "the request is nested too deeply") from None


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
