"""The models of a server by name, of which one is in memory at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial

from qwen_common.errors import UserError

from qwen_runtime.serve.engine import Engine

_LOOK = 1.0  # seconds between two looks at who is idle


class Models:
    """An engine for each; a request for one that is not in memory waits until the others' answers have ended.

    Requests come in in the order of their arrival, whichever model they are for, so that none waits for ever.
    """

    def __init__(self, engines: Sequence[Engine], unload_after: float | None = None) -> None:
        """Args:
        engines: the first one answers where a name says nothing.
        unload_after: seconds without a request after which a model leaves memory; None: never.

        Raises:
            UserError: two have the same name.
        """
        self.engines = {engine.info.name: engine for engine in engines}
        if len(self.engines) < len(engines):
            names = [engine.info.name for engine in engines]
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"two artifacts are named {twice}: name one with --model NAME=FOLDER")
        self._unload_after = unload_after
        self._door = asyncio.Lock()  # first come, first served
        for engine in engines:
            engine.enter = partial(self._enter, engine)
        self._default = engines[0]
        self.metrics = engines[0].metrics
        self.metrics.watch(lambda: self.running, lambda: self.waiting)

    @property
    def current(self) -> Engine:
        """The one in memory, or the first."""
        return next((engine for engine in self.engines.values() if not engine.asleep), self._default)

    @property
    def running(self) -> int:
        return sum(engine.running for engine in self.engines.values())

    @property
    def waiting(self) -> int:
        return sum(engine.waiting for engine in self.engines.values())

    async def _enter(self, engine: Engine) -> None:
        async with self._door:
            if engine.asleep:
                for other in self.engines.values():
                    if other is not engine:
                        await other.sleep()
                await engine.wake()
            engine.admit()

    async def supervise(self) -> None:
        """Keep the engines at work until cancelled."""
        tasks = [asyncio.create_task(engine.supervise()) for engine in self.engines.values()]
        if self._unload_after is not None:
            tasks.append(asyncio.create_task(self._unload(self._unload_after)))
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _unload(self, after: float) -> None:
        while True:
            await asyncio.sleep(min(_LOOK, after))
            for engine in self.engines.values():
                if engine.alive and engine.idle_for >= after:
                    async with self._door:
                        if engine.idle_for >= after:
                            await engine.sleep()

    def close(self) -> None:
        for engine in self.engines.values():
            engine.close()
