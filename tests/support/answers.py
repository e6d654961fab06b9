"""Answers as models write them, and read as the server does."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from qwen_runtime.serve.parser import AnswerParser


def call(name: str, body: str) -> str:
    return f"<tool_call>\n<function={name}>\n{body}</function>\n</tool_call>"


def argument(name: str, value: str) -> str:
    return f"<parameter={name}>\n{value}\n</parameter>\n"


def hermes_call(name: str, arguments: str) -> str:
    """In the dialect of `tool_calls.hermes`."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def pieces(text: str, size: int) -> list[str]:
    return [text[at : at + size] for at in range(0, len(text), size)]


def read_answer(
    pieces: Iterable[str], thinking: bool = False, tools: Any = (), **more: Any
) -> dict[str, Any]:
    """The message, after a check that the deltas add up to it."""
    parser = AnswerParser(thinking, tools, **more)
    deltas = [delta for piece in pieces for delta in parser.feed(piece)]
    deltas += parser.finish()
    total: dict[str, Any] = {"role": "assistant", "content": None}
    for delta in deltas:
        for key in delta.keys() - {"tool_calls"}:
            total[key] = (total.get(key) or "") + delta[key]
        for made in delta.get("tool_calls", ()):
            calls = total.setdefault("tool_calls", [])
            if made["index"] == len(calls):
                calls.append({**made, "function": {**made["function"]}})
                del calls[-1]["index"]
            else:
                calls[made["index"]]["function"]["arguments"] += made["function"]["arguments"]
    assert total == parser.message
    return total


def calls_of(message: dict[str, Any]) -> list[tuple[str, Any]]:
    return [
        (made["function"]["name"], json.loads(made["function"]["arguments"]))
        for made in message.get("tool_calls", ())
    ]
