"""What llama-server's own tests ask of it, in our words, and what this server does.

Read from `tools/server/tests/unit` of ggml-org/llama.cpp, November 2026: chat completions, completions,
response formats, security, basics, tokens, templates, responses. Left out is what tests its command line,
slots on disk, LoRA, its router, its built-in tools, and other models (speculative decoding, audio, reranking,
vision), and what our tests of embeddings, Anthropic's interface and images have already.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

SAME, REFUSED, OTHERWISE = "same", "refused on purpose", "otherwise"
Outcome = Literal["same", "refused on purpose", "otherwise"]
Check = Callable[[Any], bool]

CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
TALK = [{"role": "system", "content": "Book"}, {"role": "user", "content": "What is the best book"}]
MEANING = "I believe the meaning of life is"


@dataclass(frozen=True)
class Case:
    """A request and what has to come of it.

    Attributes:
        what: in a few words.
        check: of the answer's JSON, or of the list of a stream's events.
        outcome: OTHERWISE is answered in another way than there, `why` says in which.
    """

    what: str
    path: str
    body: dict[str, Any] | None
    check: Check = bool
    status: int = 200
    outcome: Outcome = SAME
    why: str = ""
    headers: dict[str, str] = field(default_factory=dict)


_USUAL = {"max_tokens": 8, "temperature": 0}


def chat(what: str, body: dict[str, Any], check: Check = bool, *more: Any, **further: Any) -> Case:
    return Case(what, CHAT, {**_USUAL, "messages": TALK, **body}, check, *more, **further)


def text(what: str, body: dict[str, Any], check: Check = bool, *more: Any, **further: Any) -> Case:
    return Case(what, TEXT, {**_USUAL, "prompt": MEANING, **body}, check, *more, **further)


def refused(case: Case, why: str) -> Case:
    return Case(case.what, case.path, case.body, _is_error, 400, REFUSED, why)


def _is_error(found: Any) -> bool:
    return bool(found["error"]["message"])


def _said(found: Any) -> str:
    return found["choices"][0]["message"]["content"] or ""


def _cut(found: Any) -> bool:
    return found["choices"][0]["finish_reason"] == "length" and found["usage"]["completion_tokens"] == 8


def _matches(pattern: str) -> Check:
    return lambda found: re.search(pattern, _said(found)) is not None


def _streamed(events: Any) -> bool:
    """One id, the role first and only there, the reason for the end last."""
    choices = [event["choices"][0] for event in events if event["choices"]]
    return (
        len({event["id"] for event in events}) == 1
        and choices[0]["delta"]["role"] == "assistant"
        and all("role" not in choice["delta"] for choice in choices[1:])
        and [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["length"]
    )


def _with_usage(events: Any) -> bool:
    return _streamed(events) and events[-1]["usage"]["completion_tokens"] == 8


def _logprobs(found: Any) -> bool:
    entries = found["choices"][0]["logprobs"]["content"]
    return "".join(entry["token"] for entry in entries) == _said(found) and all(
        entry["logprob"] <= 0 and entry["bytes"] and len(entry["top_logprobs"]) == 10 for entry in entries
    )


def _streamed_logprobs(events: Any) -> bool:
    choices = [event["choices"][0] for event in events]
    told = [entry["token"] for c in choices if c["logprobs"] for entry in c["logprobs"]["content"]]
    return "".join(told) == "".join(c["delta"].get("content") or "" for c in choices)


def _too_long(found: Any) -> bool:
    error = found["error"]
    return error["n_prompt_tokens"] > error["n_ctx"] and error["code"] == "context_length_exceeded"


def _format(form: Any) -> dict[str, Any]:
    return {"response_format": form, "max_tokens": 30}


def _message_errors() -> list[Case]:
    wrong: dict[str, Any] = {
        "no messages": None,
        "messages that are a text": "string",
        "a message that is a number": [123],
        "a message without anything": [{}],
        "a role that is a number": [{"role": 123}],
        "a content that is a number": [{"role": "system", "content": 123}],
        "a second message without anything": [{"role": "system", "content": "test"}, {}],
    }
    return [Case(what, CHAT, {"messages": found}, _is_error, 400) for what, found in wrong.items()]


def _ends_with(*ends: str) -> Check:
    return lambda found: found["prompt"].endswith(ends)


def _answer_text(found: Any) -> bool:
    return any(item["type"] == "message" for item in found["output"])


_LONG = {"messages": [{"role": "user", "content": "What is the best book? " * 3000}]}
_NO_GBNF = "GBNF is not read: give guided_regex, guided_choice or a JSON schema"
_NO_NATIVE = "llama-server's own endpoint: /v1/completions has the same"
_NO_FILES = "no file is opened for a request"
_NO_FETCH = "nothing is fetched for a request"


def _image(url: str) -> dict[str, Any]:
    parts = [{"type": "text", "text": "test"}, {"type": "image_url", "image_url": {"url": url}}]
    return {"messages": [{"role": "user", "content": parts}]}


CASES = [
    # Chats
    chat("a chat", {}, lambda found: _cut(found) and "cmpl" in found["id"]),
    chat("a name of another model", {"model": "codellama70b"}, _cut),
    chat(
        "a message in two parts",
        {"messages": [TALK[0], {"role": "user", "content": [{"type": "text", "text": "a"}] * 2}]},
        _cut,
    ),
    chat(
        "128 tokens",
        {"max_tokens": 128, "ignore_eos": True},
        lambda f: f["usage"]["completion_tokens"] == 128,
    ),
    chat("a stream", {"stream": True}, _streamed),
    chat("a stream of 128 tokens", {"stream": True, "max_tokens": 128}, _streamed),
    chat("a stream with usage", {"stream": True, "stream_options": {"include_usage": True}}, _with_usage),
    chat("a fingerprint", {}, lambda found: bool(found["system_fingerprint"])),
    chat("a seed and a temperature", {"seed": 42, "temperature": 0.8}, _cut),
    chat("an answer that is begun", {"messages": [*TALK, {"role": "assistant", "content": "Whill"}]}, _cut),
    chat(
        "an answer that is begun, in parts",
        {"messages": [*TALK, {"role": "assistant", "content": [{"type": "text", "text": "Wh"}] * 2}]},
        _cut,
    ),
    chat("two choices", {"n": 2}, lambda found: len(found["choices"]) == 2),
    chat("log probabilities", {"logprobs": True, "top_logprobs": 10}, _logprobs),
    chat(
        "log probabilities in a stream",
        {"logprobs": True, "top_logprobs": 10, "stream": True},
        _streamed_logprobs,
    ),
    chat("bias against tokens", {"logit_bias": {"10": -100, "11": -100}}, _cut),
    chat("a prompt that is too long", _LONG, _too_long, 400),
    chat("a prompt that is too long, as a stream", {**_LONG, "stream": True}, _too_long, 400),
    *_message_errors(),
    chat(
        "two messages of the assistant at the end",
        {"messages": [TALK[1], *[{"role": "assistant", "content": "test"}] * 2]},
        _cut,
        outcome=OTHERWISE,
        why="answered: the last one is begun",
    ),
    chat(
        "speed of every token",
        {"stream": True, "timings_per_token": True},
        lambda events: "timings" not in events[-1],
        outcome=OTHERWISE,
        why="the field is ignored: /metrics and the client's clock have it",
    ),
    chat(
        "progress of the prompt in the stream",
        {"stream": True, "return_progress": True},
        _streamed,
        outcome=OTHERWISE,
        why="the field is ignored: /slots tells it",
    ),
    # Forms of answers
    chat("a constant", _format({"type": "json_object", "schema": {"const": "42"}}), _matches('^"42"$')),
    chat(
        "a list of draft 7",
        _format({"type": "json_object", "schema": {"items": [{"type": "integer"}]}}),
        lambda found: bool(_said(found)),
    ),
    chat(
        "a schema by name",
        _format({"type": "json_schema", "json_schema": {"schema": {"const": "foooooo"}}}),
        _matches('^"foooooo"$'),
    ),
    chat("any object", _format({"type": "json_object"}), _matches(r"^\{")),
    chat("a form that there is not", _format({"type": "sound"}), _is_error, 400),
    chat("a schema that is a number", _format({"type": "json_object", "schema": 123}), _is_error, 400),
    chat(
        "a type that is a number", _format({"type": "json_object", "schema": {"type": 123}}), _is_error, 400
    ),
    chat(
        "a type that there is not",
        _format({"type": "json_object", "schema": {"type": "hiccup"}}),
        _is_error,
        400,
    ),
    chat("json_schema", {"json_schema": {"const": "42"}}, _matches('^"42"$')),
    refused(chat("a grammar", {"grammar": 'root ::= "a"{5,5}'}), _NO_GBNF),
    # Completions
    text("a completion", {}, lambda found: found["usage"]["completion_tokens"] == 8),
    text("a completion of 64 tokens", {"max_tokens": 64}, lambda f: f["usage"]["completion_tokens"] <= 64),
    text("a stream", {"stream": True}, lambda events: events[-1]["choices"][0]["finish_reason"] == "length"),
    text("stops", {"stop": ["User:\n", "Assistant:\n"], "stream": True}, lambda events: len(events) > 1),
    text("a seed", {"seed": 42, "temperature": 0, "cache_prompt": False}),
    text("a prompt that is too long", {"prompt": MEANING * 2000}, _too_long, 400),
    text("a prompt of tokens", {"prompt": [10, 11, 12]}),
    text("two prompts of tokens", {"prompt": [[10, 11], [10, 11]], "temperature": 0}, lambda f: _alike(f, 2)),
    text("a text and tokens", {"prompt": [[10, 11, 12], MEANING]}, lambda found: len(found["choices"]) == 2),
    refused(text("a text among one prompt's tokens", {"prompt": [1, 2, MEANING, 7]}), "give tokens alone"),
    text("the context is the end", {"prompt": "Once", "max_tokens": 300, "stream": True}),
    text("log probabilities", {"logprobs": 10}, lambda f: len(f["choices"][0]["logprobs"]["tokens"]) == 8),
    text(
        "log probabilities in a stream",
        {"logprobs": 10, "stream": True},
        lambda e: bool(e[0]["choices"][0]["logprobs"]),
    ),
    text("bias by token", {"logit_bias": {"10": -100}}),
    refused(
        text("bias by text", {"logit_bias": {" book ": -100}}),
        "OpenAI's keys are tokens",
    ),
    refused(text("bias as a list", {"logit_bias": [[10, -100]]}), "OpenAI's is an object"),
    refused(text("n_predict", {"n_predict": 3}), "max_tokens says it"),
    Case("/completion", "/completion", {"prompt": MEANING}, _is_error, 405, REFUSED, _NO_NATIVE),
    Case("/infill", "/infill", {"input_prefix": "a"}, _is_error, 405, REFUSED, _NO_NATIVE),
    # Who may
    chat("a file as an image", _image("file://mtmd/test-1.jpeg"), _is_error, 400),
    refused(chat("a file below a folder that is allowed", _image("file:////mtmd//test-1.jpeg")), _NO_FILES),
    chat("a file that is not there", _image("file://mtmd/notfound.jpeg"), _is_error, 400),
    chat("a file above the folder", _image("file://../mtmd/test-1.jpeg"), _is_error, 400),
    refused(chat("an image by https", _image("https://example.org/truck.png")), _NO_FETCH),
    chat("an image that is none", _image("malformed"), _is_error, 400),
    # Basics
    Case("health", "/health", None, lambda found: found["status"] == "ok"),
    Case("the models", "/v1/models", None, lambda found: len(found["data"]) == 1),
    Case("properties", "/props", None, lambda found: found["default_generation_settings"]["n_ctx"] > 0),
    Case("slots", "/slots", None, lambda found: found[0]["n_ctx"] > 0 and "params" not in found[0]),
    Case("the models without /v1", "/models", None, _is_error, 404, REFUSED, "/v1/models has them"),
    # Tokens
    Case("tokens of a text", "/tokenize", {"content": MEANING}, lambda found: len(found["tokens"]) > 5),
    Case("a text of tokens", "/detokenize", {"tokens": [10, 11]}, lambda found: bool(found["content"])),
    Case(
        "a token that begins a text",
        "/tokenize",
        {"content": "What", "add_special": True},
        lambda found: bool(found["tokens"]),
        outcome=OTHERWISE,
        why="Qwen's models have none",
    ),
    # Templates
    Case("a prompt", "/apply-template", {"messages": TALK}, _ends_with("</think>\n\n")),
    Case(
        "a prompt with a thought",
        "/apply-template",
        {"messages": TALK, "chat_template_kwargs": {"enable_thinking": True}},
        _ends_with("<think>\n"),
    ),
    Case(
        "a prompt with tools",
        "/apply-template",
        {"messages": TALK, "tools": [{"type": "function", "function": {"name": "test", "parameters": {}}}]},
        lambda found: '"test"' in found["prompt"],
    ),
    Case(
        "a prompt without the assistant's turn",
        "/apply-template",
        {"messages": TALK, "add_generation_prompt": False},
        _ends_with("<|im_end|>\n"),
    ),
    Case(
        "a prompt of an answer that is begun",
        "/apply-template",
        {"messages": [*TALK, {"role": "assistant", "content": "Whill"}]},
        _ends_with("Whill"),
    ),
    # Responses
    Case("a response", RESPONSES, {"input": "Hi", "max_output_tokens": 8}, _answer_text),
    Case(
        "a response of a form",
        RESPONSES,
        {
            "input": "Hi",
            "text": {"format": {"type": "json_schema", "name": "test", "schema": {"const": "foo"}}},
        },
        lambda found: found["output"][0]["content"][0]["text"] == '"foo"',
    ),
    Case(
        "a response that is any object",
        RESPONSES,
        {"input": "Hi", "max_output_tokens": 8, "text": {"format": {"type": "json_object"}}},
        lambda found: found["output"][0]["content"][0]["text"].startswith("{"),
    ),
    Case(
        "a response of a form without a schema",
        RESPONSES,
        {"input": "Hi", "text": {"format": {"type": "json_schema", "name": "test"}}},
        _is_error,
        400,
    ),
    Case(
        "a response as a stream",
        RESPONSES,
        {"input": TALK, "max_output_tokens": 8, "stream": True},
        lambda events: (
            events[0]["type"] == "response.created" and events[-1]["type"] == "response.incomplete"
        ),
    ),
]


def _alike(found: Any, count: int) -> bool:
    texts = [choice["text"] for choice in found["choices"]]
    return len(texts) == count and len(set(texts)) == 1


def table() -> str:
    """How many there are of each, and what is not as there."""
    counts = {kind: sum(case.outcome == kind for case in CASES) for kind in (SAME, REFUSED, OTHERWISE)}
    lines = [f"| {len(CASES)} cases | |", "| --- | --- |"]
    lines += [f"| {kind} | {count} |" for kind, count in counts.items()]
    lines += ["", "| not as there | |", "| --- | --- |"]
    lines += [f"| {case.what} | {case.outcome}: {case.why} |" for case in CASES if case.why]
    return "\n".join(lines)


def parsed(body: bytes) -> Any:
    """The answer's JSON, or its events."""
    if not body.startswith((b"data:", b"event:")):
        return json.loads(body)
    lines = [line[6:] for line in body.decode().splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]
