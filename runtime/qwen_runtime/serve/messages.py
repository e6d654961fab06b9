"""`/v1/messages`: the same answers for Anthropic's clients."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from qwen_runtime.serve import queries
from qwen_runtime.serve.chat import answer_for, finish_reason, request_for
from qwen_runtime.serve.common import served_for
from qwen_runtime.serve.engine import Answer
from qwen_runtime.serve.errors import ApiError
from qwen_runtime.serve.http import EventStream, read_json, while_connected
from qwen_runtime.serve.parser import AnswerParser, Delta, finish
from qwen_runtime.serve.schema.anthropic import CountRequest, MessagesRequest
from qwen_runtime.serve.schema.base import parse
from qwen_runtime.serve.tool_history import read_arguments

Event = dict[str, Any]


async def messages(http: HttpRequest) -> Response:
    asked = parse(MessagesRequest, await read_json(http))
    served = served_for(http, asked.model)
    answer, parser = await while_connected(http, answer_for(asked.as_chat(), served, http.app.state.thinking))
    blocks = _Blocks(told=asked.thinking is None or asked.thinking.display != "omitted")
    events = _events(answer, parser, blocks, served.name)
    if asked.stream:
        return EventStream(events, answer.close, answer.progress)
    with closing(answer):
        return await while_connected(http, _whole(events, blocks))


async def count_tokens(http: HttpRequest) -> Response:
    asked = parse(CountRequest, await read_json(http))
    served = served_for(http, asked.model)
    request, _ = await while_connected(
        http, request_for(asked.as_chat(), served.info, http.app.state.thinking)
    )
    count = await while_connected(http, served.ask(queries.prompt_tokens, request))
    return JSONResponse({"input_tokens": count})


async def _whole(events: AsyncIterator[Event], blocks: _Blocks) -> Response:
    message: Event = {}
    async for event in events:
        if event["type"] == "error":
            raise ApiError(500, event["error"]["message"])
        if event["type"] == "message_start":
            message = dict(event["message"])
        elif event["type"] == "message_delta":
            usage = {**message["usage"], **event["usage"]}
            message = {**message, **event["delta"], "content": blocks.finished, "usage": usage}
    return JSONResponse(message)


async def _events(answer: Answer, parser: AnswerParser, blocks: _Blocks, model: str) -> AsyncIterator[Event]:
    """Anthropic's events, in their order."""
    message: Event = {
        "id": f"msg_{uuid.uuid4().hex}",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {
            "input_tokens": answer.prompt_tokens - answer.cached_tokens,
            "cache_read_input_tokens": answer.cached_tokens,
            "cache_creation_input_tokens": 0,
            "output_tokens": 0,
        },
    }
    yield {"type": "message_start", "message": message}
    yield {"type": "ping"}
    try:
        async for piece in answer:
            for delta in parser.feed(piece.text):
                for event in blocks.add(delta):
                    yield event
    except ApiError as error:  # too late for a status code
        yield error.anthropic_body
        return
    for delta in await finish(parser):
        for event in blocks.add(delta):
            yield event
    for event in blocks.end():
        yield event
    yield {
        "type": "message_delta",
        "delta": _ending(answer, parser),
        "usage": {"output_tokens": answer.completion_tokens},
    }
    yield {"type": "message_stop"}


def _ending(answer: Answer, parser: AnswerParser) -> Event:
    """Why the answer ended. One that does not match its schema counts as refused, as with Anthropic."""
    ending: Event = {"stop_reason": _stop_reason(answer, parser), "stop_sequence": answer.stop_string}
    if fault := parser.message.get("refusal"):
        ending["stop_reason"] = "refusal"
        ending["stop_details"] = {"type": "refusal", "category": None, "explanation": fault}
    return ending


def _stop_reason(answer: Answer, parser: AnswerParser) -> str:
    reason = finish_reason(answer, parser)
    if reason == "stop":
        return "end_turn" if answer.stop_string is None else "stop_sequence"
    return {"tool_calls": "tool_use", "length": "max_tokens"}.get(reason, reason)


class _Blocks:
    """The answer's content blocks as they grow: thoughts, texts, calls of tools.

    Args:
        told: whether thoughts are shown.

    Attributes:
        finished: those that have ended.
    """

    def __init__(self, told: bool) -> None:
        self.finished: list[dict[str, Any]] = []
        self._told = told
        self._block: dict[str, Any] | None = None
        self._text = ""
        self._call = -1  # index of the call that is being written

    def add(self, delta: Delta) -> Iterator[Event]:
        if text := delta.get("reasoning_content"):
            yield from self._begin({"type": "thinking", "thinking": "", "signature": ""})
            self._text += text
            if self._told:
                yield self._delta("thinking_delta", thinking=text)
        if text := delta.get("content"):
            yield from self._begin({"type": "text", "text": ""})
            self._text += text
            yield self._delta("text_delta", text=text)
        for call in delta.get("tool_calls", ()):
            if call["index"] != self._call:
                yield from self.end()
                self._call = call["index"]
                name = call["function"]["name"]
                yield from self._begin({"type": "tool_use", "id": call["id"], "name": name, "input": {}})
            if arguments := call["function"].get("arguments"):
                self._text += arguments
                yield self._delta("input_json_delta", partial_json=arguments)

    def end(self) -> Iterator[Event]:
        """Close what is open."""
        block = self._block
        if block is None:
            return
        if block["type"] == "thinking":
            block["thinking"] = self._text if self._told else ""
            # Clients leave out thoughts without one. Nobody checks it: a thought that comes back is a text.
            block["signature"] = hashlib.sha256(self._text.encode()).hexdigest()
            yield self._delta("signature_delta", signature=block["signature"])
        elif block["type"] == "text":
            block["text"] = self._text
        else:
            block["input"] = read_arguments(self._text) or {}  # what came of those that were cut off
        yield {"type": "content_block_stop", "index": len(self.finished)}
        self.finished.append(block)
        self._block = None

    def _begin(self, block: dict[str, Any]) -> Iterator[Event]:
        """Go on with the open block if it is of the same kind."""
        if self._block is not None and self._block["type"] == block["type"]:
            return
        yield from self.end()
        self._block, self._text = block, ""
        # A copy: the event is read after the block has grown.
        yield {"type": "content_block_start", "index": len(self.finished), "content_block": dict(block)}

    def _delta(self, kind: str, **more: str) -> Event:
        return {
            "type": "content_block_delta",
            "index": len(self.finished),
            "delta": {"type": kind, **more},
        }
