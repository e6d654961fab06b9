"""Earlier calls of tools and their results, as chat templates take them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pydantic_core import from_json

from qwen_runtime.serve.errors import ApiError
from qwen_runtime.serve.schema.messages import Message
from qwen_runtime.tool_calls.values import without_surrogates


def arguments_of(text: str, at: int) -> dict[str, Any]:
    """The arguments of a call in message `at`, which templates want as an object and OpenAI has as text.

    A call that was cut off has arguments that end anywhere: those that came stay.

    Raises:
        ApiError: they are JSON of something else, or nested too deeply.
    """
    try:
        found = read_arguments(text)
    except RecursionError:
        raise ApiError(
            400, f"messages.{at}.tool_calls: arguments are nested too deeply", parameter="messages"
        ) from None
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ApiError(
            400, f"messages.{at}.tool_calls: arguments are not a JSON object", parameter="messages"
        )
    return found


def in_order_of_calls(messages: Sequence[Message]) -> list[Message]:
    """The messages, with results of tools in the order of their calls: templates write no ids.

    Raises:
        ApiError: a result is of no call.
    """
    calls: dict[str, tuple[int, int]] = {}  # where the call with an id is; the last one where several have it
    ordered: list[Message] = []
    results: list[tuple[tuple[int, int], Message]] = []  # that follow one another
    for at, message in enumerate(messages):
        if message.role == "tool":
            results.append((_call_of(message, at, calls), message))
            continue
        ordered += _sorted(results)
        ordered.append(message)
        results = []
        calls |= {call.id: (at, index) for index, call in enumerate(message.tool_calls or ()) if call.id}
    return ordered + _sorted(results)


def _sorted(results: Sequence[tuple[tuple[int, int], Message]]) -> list[Message]:
    return [message for _, message in sorted(results, key=lambda result: result[0])]


def _call_of(result: Message, at: int, calls: dict[str, tuple[int, int]]) -> tuple[int, int]:
    name = f"messages.{at}.tool_call_id"
    if result.tool_call_id is None:
        raise ApiError(400, f"{name}: missing: it says which call this is the result of", parameter=name)
    if result.tool_call_id not in calls:
        raise ApiError(400, f"{name}: no call before it has the id '{result.tool_call_id}'", parameter=name)
    return calls[result.tool_call_id]


def read_arguments(text: str) -> Any:
    """The value of a call's arguments, JSON that may be cut off; None where nothing can be read.

    Raises:
        RecursionError: it is nested too deeply.
    """
    try:
        found = json.loads(text or "{}", strict=False)
        # Half a surrogate pair can be written in JSON, but no tokenizer takes it.
        return json.loads(without_surrogates(json.dumps(found, ensure_ascii=False)))
    except ValueError:
        pass
    try:
        return from_json(text, allow_partial="trailing-strings")
    except ValueError:
        return None
