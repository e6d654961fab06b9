"""The child process that holds the model.

ONNX Runtime GenAI keeps Python's global lock while it reads a prompt, seconds for a large model. In a process
of its own it stalls nobody else, and a crash in native code does not take the server along.

Both sides send pickled objects through one pipe: `Job`, `Cancel` and `Query` towards the worker; `Ready` or
`Failed`, then `Started`, `Piece`, `Done`, `Result` and `Failed` from it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from weakref import WeakSet

from qwen_common.errors import UserError

from qwen_runtime.load_options import DEFAULTS, LoadOptions
from qwen_runtime.logits import TokenLogprob, within
from qwen_runtime.model import Model, ModelInfo
from qwen_runtime.request import ContextLengthError, Request
from qwen_runtime.resident import release_freed
from qwen_runtime.serve import signs_of_life
from qwen_runtime.serve.parser import AnswerParser
from qwen_runtime.speculative.acceptance import Acceptance
from qwen_runtime.template import begins_thought
from qwen_runtime.tool_calls.registry import DEFAULT

_log = logging.getLogger(__name__)

FAILED = 70  # exit code, as sysexits.h calls an internal error


@dataclass(frozen=True)
class ModelSettings:
    """A model of the server.

    Attributes:
        path: its artifact's folder.
        name: by which clients ask for it, if that is not the artifact's.
    """

    path: Path
    name: str | None = None
    options: LoadOptions = DEFAULTS


@dataclass(frozen=True)
class Ready:
    info: ModelInfo


@dataclass(frozen=True)
class Job:
    """One answer to make."""

    id: int
    request: Request


@dataclass(frozen=True)
class Cancel:
    id: int


@dataclass(frozen=True)
class Query:
    """What takes no turn: a function of the model, such as one that counts tokens, and its arguments."""

    id: int
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Result:
    id: int
    value: Any


@dataclass(frozen=True)
class Started:
    """The prompt was accepted and is being read."""

    id: int
    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class Reading:
    """So many tokens of the prompt are read."""

    id: int
    tokens: int


@dataclass(frozen=True)
class Piece:
    """The next piece of text, and what was asked to be told of the tokens that begin in it."""

    id: int
    text: str
    logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True)
class Done:
    id: int
    finish_reason: str
    stop_string: str | None
    completion_tokens: int
    logprobs: tuple[TokenLogprob, ...]
    acceptance: Acceptance | None


@dataclass(frozen=True)
class Failed:
    """`user_error`: the request is at fault, and the message says how. `id` is None while loading."""

    id: int | None
    message: str
    user_error: bool
    sizes: tuple[int, int] | None = None  # tokens of a prompt that is too long, and of the context

    @classmethod
    def of(cls, id: int | None, error: Exception) -> Failed:
        sizes = None
        if isinstance(error, ContextLengthError):
            sizes = error.prompt_tokens, error.context_length
        return cls(id, _line(error), isinstance(error, UserError), sizes)


Reply = Started | Reading | Piece | Done | Result | Failed


def main(settings: ModelSettings, connection: Connection) -> None:
    """Load the model and answer jobs, each in a thread, until the pipe closes."""
    for name in (signal.SIGINT, signal.SIGTERM):  # they reach the whole group, and the server decides
        signal.signal(name, signal.SIG_IGN)
    signs_of_life.show()
    try:
        model = Model.load_with(settings.path, settings.options)
    except Exception as error:
        _log.debug("loading failed", exc_info=True)
        with contextlib.suppress(OSError):  # the server is gone
            connection.send(Failed.of(None, error))
        return
    with model:
        _Worker(model, connection).serve()


@dataclass
class _Worker:
    model: Model
    connection: Connection
    _cancelled: dict[int, threading.Event] = field(default_factory=dict)  # of the jobs at work
    _ahead: _ReadAhead | None = None
    _threads: WeakSet[threading.Thread] = field(default_factory=WeakSet)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _sending: threading.Lock = field(default_factory=threading.Lock)

    def serve(self) -> None:
        self._send(Ready(self.model.info))
        while (message := self._receive()) is not None:
            if isinstance(message, Cancel):
                if cancelled := self._cancelled.get(message.id):
                    cancelled.set()
            elif isinstance(message, Query):
                self._start(self._look_up, message)
            else:
                cancelled = self._cancelled[message.id] = threading.Event()
                self._start(self._answer, message, cancelled)
        for cancelled in list(self._cancelled.values()):
            cancelled.set()
        if self._ahead:
            self._ahead.stop()
        for thread in list(self._threads):  # Python's end aborts the process where one is in native code
            thread.join()

    def _start(self, target: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.add(thread)
        thread.start()

    def _receive(self) -> Job | Cancel | Query | None:
        try:
            return self.connection.recv()
        except (EOFError, OSError):  # the server is gone
            return None

    def _answer(self, job: Job, cancelled: threading.Event) -> None:
        answered = ""
        try:
            if self._ahead:
                self._ahead.stop()

            def on_prompt(read: int) -> None:
                self._send(Reading(job.id, read))

            with self.model.answer(job.request, cancelled, on_prompt) as generation:
                self._send(Started(job.id, generation.prompt_tokens, generation.cached_tokens))
                told = 0
                for text in generation:
                    end = within(generation.logprobs, len(generation.text))
                    self._send(Piece(job.id, text, tuple(generation.logprobs[told:end])))
                    told = end
                last: Reply = Done(
                    job.id,
                    generation.finish_reason or "cancelled",
                    generation.stop_string,
                    len(generation.tokens),
                    tuple(generation.logprobs[told:]),
                    generation.acceptance,
                )
            if generation.finish_reason != "cancelled":
                answered = generation.text
        except Exception as error:
            if not isinstance(error, UserError):
                _log.exception("an answer failed")
            last = Failed.of(job.id, error)
        ahead = None
        with self._lock:
            del self._cancelled[job.id]
            if answered and job.request.read_ahead and not self._cancelled:
                ahead = self._ahead = _ReadAhead(self.model, job.request, answered)
        self._send(last)
        if isinstance(last, Failed) and not last.user_error:
            # A provider that has failed, because its device was removed perhaps, fails or errs again.
            os._exit(FAILED)
        if ahead:
            ahead.read()
        if not self._cancelled:  # else whoever ends last does it
            self._flush()
            release_freed()

    def _flush(self) -> None:
        try:
            self.model.flush_states()
        except Exception:
            _log.exception("states were not written to disk")

    def _look_up(self, query: Query) -> None:
        try:
            found: Reply = Result(query.id, query.function(self.model, *query.arguments))
        except Exception as error:
            if not isinstance(error, UserError):
                _log.exception("a query failed")
            found = Failed.of(query.id, error)
        self._send(found)

    def _send(self, reply: Ready | Reply) -> None:
        try:
            with self._sending:
                self.connection.send(reply)
        except OSError:  # the server is gone, and `serve` ends soon
            pass


class _ReadAhead:
    """Reads the answer as history while nobody waits, so that the next turn begins sooner."""

    def __init__(self, model: Model, request: Request, answered: str) -> None:
        self._model = model
        self._request = request
        self._answered = answered
        self._stopped = threading.Event()
        self._finished = threading.Event()

    def read(self) -> None:
        try:
            self._read()
        except UserError:  # a template with rules of its own
            pass
        except Exception:
            _log.exception("reading ahead failed")
        finally:
            self._finished.set()

    def _read(self) -> None:
        request = self._request
        if request.conversation is None:
            return
        variables = {"enable_thinking": request.thinking, **request.template_kwargs}
        info = self._model.info
        opened = begins_thought(info.templates, request.conversation, request.tools, variables)
        parser = AnswerParser(opened, request.tools, dialect=info.dialect or DEFAULT)
        parser.feed(request.begun + self._answered)
        parser.finish()
        if parser.calls:  # a result comes next, and no word of the user
            return
        message = {"role": "assistant", "content": parser.message["content"] or ""}
        self._model.read_ahead(
            [*request.conversation, message],
            sampling=request.sampling,
            tools=request.tools,
            guidance=request.guidance,
            template_kwargs=request.template_kwargs,
            adapter=request.adapter,
            cancelled=self._stopped.is_set,
        )

    def stop(self) -> None:
        """Returns when what was read so far can be used."""
        self._stopped.set()
        self._finished.wait()


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
