"""Connections that ask nothing."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

from qwen_runtime.serve.http import HEAD_TIMEOUT


class Connection(H11Protocol):
    """uvicorn's, closed when a request's head takes more than `HEAD_TIMEOUT` seconds.

    uvicorn bounds only the silence after an answer, and one byte ends that bound.
    """

    _waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._rest()

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._rest()
        elif self._waiting is None:
            self._waiting = self.loop.call_later(HEAD_TIMEOUT, self.timeout_keep_alive_handler)

    def _rest(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None
