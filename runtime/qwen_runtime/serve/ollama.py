"""`/api/chat` and `/api/generate`: the same answers for Ollama's clients."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from qwen_runtime.request import Request
from qwen_runtime.serve.chat import request_for
from qwen_runtime.serve.common import served_for
from qwen_runtime.serve.engine import Answer
from qwen_runtime.serve.errors import ApiError
from qwen_runtime.serve.http import JsonLines, read_json, while_connected
from qwen_runtime.serve.parser import AnswerParser, Call, Delta, finish
from qwen_runtime.serve.schema.base import parse
from qwen_runtime.serve.schema.ollama import AnswerRequest, GenerateRequest, OllamaChatRequest
from qwen_runtime.serve.served import Served
from qwen_runtime.serve.tool_history import read_arguments

Line = dict[str, Any]
# What was said, in the shape of an endpoint.
Shape = Callable[[Line], Line]


async def chat(http: HttpRequest) -> Response:
    asked = parse(OllamaChatRequest, await read_json(http, undeclared=True))
    served = served_for(http, asked.model)
    if not asked.messages:
        return _loaded(asked, served, _as_message)
    request, parser = await while_connected(
        http, request_for(asked.as_chat(), served.info, http.app.state.thinking)
    )
    return await _answered(http, served, request, parser, asked.stream, _as_message)


async def generate(http: HttpRequest) -> Response:
    asked = parse(GenerateRequest, await read_json(http, undeclared=True))
    served = served_for(http, asked.model)
    if not asked.prompt and not asked.images:
        return _loaded(asked, served, _as_response)
    if asked.raw and (asked.images or asked.system or asked.think):
        raise ApiError(400, "raw: a raw prompt has no images, no system and no think beside it")
    thinking = http.app.state.thinking and not asked.raw
    raw = asked.prompt if asked.raw else None
    request, parser = await while_connected(http, request_for(asked.as_chat(), served.info, thinking, raw))
    return await _answered(http, served, request, parser, asked.stream, _as_response)


def _as_message(said: Line) -> Line:
    return {"message": {"role": "assistant", "content": "", **said}}


def _as_response(said: Line) -> Line:
    return {
        "response": said.get("content", ""),
        **({"thinking": said["thinking"]} if "thinking" in said else {}),
    }


def _loaded(asked: AnswerRequest, served: Served, shape: Shape) -> Response:
    """The model is in memory already, and stays there."""
    reason = "unload" if asked.keep_alive in (0, "0") else "load"
    return JSONResponse({**_head(served), **shape({}), "done": True, "done_reason": reason})


def _head(served: Served) -> Line:
    return {"model": served.name, "created_at": datetime.now(UTC).isoformat()}


async def _answered(
    http: HttpRequest, served: Served, request: Request, parser: AnswerParser, stream: bool, shape: Shape
) -> Response:
    begun = time.monotonic_ns()
    answer = await while_connected(http, served.submit(request))
    lines = answer_lines(answer, parser, begun)
    if stream:
        return JsonLines(_shaped(lines, served, shape), answer.close)
    with closing(answer):
        return await while_connected(http, _whole(lines, served, shape))


async def _shaped(
    lines: AsyncIterator[tuple[Line, Line]], served: Served, shape: Shape
) -> AsyncIterator[Line]:
    try:
        async for said, more in lines:
            yield {**_head(served), **shape(said), "done": False, **more}
    except ApiError as error:  # too late for a status code
        yield error.ollama_body


async def _whole(lines: AsyncIterator[tuple[Line, Line]], served: Served, shape: Shape) -> Response:
    whole: Line = {}
    figures: Line = {}
    async for said, more in lines:
        figures |= more
        for kind, value in said.items():
            whole[kind] = whole[kind] + value if kind in whole else value
    return JSONResponse({**_head(served), **shape(whole), **figures})


async def answer_lines(answer: Answer, parser: AnswerParser, begun: int) -> AsyncIterator[tuple[Line, Line]]:
    """What is said in each line, and what else stands in it: the figures in the last one."""
    told = 0  # calls
    first = 0

    def said(deltas: list[Delta]) -> Line:
        """A call is told when it is whole; one that was cut off is not told."""
        nonlocal told
        line: Line = {}
        for delta in deltas:
            for kind, name in (("content", "content"), ("reasoning_content", "thinking")):
                if kind in delta:
                    line[name] = line.get(name, "") + delta[kind]
        whole = len(parser.calls) - parser.in_call
        if whole > told:
            line["tool_calls"] = [_call(parser.calls[at], at) for at in range(told, whole)]
            told = whole
        return line

    async for piece in answer:
        first = first or time.monotonic_ns()
        if line := said(parser.feed(piece.text)):
            yield line, {}
    if line := said(await finish(parser)):
        yield line, {}
    if fault := parser.message.get(
        "refusal"
    ):  # it does not match its schema, and there is no other word for it
        raise ApiError(422, fault)
    end = time.monotonic_ns()
    yield (
        {},
        {
            "done": True,
            "done_reason": answer.finish_reason,
            "total_duration": end - begun,
            "load_duration": 0,
            "prompt_eval_count": answer.prompt_tokens,
            "prompt_eval_duration": (first or end) - begun,
            "eval_count": answer.completion_tokens,
            "eval_duration": end - (first or end),
        },
    )


def _call(call: Call, index: int) -> Line:
    arguments = read_arguments("".join(call.arguments)) or {}
    return {"id": call.id, "function": {"index": index, "name": call.name, "arguments": arguments}}
