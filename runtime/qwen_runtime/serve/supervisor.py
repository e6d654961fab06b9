"""Keeps one model's process: starts it when it is needed, again when it dies, and ends it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Callable

from qwen_runtime.artifact import Artifact
from qwen_runtime.info import ModelInfo
from qwen_runtime.serve.errors import ApiError
from qwen_runtime.serve.process import ModelProcess
from qwen_runtime.serve.signs_of_life import Silence
from qwen_runtime.serve.worker import Done, ModelSettings, Reply, Result
from qwen_runtime.switched import adapter_files

_log = logging.getLogger(__name__)

_RESTART_PAUSE = 1.0  # seconds, doubled where it dies again before it was of use
_LONGEST_PAUSE = 60.0
_LONGEST_END = 20.0  # in which the process may write states to disk
_LAST_WRITES = 5.0  # the same, where the server ends
_LOOK = 1.0  # seconds between looks whether the process runs
_TOLD = 10.0  # seconds that it has not run, and it is told
_LONGEST_SILENCE = 120.0


class Supervisor:
    """One model's process: asleep, alive, or neither while it is started again.

    Attributes:
        alive: it is there, with the model.
        asleep: it is not there because nobody needs it; `wake` starts it.
        loaded: when, in seconds since 1970.
        frozen: it is there, and has not run for some time.
    """

    def __init__(
        self, settings: ModelSettings, dispatch: Callable[[Reply], None], died: Callable[[], None]
    ) -> None:
        """Args:
        dispatch: called with each reply.
        died: called when the process has died.
        """
        self.alive = False
        self.asleep = True
        self.loaded = 0.0
        self.frozen = False
        self._settings = settings
        self._dispatch, self._died = dispatch, died
        self._info: ModelInfo | None = None
        self._process: ModelProcess | None = None
        self._there = asyncio.Event()  # a process to attend to
        self._changing = asyncio.Lock()  # it is started and ended by one at a time
        self._useful = False  # it has answered something
        self._closed = False

    @property
    def info(self) -> ModelInfo:
        """Before the model was loaded for the first time what the artifact says, without a provider."""
        if self._info is None:
            artifact = Artifact.open(self._settings.path)
            options = self._settings.options
            adapters = adapter_files(artifact, options.adapters)
            self._inform(ModelInfo.of(artifact, "", "not loaded yet", options.context_length, adapters))
        assert self._info is not None
        return self._info

    def _inform(self, info: ModelInfo) -> None:
        self._info = dataclasses.replace(info, name=self._settings.name or info.name)

    def load(self) -> None:
        """Start the process and wait until it has the model; before `supervise` only.

        Raises:
            UserError: the artifact cannot be loaded.
            RuntimeError: the process ended.
        """
        process = self._process = ModelProcess(self._settings)
        process.start()
        if self._closed:  # meanwhile, of the one before
            process.end()
        self._inform(process.wait())  # before a request can see that it is there
        self._useful = False
        self.alive, self.asleep = True, False
        self.loaded = time.time()

    async def wake(self) -> None:
        """Load the model, if it is asleep; to its end, also where who asked for it leaves.

        Raises:
            ApiError: it cannot be loaded.
        """
        await asyncio.shield(asyncio.ensure_future(self._wake()))

    async def _wake(self) -> None:
        async with self._changing:
            if not self.asleep:
                return
            try:
                await self._load()
            except Exception as error:
                _log.error("%s was not loaded: %s", self.info.name, error)
                raise ApiError(503, f"{self.info.name} cannot be loaded: {error}") from None

    async def _load(self) -> None:
        await _apart(self.load)
        self._there.set()

    async def sleep(self) -> None:
        """End the process, for which nobody may wait; to its end, also where who asked for it leaves."""
        await asyncio.shield(asyncio.ensure_future(self._sleep()))

    async def _sleep(self) -> None:
        async with self._changing:
            if self.asleep:
                return
            self.alive, self.asleep = False, True
            self._there.clear()
            assert self._process is not None
            await asyncio.to_thread(self._process.end, _LONGEST_END)

    async def supervise(self) -> None:
        """Pass the process's replies on until cancelled, and start it again when it dies.

        When it has died early twice, it gets the CPU in place of the device's own provider.
        """
        pause, early = _RESTART_PAUSE, 0
        if self.alive:
            self._there.set()
        while True:
            await self._there.wait()
            process, started = self._process, time.monotonic()
            assert process is not None
            watching = asyncio.create_task(self._watch(process))
            try:
                await process.attend(self._on_reply)
            finally:
                watching.cancel()
                self.frozen = False
            if process is not self._process or self.asleep:  # it was ended, and another may be there already
                continue
            self.alive = False
            self._there.clear()
            self._died()
            exit_code = await asyncio.to_thread(process.exit_code)
            _log.error("the model's process ended with %s; starting it again", exit_code)
            if time.monotonic() - started > _LONGEST_PAUSE:
                early = 0
            early += 1
            if early == 2 and self.info.provider != "cpu":
                _log.error("%s has failed twice: going on with the CPU", self.info.provider)
                on_the_cpu = dataclasses.replace(self._settings.options, provider="cpu")
                self._settings = dataclasses.replace(self._settings, options=on_the_cpu)
            pause = await self._start_again(_RESTART_PAUSE if self._useful else pause)

    async def _watch(self, process: ModelProcess) -> None:
        """Tell when it does not run any more, and end it where it stays so."""
        silence = Silence(process.pid)
        while (seconds := silence.look(_LOOK)) < _LONGEST_SILENCE:
            if not self.frozen and seconds >= _TOLD:
                _log.error(
                    "the model's process has not run for %.0f seconds: it is stopped, or waits for a disk or "
                    "a driver; it is ended after %.0f",
                    seconds,
                    _LONGEST_SILENCE,
                )
            elif self.frozen and not seconds:
                _log.warning("the model's process runs again")
            self.frozen = seconds >= _TOLD
            await asyncio.sleep(_LOOK)
        _log.error("the model's process has not run for %.0f seconds: ending it", seconds)
        process.kill()

    async def _start_again(self, pause: float) -> float:
        """Until it is there, or asleep; the pause before the next time."""
        while not self.alive and not self.asleep:
            with contextlib.suppress(TimeoutError):
                # It may be put to sleep meanwhile and woken, and is attended to then.
                await asyncio.wait_for(self._there.wait(), pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
            async with self._changing:
                if self.alive or self.asleep:
                    continue
                try:
                    await self._load()
                except Exception as error:
                    _log.error("the model did not load again: %s", error)
        return pause

    def _on_reply(self, reply: Reply) -> None:
        self._useful = self._useful or isinstance(reply, Done | Result)
        self._dispatch(reply)

    def send(self, packed: bytes) -> None:
        assert self._process is not None
        self._process.send(packed)

    def close(self) -> None:
        """End the process, whatever it is doing but writing states."""
        self._closed = True
        self.alive = False
        if self._process is not None:
            self._process.end(_LAST_WRITES if self._settings.options.states is not None else 0)


async def _apart(work: Callable[[], None]) -> None:
    """Do `work` in a thread as `asyncio.to_thread` does, for whose threads the end of the loop waits: loading
    takes minutes, and ends with its process when that is ended after the loop."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def tell(error: Exception | None) -> None:
        if done.cancelled():
            return
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)

    def run() -> None:
        failure: Exception | None = None
        try:
            work()
        except Exception as error:
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(tell, failure)

    threading.Thread(target=run, name="loading", daemon=True).start()
    await done
