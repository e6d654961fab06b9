"""The models of a server by name, of which one is in memory at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial

from qwen_common.errors import UserError

from qwen_runtime.serve.engine import Engine
from qwen_runtime.serve.served import Served

_LOOK = 1.0  # seconds between two looks at who is idle


class Models:
    """An engine for each; a request for one that is not in memory waits until the others' answers have ended.

    Who waits longest is next, whichever model it is for, and with it come all who wait for the same model by
    then: so none waits for ever, and models do not take turns with every request.
    """

    def __init__(self, engines: Sequence[Engine], unload_after: float | None = None) -> None:
        """Args:
        engines: the first one answers where a name says nothing.
        unload_after: seconds without a request after which a model leaves memory; None: never.

        Raises:
            UserError: two have the same name, or adapters of theirs have.
        """
        self.engines = {engine.info.name: engine for engine in engines}
        if len(self.engines) < len(engines):
            names = [engine.info.name for engine in engines]
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"two artifacts are named {twice}: name one with --model NAME=FOLDER")
        self.served = {name: Served(engine) for name, engine in self.engines.items()}
        for engine in engines:
            for adapter in engine.info.adapters:
                if (other := self.served.get(adapter)) is not None:
                    name = engine.info.name
                    raise UserError(
                        f"{adapter} is an adapter of {name} and of {other.parent}: serve them apart"
                        if other.parent
                        else f"{adapter} is a model and an adapter of {name}: name the model otherwise with "
                        "--model NAME=FOLDER"
                    )
                self.served[adapter] = Served(engine, adapter)
        self._unload_after = unload_after
        self._line: dict[asyncio.Future[None], Engine] = {}  # who waits for which, by arrival
        self._arrived = asyncio.Event()
        self._changing = asyncio.Lock()  # which of them is in memory
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
        place = asyncio.get_running_loop().create_future()
        self._line[place] = engine
        self._arrived.set()
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled() and place.exception() is None:
                engine.leave()  # it was admitted just before it left
            raise
        finally:
            self._line.pop(place, None)

    async def _admit(self) -> None:
        while True:
            await self._arrived.wait()
            if not self._line:
                self._arrived.clear()
                continue
            engine = next(iter(self._line.values()))
            failure: Exception | None = None
            async with self._changing:
                try:
                    await self._switch_to(engine)
                except Exception as error:
                    failure = error
                for place in [place for place, wanted in self._line.items() if wanted is engine]:
                    del self._line[place]
                    if place.done():  # who waited has left
                        continue
                    if failure is not None:
                        place.set_exception(failure)
                        continue
                    engine.admit()
                    place.set_result(None)

    async def _switch_to(self, engine: Engine) -> None:
        if not engine.asleep:
            return
        others = [other for other in self.engines.values() if other is not engine]
        for other in others:
            await other.idle()
        if engine not in self._line.values():  # who asked for it has left
            return
        for other in others:
            await other.sleep()
        await engine.wake()

    async def supervise(self) -> None:
        """Keep the engines at work until cancelled."""
        tasks = [asyncio.create_task(engine.supervise()) for engine in self.engines.values()]
        tasks.append(asyncio.create_task(self._admit()))
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
                    async with self._changing:
                        if engine.idle_for >= after:
                            await engine.sleep()

    def close(self) -> None:
        for engine in self.engines.values():
            engine.close()
