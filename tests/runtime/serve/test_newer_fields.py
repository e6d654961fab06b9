"""Requests with fields of later versions of an API are answered as without them."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.runtime.serve.test_names import ASKED
from tests.support.servers import Server, request

OF_2030: dict[str, Any] = {"field_of_2030": {"deep": [1, None]}, "another": None}
# Beside that, what is there today and is not obeyed, because nothing of the answer depends on it.
FURTHER: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "store": False, "metadata": {"a": "b"}, "service_tier": "auto", "prompt_cache_key": "a",
        "safety_identifier": "a", "user": "a", "prompt_cache_retention": "24h",
    },
    "/v1/completions": {"user": "a"},
    "/v1/responses": {"store": False, "include": [], "service_tier": "auto", "max_tool_calls": 3},
    "/v1/messages": {"metadata": {"user_id": "a"}, "context_management": {"edits": []}},
    "/api/chat": {"keep_alive": "5m"},
    "/api/generate": {"keep_alive": 0},
}  # fmt: skip
CHANGING = re.compile(r'("(?:id|created|created_at|\w+_duration|item_id)": )("[^"]*"|[\d.]+)')


def answered(server: Server, path: str, body: dict[str, Any]) -> str:
    status, _, found = request(server, "POST", path, json.dumps(body).encode())
    assert status == 200, found
    stable = CHANGING.sub(r"\1_", json.dumps(json.loads(found)))
    return re.sub(r'"(cached_tokens|cache_read_input_tokens|input_tokens)": \d+', "", stable)


@pytest.mark.parametrize("path", [*ASKED, "/v1/embeddings"])
def test_fields_of_later_versions(server: Server, path: str) -> None:
    plain: dict[str, Any] = {"model": "any", **ASKED.get(path, {"input": "The"})}
    if path == "/v1/embeddings":  # the shared artifact has none: the same refusal
        bodies = [
            request(server, "POST", path, json.dumps({**plain, **more}).encode()) for more in ({}, OF_2030)
        ]
        assert bodies[0][0] == bodies[1][0] and bodies[0][2] == bodies[1][2]
        return
    if "options" in plain:
        plain["options"] |= {"temperature": 0}
    elif "prompt" in plain or "input" in plain or "max_tokens" in plain:
        plain["temperature"] = 0
    newer = {**plain, **OF_2030, **FURTHER.get(path, {})}
    if "messages" in newer:
        newer["messages"] = [{**message, **OF_2030} for message in newer["messages"]]
    if "options" in newer:
        newer["options"] = {**newer["options"], **OF_2030}
    expected = answered(server, path, plain)
    assert answered(server, path, newer) == expected


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses", "/api/chat"])
def test_tools_with_fields_of_later_versions(server: Server, path: str) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [5]}}, "required": ["a"]}
    function: Any = {"name": "look", "parameters": schema}
    tool: Any = {"type": "function", "function": {**function, **OF_2030}, **OF_2030}
    if path == "/v1/responses":
        tool = {"type": "function", **function, **OF_2030}
    elif path == "/v1/messages":
        tool = {"name": "look", "input_schema": schema, **OF_2030}
    status, _, found = request(
        server, "POST", path, json.dumps({"model": "any", **ASKED[path], "tools": [tool]}).encode()
    )
    assert status == 200, found
