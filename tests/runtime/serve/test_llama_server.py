"""llama-server's endpoints beside answers."""

from __future__ import annotations

import json
from typing import Any

import pytest
from qwen_runtime import Model
from tokenizers import Tokenizer

from benchmarks.support.checkpoints import TINY
from tests.support.servers import Server, request

MESSAGES = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "What is assert?"}]


def post(server: Server, path: str, body: Any) -> Any:
    status, _, found = request(server, "POST", path, json.dumps(body).encode())
    return json.loads(found) if status == 200 else (status, json.loads(found)["error"]["message"])


@pytest.mark.parametrize("text", ["", "Hello, world", "中🙂 naïve", "<|im_start|>user\nHi<|im_end|>"])
def test_tokens_are_the_tokenizers_and_come_back(server: Server, text: str) -> None:
    expected = Tokenizer.from_file(str(TINY / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    assert post(server, "/tokenize", {"content": text, "add_special": True}) == {"tokens": expected}
    assert post(server, "/detokenize", {"tokens": expected}) == {"content": text}
    pieces = post(server, "/tokenize", {"content": text, "with_pieces": True})["tokens"]
    assert [piece["id"] for piece in pieces] == expected
    parts = [piece["piece"] for piece in pieces]
    assert (
        b"".join(part.encode() if isinstance(part, str) else bytes(part) for part in parts) == text.encode()
    )
    assert any(isinstance(part, list) for part in parts) == ("中" in text)


def test_what_cannot_be_tokenized(server: Server) -> None:
    assert post(server, "/tokenize", {"content": "x", "parse_special": False}) == (
        400,
        "parse_special: only true is supported",
    )
    assert post(server, "/tokenize", {"content": "\ud800"})[0] == 400
    assert post(server, "/detokenize", {"tokens": [-1]})[0] == 400
    assert post(server, "/detokenize", {"tokens": [2**31 - 1]}) == {"content": ""}


def test_template_is_the_one_that_chat_uses(server: Server, model: Model) -> None:
    found = post(server, "/apply-template", {"messages": MESSAGES})
    assert found == {"prompt": model.apply_chat_template(MESSAGES)}
    thinking = post(server, "/apply-template", {"messages": MESSAGES, "reasoning_effort": "low"})
    assert thinking == {"prompt": model.apply_chat_template(MESSAGES, thinking=True)} != found
    assert post(server, "/apply-template", {"messages": []})[0] == 400


def test_props(server: Server, model: Model) -> None:
    found = json.loads(request(server, "GET", "/props")[2])
    settings = found["default_generation_settings"]
    assert settings["n_ctx"] == model.info.context_length
    assert settings["chat_template_kwargs"] == {"enable_thinking": False}
    assert found["chat_template"] == (TINY / "chat_template.jinja").read_text()
    assert found["modalities"] == {"vision": False, "audio": False}
    assert (found["total_slots"], found["model_alias"]) == (1, model.info.name)
