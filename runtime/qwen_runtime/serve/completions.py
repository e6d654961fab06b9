"""`/v1/completions`: prompts continued as they are, without the chat template."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from qwen_runtime.logits import TokenLogprob
from qwen_runtime.request import Request
from qwen_runtime.serve.answers import Answers, variants
from qwen_runtime.serve.common import head_of, plain_request, served_for
from qwen_runtime.serve.errors import ApiError
from qwen_runtime.serve.http import EventStream, read_json, while_connected
from qwen_runtime.serve.schema.base import parse
from qwen_runtime.serve.schema.completions import CompletionRequest
from qwen_runtime.serve.structure import Structure, structure_of

Check = Callable[[str], str | None]


async def completions(http: HttpRequest) -> Response:
    asked = parse(CompletionRequest, await read_json(http))
    served = served_for(http, asked.model)
    structure = await while_connected(http, asyncio.to_thread(structure_of, asked))
    check = (structure.check if structure else None) or (lambda text: None)
    answers = Answers(served, _requests(asked, structure), asked.n)
    head = {**head_of("cmpl", served), "object": "text_completion"}
    await while_connected(http, answers.start())
    if asked.stream:
        chunks = _chunks(answers, check, head, asked.include_usage)
        return EventStream(chunks, answers.close, answers.progress)
    with closing(answers):
        return await while_connected(http, _whole(answers, check, head))


def _requests(asked: CompletionRequest, structure: Structure | None) -> list[Request]:
    """One for each choice; those of a prompt follow one another."""
    requests = [
        replace(
            plain_request(asked, prompt, asked.max_tokens),
            echo=asked.echo,
            guidance=structure.guidance(thinking=False) if structure else None,
            logprobs=asked.logprobs,
        )
        for prompt in asked.prompts
    ]
    return [variant for request in requests for variant in variants(request, asked.n)]


async def _whole(answers: Answers, check: Check, head: Mapping[str, Any]) -> Response:
    choices = []
    async for index, answer in answers:
        pieces = [piece async for piece in answer]
        logprobs = [entry for piece in pieces for entry in piece.logprobs]
        text = "".join(piece.text for piece in pieces)
        choice = _choice(index, text, [*logprobs, *answer.logprobs], answer.finish_reason)
        choices.append({**choice, **await _refusal(check, text)})
    return JSONResponse({**head, "choices": choices, "usage": answers.usage})


async def _chunks(
    answers: Answers, check: Check, head: Mapping[str, Any], include_usage: bool
) -> AsyncIterator[dict[str, Any] | None]:
    try:
        async for index, answer in answers:
            text = ""
            async for piece in answer:
                text += piece.text
                yield {**head, "choices": [_choice(index, piece.text, piece.logprobs)]}
            choice = _choice(index, "", answer.logprobs, answer.finish_reason)
            yield {**head, "choices": [{**choice, **await _refusal(check, text)}]}
    except ApiError as error:  # too late for a status code
        yield error.body
        return
    if include_usage:
        yield {**head, "choices": [], "usage": answers.usage}
    yield None


async def _refusal(check: Check, text: str) -> dict[str, str]:
    """What is wrong with an answer; OpenAI has no field for it here."""
    fault = await asyncio.to_thread(check, text)
    return {"refusal": fault} if fault else {}


def _choice(
    index: int, text: str, logprobs: Sequence[TokenLogprob], finish_reason: str | None = None
) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": _logprobs(logprobs), "finish_reason": finish_reason}


def _logprobs(entries: Sequence[TokenLogprob]) -> dict[str, Any] | None:
    if not entries:
        return None
    return {
        "tokens": [entry.text for entry in entries],
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": [_top(entry) for entry in entries],
        "text_offset": [entry.offset for entry in entries],
    }


def _top(entry: TokenLogprob) -> dict[str, float] | None:
    """Of tokens that look alike, as parts of characters do, the likeliest."""
    if entry.logprob is None:
        return None
    return {other.text: other.logprob for other in reversed(entry.top)}
