"""`/v1/completions`: a prompt continued as it is, without the chat template."""

from __future__ import annotations

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
from qwen_runtime.serve.schema import CompletionRequest, parse


async def completions(request: Request) -> Response:
    engine: Engine = request.app.state.engine
    asked = parse(CompletionRequest, await read_json(request))
    check_model(asked.model, engine)
    prompt = asked.prompt if isinstance(asked.prompt, str) else asked.prompt[0]
    options = {"max_tokens": asked.max_tokens, "sampling": sampling(asked), "stop": asked.stop or ()}
    answer = await while_connected(request, engine.submit(prompt, options))
    head = {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": engine.info.name,
    }
    if asked.stream:
        include_usage = asked.stream_options is not None and asked.stream_options.include_usage
        return EventStream(_chunks(answer, head, include_usage), answer.close)
    with closing(answer):
        return await while_connected(request, _whole(answer, head))


async def _whole(answer: Answer, head: Mapping[str, Any]) -> Response:
    text = "".join([piece.text async for piece in answer])
    return JSONResponse({**head, "choices": [_choice(text, answer)], "usage": usage_of(answer)})


async def _chunks(
    answer: Answer, head: Mapping[str, Any], include_usage: bool
) -> AsyncIterator[dict[str, Any] | None]:
    try:
        async for piece in answer:
            yield {**head, "choices": [_choice(piece.text, None)]}
    except ApiError as error:  # too late for a status code
        yield error.body
        return
    yield {**head, "choices": [_choice("", answer)]}
    if include_usage:
        yield {**head, "choices": [], "usage": usage_of(answer)}
    yield None


def _choice(text: str, ended: Answer | None) -> dict[str, Any]:
    reason = ended.finish_reason if ended else None
    return {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}
