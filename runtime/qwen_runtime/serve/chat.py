"""`/v1/chat/completions`: messages to an answer, whole or in pieces."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import closing
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from qwen_runtime.serve.common import check_model, sampling, usage_of
from qwen_runtime.serve.engine import Answer, Engine
from qwen_runtime.serve.errors import ApiError
from qwen_runtime.serve.http import EventStream, read_json, while_connected
from qwen_runtime.serve.parser import AnswerParser
from qwen_runtime.serve.schema import ChatRequest, Content, ImagePart, Message, parse


async def chat_completions(request: Request) -> Response:
    engine: Engine = request.app.state.engine
    asked = parse(ChatRequest, await read_json(request))
    check_model(asked.model, engine)
    thinking = _thinking(asked, request.app.state.thinking)
    options = {
        "max_tokens": asked.max_completion_tokens or asked.max_tokens,
        "sampling": sampling(asked),
        "stop": asked.stop or (),
        "thinking": thinking,
    }
    messages = [_for_template(message, at) for at, message in enumerate(asked.messages)]
    answer = await while_connected(request, engine.submit(messages, options))
    parser = AnswerParser(thinking)
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": engine.info.name}
    if asked.stream:
        include_usage = asked.stream_options is not None and asked.stream_options.include_usage
        return EventStream(_chunks(answer, parser, head, include_usage), answer.close)
    with closing(answer):
        return await while_connected(request, _whole(answer, parser, head))


async def _whole(answer: Answer, parser: AnswerParser, head: Mapping[str, Any]) -> Response:
    async for piece in answer:
        parser.feed(piece.text)
    parser.finish()
    choice = {
        "index": 0,
        "message": parser.message,
        "logprobs": None,
        "finish_reason": _finish_reason(answer, parser),
    }
    return JSONResponse({**head, "object": "chat.completion", "choices": [choice], "usage": usage_of(answer)})


async def _chunks(
    answer: Answer, parser: AnswerParser, head: Mapping[str, Any], include_usage: bool
) -> AsyncIterator[dict[str, Any] | None]:
    def chunk(delta: Mapping[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**head, "object": "chat.completion.chunk", "choices": [choice]}

    yield chunk({"role": "assistant", "content": ""})
    try:
        async for piece in answer:
            for delta in parser.feed(piece.text):
                yield chunk(delta)
    except ApiError as error:  # too late for a status code
        yield error.body
        return
    for delta in parser.finish():
        yield chunk(delta)
    yield chunk({}, _finish_reason(answer, parser))
    if include_usage:
        yield {**head, "object": "chat.completion.chunk", "choices": [], "usage": usage_of(answer)}
    yield None


def _finish_reason(answer: Answer, parser: AnswerParser) -> str:
    called = answer.finish_reason == "stop" and "tool_calls" in parser.message
    return "tool_calls" if called else answer.finish_reason


def _thinking(asked: ChatRequest, default: bool) -> bool:
    if asked.chat_template_kwargs is not None and asked.chat_template_kwargs.enable_thinking is not None:
        return asked.chat_template_kwargs.enable_thinking
    return default if asked.reasoning_effort is None else asked.reasoning_effort != "none"


def _for_template(message: Message, at: int) -> dict[str, Any]:
    """`message` as the chat template takes it."""
    found: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": _text(message.content),
    }
    if message.reasoning_content is not None:
        found["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        found["tool_calls"] = [
            {"name": call.function.name, "arguments": _arguments(call.function.arguments, at)}
            for call in message.tool_calls
        ]
    return found


def _arguments(text: str, at: int) -> dict[str, Any]:
    try:
        arguments = json.loads(text or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise ApiError(
            400, f"messages.{at}.tool_calls: arguments are not a JSON object", parameter="messages"
        )
    return arguments


def _text(content: Content | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if any(isinstance(part, ImagePart) for part in content):
        raise ApiError(400, "this model does not take images", parameter="messages")
    return "".join(part.text for part in content if not isinstance(part, ImagePart))
