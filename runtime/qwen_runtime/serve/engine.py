"""The server's side of the worker process: a queue with a limit, and answers as they grow."""

from __future__ import annotations

import asyncio
import itertools
import pickle
import time
from collections.abc import Awaitable, Callable, Collection
from typing import Any, TypeVar

from qwen_runtime.info import ModelInfo
from qwen_runtime.request import Request
from qwen_runtime.serve import admission
from qwen_runtime.serve.answer import Answer as Answer
from qwen_runtime.serve.errors import ApiError, queue_full, reloading, request_failed
from qwen_runtime.serve.metrics import Metrics
from qwen_runtime.serve.supervisor import Supervisor
from qwen_runtime.serve.worker import (
    Cancel,
    Done,
    Failed,
    Job,
    ModelSettings,
    Piece,
    Query,
    Reading,
    Reply,
    Result,
    Started,
)

T = TypeVar("T")

_FIRST_GUESS = 5.0  # seconds that an answer takes, before any was made
_MEMORY = 0.2  # weight of the newest answer in that


class Engine:
    """The worker process and the requests that wait for it.

    Args:
        parallel: most answers that are made at the same time.
        waiting: most requests that wait for their turn.
        metrics: those of several engines.

    Attributes:
        enter: waits until a request may count on the model, and admits it; loads the model if need be.
    """

    def __init__(
        self,
        settings: ModelSettings,
        parallel: int = 1,
        waiting: int = 16,
        metrics: Metrics | None = None,
    ) -> None:
        self.parallel = parallel
        self.enter: Callable[[], Awaitable[None]] = self._enter
        self.metrics = metrics or Metrics()
        self._model = Supervisor(settings, self._dispatch, self._died)
        self._inside = 0  # requests that count on the model
        self._idle = asyncio.Event()
        self._idle.set()
        self._idle_since = time.monotonic()
        self._limit = waiting
        self._waiting = 0
        self._slots = asyncio.Semaphore(parallel)
        self._ids = itertools.count()
        self._answers: dict[int, Answer] = {}
        self._queries: dict[int, asyncio.Future[Reply]] = {}
        self._seconds = _FIRST_GUESS  # that an answer takes, lately

    @property
    def info(self) -> ModelInfo:
        return self._model.info

    @property
    def alive(self) -> bool:
        """The worker is there."""
        return self._model.alive

    @property
    def frozen(self) -> bool:
        """It is there, and has not run for some time."""
        return self._model.frozen

    @property
    def asleep(self) -> bool:
        """It is not there because nobody needs it: the next request starts it."""
        return self._model.asleep

    @property
    def loaded(self) -> float:
        """When, in seconds since 1970."""
        return self._model.loaded

    @property
    def idle_for(self) -> float:
        """Seconds since the last request ended; 0 while there is one."""
        return 0.0 if self._inside else time.monotonic() - self._idle_since

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
        """As `Supervisor.load`."""
        self._model.load()

    async def _enter(self) -> None:
        await self.wake()
        self.admit()

    def admit(self) -> None:
        """A request counts on the model."""
        self._inside += 1
        self._idle.clear()

    def leave(self) -> None:
        """It does no more."""
        self._inside -= 1
        if not self._inside:
            self._idle_since = time.monotonic()
            self._idle.set()

    async def idle(self) -> None:
        """Wait until no request counts on the model."""
        await self._idle.wait()

    async def wake(self) -> None:
        """As `Supervisor.wake`."""
        await self._model.wake()

    async def sleep(self) -> None:
        """End the worker, once no request counts on it."""
        await self.idle()
        await self._model.sleep()

    async def supervise(self) -> None:
        """As `Supervisor.supervise`."""
        await self._model.supervise()

    async def submit(self, request: Request, admitted: bool = False) -> Answer:
        """Wait for a place, and start an answer. The caller must close it.

        Args:
            admitted: it is a part of what was begun, and is not refused because others wait.

        Raises:
            ApiError: too many requests wait, the worker is gone, or the request is at fault.
        """
        await admission.check(request, self.info)
        self._check_queue(admitted)
        job = Job(next(self._ids), request)
        packed = _packed(job)
        await self._turn()
        answer = Answer(job.id, self.cancel)
        self._answers[answer.id] = answer
        self._model.send(packed)
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
        if not self.alive and not self.asleep:
            raise reloading()
        # Requests may also wait for the model itself, with every place free.
        busy = self._slots.locked() or self._waiting > self._limit
        if not admitted and self._waiting >= self._limit and busy:
            raise queue_full(self._waiting, self._seconds * (1 + self._waiting / self.parallel))

    async def _turn(self) -> None:
        """Wait for a place, which the caller must release."""
        self._waiting += 1
        try:
            await self.enter()
            try:
                await self._slots.acquire()
            except BaseException:
                self.leave()
                raise
        finally:
            self._waiting -= 1
        if not self.alive:
            self._end_turn()
            raise reloading()

    def _end_turn(self) -> None:
        self._slots.release()
        self.leave()

    async def ask_in_turn(self, function: Callable[..., T], *arguments: Any) -> T:
        """As `ask`, of what takes the model some time, and so waits for a place as answers do.

        It is done to its end, and only then is the place free, also where the client leaves.
        """
        self._check_queue()
        await self._turn()
        asked = asyncio.ensure_future(self._ask(function, *arguments))
        asked.add_done_callback(self._end_query)
        return await asyncio.shield(asked)

    def _end_query(self, asked: asyncio.Future[Any]) -> None:
        self._end_turn()
        if not asked.cancelled():
            asked.exception()  # else asyncio reports one that nobody waits for any more

    async def ask(self, function: Callable[..., T], *arguments: Any) -> T:
        """What `function`, of a module of the package, returns for the worker's model and `arguments`.

        For what is done in no time, and so waits for no turn, though for a chunk of a prompt perhaps.

        Raises:
            ApiError: too many others ask, the worker is gone, or the arguments are at fault.
        """
        if not self.alive and not self.asleep:
            raise reloading()
        if len(self._queries) > self._limit:
            raise queue_full(len(self._queries), 1)
        await self.enter()
        try:
            return await self._ask(function, *arguments)
        finally:
            self.leave()

    async def _ask(self, function: Callable[..., T], *arguments: Any) -> T:
        if not self.alive:
            raise reloading()
        query = Query(next(self._ids), function, arguments)
        packed = _packed(query)
        reply = self._queries[query.id] = asyncio.get_running_loop().create_future()
        try:
            self._model.send(packed)
            found = await reply
        finally:
            del self._queries[query.id]
        if isinstance(found, Failed):
            raise request_failed(found.message, found.user_error, found.sizes)
        assert isinstance(found, Result)
        value: T = found.value
        return value

    def cancel(self, job_id: int) -> None:
        self._model.send(pickle.dumps(Cancel(job_id)))

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
            if reply.acceptance is not None:
                self.metrics.drafted_tokens.inc(reply.acceptance.drafted)
                self.metrics.accepted_tokens.inc(reply.acceptance.accepted)
            self.metrics.answer.observe(seconds)

    def _end(self, answer: Answer) -> None:
        """Only now, not when the client left, is the place free: the worker really stopped."""
        answer.ended = True
        self._seconds += _MEMORY * (time.monotonic() - answer.begun - self._seconds)
        del self._answers[answer.id]
        self._end_turn()

    def _died(self) -> None:
        """Nobody may wait for an answer that does not come."""
        self.metrics.restarts.inc()
        reason = "the model's process ended: try again"
        for answer in list(self._answers.values()):
            answer.replies.put_nowait(Failed(answer.id, reason, user_error=False))
            self._end(answer)
        for query_id, query in self._queries.items():
            if not query.done():
                query.set_result(Failed(query_id, reason, user_error=False))

    def close(self) -> None:
        """As `Supervisor.close`."""
        self._model.close()


def _packed(message: Job | Query) -> bytes:
    """Here, where what cannot be sent is this request's failure alone."""
    try:
        return pickle.dumps(message)
    except RecursionError:
        raise ApiError(400, "the request is nested too deeply") from None
