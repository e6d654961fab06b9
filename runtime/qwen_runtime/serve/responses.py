"""`/v1/responses`: OpenAI's newer interface to the same answers. Nothing is stored between requests."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import closing
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from qwen_runtime.serve.chat import answer_for
from qwen_runtime.serve.common import served_for
from qwen_runtime.serve.engine import Answer
from qwen_runtime.serve.errors import ApiError
from qwen_runtime.serve.http import EventStream, read_json, while_connected
from qwen_runtime.serve.parser import AnswerParser, Delta, finish
from qwen_runtime.serve.schema.base import parse
from qwen_runtime.serve.schema.responses import ResponseRequest

Event = dict[str, Any]


async def responses(http: HttpRequest) -> Response:
    asked = parse(ResponseRequest, await read_json(http))
    served = served_for(http, asked.model)
    answer, parser = await while_connected(http, answer_for(asked.as_chat(), served, http.app.state.thinking))
    events = _events(answer, parser, _head(asked, served.name))
    if asked.stream:
        return EventStream(events, answer.close, answer.progress)
    with closing(answer):
        return await while_connected(http, _last(events))


async def _last(events: AsyncIterator[Event]) -> Response:
    last = [event async for event in events][-1]
    if last["type"] == "response.failed":
        raise ApiError(500, last["response"]["error"]["message"])
    return JSONResponse(last["response"])


def _head(asked: ResponseRequest, model: str) -> dict[str, Any]:
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "model": model,
        "error": None,
        "incomplete_details": None,
        "instructions": asked.instructions,
        "max_output_tokens": asked.max_output_tokens,
        "metadata": asked.metadata or {},
        "parallel_tool_calls": asked.parallel_tool_calls is not False,
        "previous_response_id": None,
        "store": False,
        "temperature": asked.temperature,
        "tool_choice": asked.tool_choice or "auto",
        "tools": asked.tools or [],
        "top_p": asked.top_p,
    }


async def _events(answer: Answer, parser: AnswerParser, head: Mapping[str, Any]) -> AsyncIterator[Event]:
    """OpenAI's events, numbered; the last one has the whole response."""
    number = 0
    items = _Items()

    def numbered(event: Event) -> Event:
        nonlocal number
        number += 1
        return {**event, "sequence_number": number - 1}

    def state(kind: str, status: str, **more: Any) -> Event:
        response = {**head, "status": status, "output": list(items.finished), "usage": None, **more}
        return numbered({"type": f"response.{kind}", "response": response})

    yield state("created", "in_progress")
    yield state("in_progress", "in_progress")
    try:
        async for piece in answer:
            for delta in parser.feed(piece.text):
                for event in items.add(delta):
                    yield numbered(event)
    except ApiError as error:  # too late for a status code
        yield state("failed", "failed", error={"code": "server_error", "message": str(error)})
        return
    cut = answer.finish_reason == "length" and not parser.ended
    for delta in await finish(parser):
        for event in items.add(delta):
            yield numbered(event)
    for event in items.end("incomplete" if cut or parser.in_call else "completed"):
        yield numbered(event)
    usage = _usage(answer)
    if cut:
        details = {"reason": "max_output_tokens"}
        yield state("incomplete", "incomplete", incomplete_details=details, usage=usage)
    else:
        yield state("completed", "completed", usage=usage)


def _usage(answer: Answer) -> dict[str, Any]:
    return {
        "input_tokens": answer.prompt_tokens,
        "input_tokens_details": {"cached_tokens": answer.cached_tokens},
        "output_tokens": answer.completion_tokens,
        "total_tokens": answer.prompt_tokens + answer.completion_tokens,
    }


class _Items:
    """The output's items as they grow: a thought, a message, calls of functions.

    Attributes:
        finished: those that have ended.
    """

    def __init__(self) -> None:
        self.finished: list[dict[str, Any]] = []
        self._item: dict[str, Any] | None = None
        self._text = ""
        self._call = -1  # index of the call that is being written

    def add(self, delta: Delta) -> Iterator[Event]:
        if text := delta.get("reasoning_content"):
            yield from self._write("reasoning", text)
        if text := delta.get("content"):
            yield from self._write("message", text)
        if text := delta.get("refusal"):
            yield from self._write("refusal", text)
        for call in delta.get("tool_calls", ()):
            if call["index"] != self._call:
                self._call = call["index"]
                yield from self._begin(
                    {
                        "type": "function_call",
                        "id": f"fc_{uuid.uuid4().hex}",
                        "call_id": call["id"],
                        "name": call["function"]["name"],
                        "arguments": "",
                        "status": "in_progress",
                    }
                )
            if arguments := call["function"].get("arguments"):
                yield self._delta("function_call_arguments", arguments)

    def end(self, status: str = "completed") -> Iterator[Event]:
        """Close what is open."""
        item = self._item
        if item is None:
            return
        if item["type"] == "function_call":
            item["arguments"] = self._text
            yield self._about("function_call_arguments.done", arguments=self._text, name=item["name"])
        else:
            part = item["content"][0]
            said = {_said(part): self._text}
            part |= said
            yield self._about(f"{part['type']}.done", content_index=0, **said, **_logprobs(part))
            yield self._about("content_part.done", content_index=0, part=part)
        item["status"] = status
        yield {"type": "response.output_item.done", "output_index": len(self.finished), "item": item}
        self.finished.append(item)
        self._item = None

    def _write(self, kind: str, text: str) -> Iterator[Event]:
        if self._item is None or self._item["type"] != kind:
            part: dict[str, Any] = {"type": "reasoning_text", "text": ""}
            item = {"type": kind, "id": f"rs_{uuid.uuid4().hex}", "summary": []}
            if kind == "message":
                part = {"type": "output_text", "text": "", "annotations": []}
                item = {"type": kind, "id": f"msg_{uuid.uuid4().hex}", "role": "assistant"}
            elif kind == "refusal":
                part = {"type": kind, "refusal": ""}
                item = {"type": "message", "id": f"msg_{uuid.uuid4().hex}", "role": "assistant"}
            yield from self._begin({**item, "status": "in_progress", "content": []})
            yield self._about("content_part.added", content_index=0, part=dict(part))
            assert self._item is not None
            self._item["content"].append(part)
        part = self._item["content"][0]
        yield self._delta(part["type"], text, content_index=0, **_logprobs(part))

    def _begin(self, item: dict[str, Any]) -> Iterator[Event]:
        yield from self.end()
        self._item, self._text = item, ""
        # A copy: the events are read after the item has grown.
        added = {**item, "content": []} if "content" in item else dict(item)
        yield {"type": "response.output_item.added", "output_index": len(self.finished), "item": added}

    def _delta(self, kind: str, text: str, **more: Any) -> Event:
        self._text += text
        return self._about(f"{kind}.delta", delta=text, **more)

    def _about(self, kind: str, **more: Any) -> Event:
        assert self._item is not None
        where = {"item_id": self._item["id"], "output_index": len(self.finished)}
        return {"type": f"response.{kind}", **where, **more}


def _said(part: Mapping[str, Any]) -> str:
    """The field of a part that has its text."""
    return "refusal" if part["type"] == "refusal" else "text"


def _logprobs(part: Mapping[str, Any]) -> dict[str, Any]:
    return {"logprobs": []} if part["type"] == "output_text" else {}
