"""`/v1/chat/completions`: messages to an answer, whole or in pieces."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from qwen_runtime.grammar import make_guidance
from qwen_runtime.guidance import Guidance
from qwen_runtime.info import ModelInfo
from qwen_runtime.logits import Candidate, TokenLogprob
from qwen_runtime.request import Request
from qwen_runtime.serve.answers import Answers, variants
from qwen_runtime.serve.begun import begun
from qwen_runtime.serve.common import head_of, plain_request, served_for
from qwen_runtime.serve.engine import Answer
from qwen_runtime.serve.errors import ApiError
from qwen_runtime.serve.http import EventStream, read_json, while_connected
from qwen_runtime.serve.parser import AnswerParser, finish
from qwen_runtime.serve.schema.base import parse
from qwen_runtime.serve.schema.chat import ChatRequest
from qwen_runtime.serve.schema.messages import (
    Content,
    ImagePart,
    Message,
    NamedTool,
)
from qwen_runtime.serve.served import Served
from qwen_runtime.serve.structure import Structure, structure_of
from qwen_runtime.serve.tool_check import Check, held_to_schemas
from qwen_runtime.serve.tool_history import arguments_of, in_order_of_calls
from qwen_runtime.template import begins_thought
from qwen_runtime.tool_calls.registry import DEFAULT


async def chat_completions(http: HttpRequest) -> Response:
    asked = parse(ChatRequest, await read_json(http))
    served = served_for(http, asked.model)
    request, parser = await while_connected(http, request_for(asked, served.info, http.app.state.thinking))
    answers = Answers(served, variants(request, asked.n), asked.n)
    await while_connected(http, answers.start())
    head = head_of("chatcmpl", served)
    if asked.stream:
        chunks = _chunks(answers, parser, head, asked.include_usage)
        return EventStream(chunks, answers.close, answers.progress)
    with closing(answers):
        return await while_connected(http, _whole(answers, parser, head))


async def answer_for(
    asked: ChatRequest, served: Served, thinking_default: bool
) -> tuple[Answer, AnswerParser]:
    """The answer, whose prompt was accepted, and what takes its text apart.

    Raises:
        ApiError: the request cannot be obeyed, or has to wait for too many others.
    """
    request, parser = await request_for(asked, served.info, thinking_default)
    return await served.submit(request), parser


async def request_for(
    asked: ChatRequest, info: ModelInfo, thinking_default: bool, raw: str | None = None
) -> tuple[Request, AnswerParser]:
    """What the model is asked, and what takes its answer apart.

    Args:
        raw: the prompt, where it is not what the chat template makes of the messages.

    Raises:
        ApiError: the request cannot be obeyed.
    """
    # In a thread, for to check a large schema takes seconds.
    return await asyncio.to_thread(_request_for, asked, info, thinking_default, raw)


def _request_for(
    asked: ChatRequest, info: ModelInfo, thinking_default: bool, raw: str | None
) -> tuple[Request, AnswerParser]:
    template_kwargs = _template_kwargs(asked, thinking_default)
    start = begun(asked, template_kwargs["enable_thinking"])
    template_kwargs["enable_thinking"] = start.thinking
    if start or asked.add_generation_prompt is False:
        template_kwargs["add_generation_prompt"] = bool(start)
    structure = structure_of(asked)
    if start and structure:
        raise ApiError(400, "messages: an answer that is begun can have no other form", parameter="messages")
    ordered = in_order_of_calls(start.messages)
    messages = [_for_template(message, at) for at, message in enumerate(ordered)]
    told = (
        []
        if asked.tool_choice == "none"
        else [tool.model_dump(exclude_unset=True) for tool in asked.tools or ()]
    )
    opened = raw is None and begins_thought(info.templates, messages, told, template_kwargs)
    in_thought = start.in_thought(opened)
    guidance, call_checks = _held(asked, told, structure, in_thought, info.dialect)
    request = replace(
        plain_request(
            asked, messages if raw is None else raw, asked.max_completion_tokens or asked.max_tokens
        ),
        thinking=start.thinking,
        begun=start.text(opened),
        template_kwargs=template_kwargs,
        tools=told,
        guidance=guidance,
        logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
        prediction=asked.prediction.text if asked.prediction else "",
    )
    check = structure.check if structure else None
    dialect = info.dialect or DEFAULT
    return request, AnswerParser(in_thought, told, _several(asked), check, call_checks, dialect)


async def _whole(answers: Answers, first: AnswerParser, head: Mapping[str, Any]) -> Response:
    choices = []
    async for index, answer in answers:
        parser = first.fresh()
        logprobs: list[TokenLogprob] = []
        async for piece in answer:
            parser.feed(piece.text)
            logprobs += piece.logprobs
        await finish(parser)
        choice = {
            "index": index,
            "message": parser.message,
            "logprobs": _logprobs([*logprobs, *answer.logprobs]),
            "finish_reason": finish_reason(answer, parser),
        }
        choices.append(choice)
    return JSONResponse({**head, "object": "chat.completion", "choices": choices, "usage": answers.usage})


async def _chunks(
    answers: Answers, first: AnswerParser, head: Mapping[str, Any], include_usage: bool
) -> AsyncIterator[dict[str, Any] | None]:
    head = {**head, "object": "chat.completion.chunk"}
    try:
        async for index, answer in answers:
            async for choice in _deltas(answer, first.fresh()):
                yield {**head, "choices": [{"index": index, **choice}]}
    except ApiError as error:  # too late for a status code
        yield error.body
        return
    if include_usage:
        yield {**head, "choices": [], "usage": answers.usage}
    yield None


async def _deltas(answer: Answer, parser: AnswerParser) -> AsyncIterator[dict[str, Any]]:
    """The choices of one answer's chunks."""
    untold: list[TokenLogprob] = []  # of text that the parser still holds back

    def choice(delta: Mapping[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        logprobs = _logprobs(untold)
        untold.clear()
        return {"delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}

    yield choice({"role": "assistant", "content": ""})
    async for piece in answer:
        untold += piece.logprobs
        for delta in parser.feed(piece.text):
            yield choice(delta)
    untold += answer.logprobs
    for delta in await finish(parser):
        yield choice(delta)
    yield choice({}, finish_reason(answer, parser))


def _logprobs(entries: Sequence[TokenLogprob]) -> dict[str, Any] | None:
    def token(entry: TokenLogprob | Candidate) -> dict[str, Any]:
        return {"token": entry.text, "logprob": entry.logprob, "bytes": list(entry.raw)}

    if not entries:
        return None
    content = [{**token(entry), "top_logprobs": [token(other) for other in entry.top]} for entry in entries]
    return {"content": content, "refusal": None}


def _held(
    asked: ChatRequest,
    tools: list[dict[str, Any]],
    structure: Structure | None,
    thinking: bool,
    dialect: str | None,
) -> tuple[Guidance | None, Mapping[str, Check]]:
    """What the answer is held to, and checks of what it calls.

    Args:
        tools: those that the model is told of.
    """
    choice = asked.tool_choice
    callable_ = tools
    if isinstance(choice, NamedTool):
        callable_ = [tool for tool in tools if tool["function"]["name"] == choice.function.name]
        if not callable_:
            raise ApiError(400, f"no tool '{choice.function.name}' in tools", parameter="tool_choice")
    if choice == "required" and not tools:
        raise ApiError(400, "tool_choice is 'required', but there are no tools", parameter="tool_choice")
    forced = choice == "required" or isinstance(choice, NamedTool)
    held, checks = held_to_schemas(callable_, every=forced or structure is not None)
    if not forced and structure is None:
        if not checks:
            return None, checks
        return make_guidance(thinking=thinking, tools=held, forced=False, dialect=dialect), checks
    answer = None if forced else structure
    guidance = make_guidance(
        thinking=thinking,
        schema=answer.schema if answer else None,
        tools=held,
        several=_several(asked),
        regex=answer.regex if answer else None,
        choices=answer.choices if answer else (),
        dialect=dialect,
    )
    return guidance, checks


def _several(asked: ChatRequest) -> bool:
    """Whether the answer may be more than one call."""
    return asked.parallel_tool_calls is not False and not isinstance(asked.tool_choice, NamedTool)


def finish_reason(answer: Answer, parser: AnswerParser) -> str:
    """ "tool_calls" promises arguments that can be read, which a stop string may have cut off."""
    whole = answer.finish_reason == "stop" or parser.ended
    called = whole and parser.calls and not parser.in_call
    return "tool_calls" if called else answer.finish_reason


def _template_kwargs(asked: ChatRequest, thinking_default: bool) -> dict[str, Any]:
    """Variables for the chat template, `enable_thinking` among them.

    Those of `chat_template_kwargs` come first, as they are. An effort of "none" only turns thinking off: no
    template knows the word.
    """
    found = dict(asked.chat_template_kwargs or {})
    effort = asked.reasoning_effort or (asked.reasoning.effort if asked.reasoning else None)
    effort = found.get("reasoning_effort", effort)
    if effort not in (None, "none"):
        found["reasoning_effort"] = effort
    thinking = found.get("enable_thinking")
    if thinking is None:
        thinking = asked.enable_thinking
    if thinking is None and asked.thinking is not None:
        thinking = asked.thinking.type == "enabled"
    if thinking is None:
        thinking = thinking_default if effort is None else effort != "none"
    return {**found, "enable_thinking": thinking}


def _for_template(message: Message, at: int) -> dict[str, Any]:
    """`message` as the chat template takes it."""
    found: dict[str, Any] = {
        "role": message.role,
        "content": _content(message.content),
    }
    if message.reasoning_content is not None:
        found["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        found["tool_calls"] = [
            {
                "type": "function",
                "function": {
                    "name": call.function.name,
                    "arguments": arguments_of(call.function.arguments, at),
                },
            }
            for call in message.tool_calls
        ]
    return found


def _content(content: Content | None) -> str | list[dict[str, Any]]:
    """As text where it is only that, for there are templates that take nothing else."""
    if content is None or isinstance(content, str):
        return content or ""
    parts = [part.model_dump() for part in content]
    if any(isinstance(part, ImagePart) for part in content):
        return parts
    return "".join(part["text"] for part in parts)
