"""`/v1/completions`: a prompt continued as it is, without the chat template."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import closing
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from qwen_runtime.logits import TokenLogprob
from qwen_runtime.request import Request
from qwen_runtime.serve.common import engine_for, sampling, usage_of
from qwen_runtime.serve.engine import Answer
from qwen_runtime.serve.errors import ApiError
from qwen_runtime.serve.http import EventStream, read_json, while_connected
from qwen_runtime.serve.schema.base import parse
from qwen_runtime.serve.schema.completions import CompletionRequest


async def completions(http: HttpRequest) -> Response:
    asked = parse(CompletionRequest, await read_json(http))
    engine = engine_for(http, asked.model)
    prompt = asked.prompt if isinstance(asked.prompt, str) else asked.prompt[0]
    request = Request(
        prompt=prompt,
        max_tokens=asked.max_tokens,
        sampling=sampling(asked),
        stop=asked.stops,
        logprobs=asked.logprobs,
    )
    answer = await while_connected(http, engine.submit(request))
    head = {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": engine.info.name,
    }
    if asked.stream:
        return EventStream(_chunks(answer, head, asked.include_usage), answer.close)
    with closing(answer):
        return await while_connected(http, _whole(answer, head))


async def _whole(answer: Answer, head: Mapping[str, Any]) -> Response:
    pieces = [piece async for piece in answer]
    logprobs = [entry for piece in pieces for entry in piece.logprobs]
    choice = {
        "index": 0,
        "text": "".join(piece.text for piece in pieces),
        "logprobs": _logprobs([*logprobs, *answer.logprobs]),
        "finish_reason": answer.finish_reason,
    }
    return JSONResponse({**head, "choices": [choice], "usage": usage_of(answer)})


async def _chunks(
    answer: Answer, head: Mapping[str, Any], include_usage: bool
) -> AsyncIterator[dict[str, Any] | None]:
    def chunk(
        text: str, logprobs: Sequence[TokenLogprob], finish_reason: str | None = None
    ) -> dict[str, Any]:
        choice = {
            "index": 0,
            "text": text,
            "logprobs": _logprobs(logprobs),
            "finish_reason": finish_reason,
        }
        return {**head, "choices": [choice]}

    try:
        async for piece in answer:
            yield chunk(piece.text, piece.logprobs)
    except ApiError as error:  # too late for a status code
        yield error.body
        return
    yield chunk("", answer.logprobs, answer.finish_reason)
    if include_usage:
        yield {**head, "choices": [], "usage": usage_of(answer)}
    yield None


def _logprobs(entries: Sequence[TokenLogprob]) -> dict[str, Any] | None:
    if not entries:
        return None
    return {
        "tokens": [entry.text for entry in entries],
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": [dict(entry.top) for entry in entries],
        "text_offset": [entry.offset for entry in entries],
    }
