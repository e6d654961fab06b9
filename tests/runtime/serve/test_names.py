"""Which names the server's model answers to, on every endpoint that is asked for one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from qwen_runtime import Model

from tests.support.servers import Server, request, serving

MESSAGES = [{"role": "user", "content": "What is assert?"}]
ASKED: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 2},
    "/v1/completions": {"prompt": "The", "max_tokens": 2},
    "/v1/responses": {"input": "The", "max_output_tokens": 2},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 2},
    "/v1/messages/count_tokens": {"messages": MESSAGES},
    "/api/chat": {"messages": MESSAGES, "stream": False, "options": {"num_predict": 2}},
    "/api/generate": {"prompt": "The", "stream": False, "options": {"num_predict": 2}},
    "/api/show": {},
    "/tokenize": {"content": "The"},
    "/detokenize": {"tokens": [1]},
    "/apply-template": {"messages": MESSAGES},
}


def asked(server: Server, path: str, model: str) -> tuple[int, Any]:
    status, _, body = request(server, "POST", path, json.dumps({"model": model, **ASKED[path]}).encode())
    return status, json.loads(body)


@pytest.mark.parametrize("path", ASKED)
def test_any_name_is_answered_with_the_served_one(server: Server, model: Model, path: str) -> None:
    status, found = asked(server, path, "gpt-4o")
    assert status == 200 and found.get("model", model.info.name) == model.info.name
    assert "gpt-4o" not in json.dumps(found)


def test_strict_servers_refuse_other_names(cpu_artifact: Path, model: Model) -> None:
    with serving(cpu_artifact, "--strict-model") as server:
        for path in ASKED:
            status, found = asked(server, path, "gpt-4o")
            assert status == 404, path
            assert f"no model 'gpt-4o': this server has '{model.info.name}'" in json.dumps(found)
            assert asked(server, path, model.info.name)[0] == 200
            tagged = asked(server, path, f"{model.info.name}:latest")[0]  # as Ollama's clients write it
            assert tagged == (200 if path.startswith("/api/") else 404), path
