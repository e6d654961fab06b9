"""Bodies in, events out, and clients that leave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from qwen_runtime.serve.errors import ApiError

T = TypeVar("T")

MAX_BODY = 32 * 1024 * 1024  # bytes; images come as base64
MOST_VALUES = 1_000_000  # of JSON in a body: to check 32 MiB of empty messages would take many seconds
HEAD_TIMEOUT = 20.0  # seconds for a whole head
BODY_TIMEOUT = 60.0  # seconds for a whole body, or more for one that is large and comes
SLOWEST_BODY = 32 * 1024  # at this many bytes a second
_SILENCE = 1.0  # seconds without an event
SEND_TIMEOUT = 60.0  # seconds that a reader may take none of a stream


# Headers that browsers send with every request of another site's page, and nobody else does.
_BROWSERS = {"origin", "sec-fetch-site"}


class ClientGone(Exception):
    """Nobody is there to be answered."""


async def read_json(http: HttpRequest, undeclared: bool = False) -> bytes:
    """The request's body.

    A page of another site can send a body here without asking first, but not one of this type.

    Args:
        undeclared: Ollama's clients may leave the type off, or send curl's, but no browser may.

    Raises:
        ApiError: it is not declared as JSON, too large, too slow, or has too many values.
        ClientGone: the client left before its end.
    """
    kind = http.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json" and not (undeclared and _BROWSERS.isdisjoint(http.headers.keys())):
        raise ApiError(415, "send the body with Content-Type: application/json")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT) as timeout:
            limit = asyncio.get_running_loop().time() + BODY_TIMEOUT
            async for chunk in http.stream():
                body += chunk
                if len(body) > MAX_BODY:
                    raise ApiError(
                        413, f"the body is larger than {MAX_BODY} bytes", headers={"Connection": "close"}
                    )
                timeout.reschedule(limit + len(body) / SLOWEST_BODY)
    except ClientDisconnect:
        raise ClientGone from None
    except TimeoutError:
        raise ApiError(
            408, f"the body came too slowly: {len(body)} bytes so far", headers={"Connection": "close"}
        ) from None
    # Those in texts are counted too, and are fewer where a text fits any context.
    if sum(map(body.count, (b",", b"[", b"{"))) > MOST_VALUES:
        raise ApiError(413, f"the body has more than {MOST_VALUES} values, commas in texts too: send fewer")
    return bytes(body)


async def while_connected(http: HttpRequest, work: Coroutine[Any, Any, T]) -> T:
    """Do `work`, which is cancelled when the client leaves.

    Raises:
        ClientGone: it left.
    """
    return await _race(work, http.receive)


class EventStream(Response):
    """Server-sent events.

    sse-starlette 3.7 would do less: it cuts running answers off at SIGTERM unless told not to for the whole
    process, adds headers, and where a reader stops it raises and does not call its handler.

    Args:
        events: JSON objects, named by their `type` where they have one; None is OpenAI's mark of the end.
        close: called when they have ended, the client left, or it stopped reading.
        comment: asked each second without an event: a line for whoever looks, which no client takes for one.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[dict[str, Any] | None],
        close: Callable[[], None],
        comment: Callable[[], str | None] = lambda: None,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-store"})
        del self.headers["content-length"]
        self._events = events
        self._close = close
        self._comment = comment

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await _race(self._stream(send), receive)
        except (ClientGone, TimeoutError):
            pass
        finally:
            self._close()

    async def _stream(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for text in self._texts():
            body = {"type": "http.response.body", "body": text.encode(), "more_body": True}
            async with asyncio.timeout(SEND_TIMEOUT):
                await send(body)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _texts(self) -> AsyncIterator[str]:
        events = aiter(self._events)
        upcoming = asyncio.ensure_future(_next(events))
        try:
            while True:
                await asyncio.wait((upcoming,), timeout=_SILENCE)
                if not upcoming.done():
                    if (comment := self._comment()) is not None:
                        yield f": {comment}\n\n"
                    continue
                if not (found := upcoming.result()):
                    return
                yield self._text(found[0])
                upcoming = asyncio.ensure_future(_next(events))
        finally:
            upcoming.cancel()
            await asyncio.wait((upcoming,))

    def _text(self, event: dict[str, Any] | None) -> str:
        data = "[DONE]" if event is None else json.dumps(event, ensure_ascii=False)
        name = f"event: {event['type']}\n" if event is not None and "type" in event else ""
        return f"{name}data: {data}\n\n"


class JsonLines(EventStream):
    """The same as lines of JSON, as Ollama's clients read them."""

    media_type = "application/x-ndjson"

    def _text(self, event: dict[str, Any] | None) -> str:
        return json.dumps(event, ensure_ascii=False) + "\n"


async def _next(events: AsyncIterator[T]) -> tuple[T] | None:
    """None at their end."""
    async for event in events:
        return (event,)
    return None


async def _race(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        gone.cancel()
        task.cancel()
        # What was cancelled cleans up before this returns.
        await asyncio.wait((task, gone))


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
