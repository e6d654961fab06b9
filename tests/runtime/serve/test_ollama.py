"""`/api/...` through the official `ollama` client, over a real socket."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Callable
from typing import Any

import ollama
import pytest
from ollama import AsyncClient, Client
from PIL import Image
from qwen_profiles.schema import load_profile
from qwen_runtime import Model, Sampling
from qwen_runtime.serve.engine import Answer
from qwen_runtime.serve.ollama import answer_lines
from qwen_runtime.serve.parser import AnswerParser
from qwen_runtime.serve.schema.base import parse
from qwen_runtime.serve.schema.ollama import OllamaChatRequest
from qwen_runtime.serve.worker import Done, Piece

from benchmarks.support.checkpoints import TINY, TINY_VL
from tests.support.exported import Exported
from tests.support.schemas import object_of
from tests.support.servers import Server, request, serving

QUESTION: Any = [{"role": "user", "content": "What is assert?"}]
GREEDY = Sampling(temperature=0)
OPTIONS = {"temperature": 0, "num_predict": 30, "num_ctx": 2048}


@pytest.fixture(scope="module")
def client(server: Server) -> Client:
    return Client(host=server.url)


@pytest.fixture(scope="module")
def ask(client: Client, model: Model) -> Callable[..., Any]:
    def create(messages: Any = QUESTION, **options: Any) -> Any:
        options["options"] = {**OPTIONS, **options.get("options", {})}
        return client.chat(model.info.name, messages=messages, **options)

    return create


def test_answer_is_the_models(ask: Callable[..., Any], model: Model) -> None:
    expected = model.generate(QUESTION, max_tokens=30, sampling=GREEDY)
    text = "".join(expected)
    found = ask()
    assert (found.message.role, found.message.content, found.model) == ("assistant", text, model.info.name)
    assert (found.done, found.done_reason) == (True, "length")
    assert (found.prompt_eval_count, found.eval_count) == (expected.prompt_tokens, 30)
    assert found.total_duration >= found.prompt_eval_duration + found.eval_duration > 0


def test_stream_is_the_answer_in_pieces(server: Server, ask: Callable[..., Any], model: Model) -> None:
    text = ask().message.content
    chunks = list(ask(stream=True))
    assert len(chunks) > 20 and "".join(chunk.message.content for chunk in chunks) == text
    assert [chunk.done for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].eval_count == 30 and chunks[0].eval_count is None

    async def streamed() -> str:
        client = AsyncClient(host=server.url)
        chunks = await client.chat(model.info.name, messages=QUESTION, options=OPTIONS, stream=True)
        return "".join([chunk.message.content or "" async for chunk in chunks])

    assert asyncio.run(streamed()) == text
    body = json.dumps({"messages": QUESTION, "options": OPTIONS}).encode()
    _, headers, lines = request(server, "POST", "/api/chat", body)  # a stream unless it says otherwise
    assert headers["content-type"].startswith("application/x-ndjson")
    assert "".join(json.loads(line)["message"]["content"] for line in lines.splitlines()) == text


def test_options(ask: Callable[..., Any]) -> None:
    text = ask().message.content
    found = ask(options={"stop": [text[20:26]]})
    assert found.message.content == text[: text.index(text[20:26])] and found.done_reason == "stop"
    endless = ask(options={"stop": [text[20:26]], "num_predict": -1})
    assert endless.message.content == found.message.content
    hot = [ask(options={"temperature": 1, "seed": seed}).message.content for seed in (1, 1, 2)]
    assert hot[0] == hot[1] != hot[2]
    assert ask(options={"repeat_penalty": 2.0}).message.content != text
    assert ask(options={"seed": -1, "top_k": 0, "top_p": 1.0, "num_gpu": 99}).message.content == text
    for wrong, says in (
        ({"mirostat": 2}, "mirostat: only 0 is supported"),
        ({"temperature": -1}, "temperature: "),
        ({"repeat_last_n": 64}, "repeat_last_n"),
    ):
        for stream in (False, True):
            with pytest.raises(ollama.ResponseError, match=says) as caught:
                list(ask(options=wrong, stream=stream))
            assert caught.value.status_code == 400


def test_answer_that_is_begun_goes_on(ask: Callable[..., Any], model: Model) -> None:
    prompt = model.apply_chat_template(QUESTION) + "The answer"
    expected = "".join(model.generate(prompt, max_tokens=30, sampling=GREEDY))
    assert ask([*QUESTION, {"role": "assistant", "content": "The answer"}]).message.content == expected


def test_generate(client: Client, model: Model) -> None:
    name = model.info.name
    messages = [{"role": "system", "content": "Be short."}, *QUESTION]
    expected = "".join(model.generate(messages, max_tokens=30, sampling=GREEDY))
    asked: Any = {"prompt": "What is assert?", "system": "Be short.", "options": OPTIONS}
    assert client.generate(name, **asked).response == expected
    assert "".join(chunk.response for chunk in client.generate(name, **asked, stream=True)) == expected
    raw = "".join(model.generate("The list", max_tokens=30, sampling=GREEDY))
    assert client.generate(name, prompt="The list", raw=True, options=OPTIONS).response == raw
    for loaded in (client.generate(name), client.chat(name)):
        assert (loaded.done, loaded.done_reason) == (True, "load")
    assert client.generate(name, keep_alive=0).done_reason == "unload"
    for wrong in ({"suffix": "x"}, {"template": "x"}, {"context": [1]}, {"raw": True, "system": "x"}):
        with pytest.raises(ollama.ResponseError, match=next(iter(wrong))):
            client.generate(name, prompt="The", **wrong)


def test_thoughts_are_apart(ask: Callable[..., Any], client: Client, model: Model) -> None:
    text = "".join(model.generate(QUESTION, max_tokens=30, sampling=GREEDY, thinking=True))
    thought, _, said = text.partition("</think>")
    for think in (True, "low"):
        found = ask(think=think).message
        assert (found.thinking, found.content) == (thought.strip(), said.strip())
    generated = client.generate(model.info.name, prompt="What is assert?", think=True, options=OPTIONS)
    assert (generated.thinking, generated.response) == (thought.strip(), said.strip())
    assert ask(think=False).message.thinking is None


def test_formats(ask: Callable[..., Any]) -> None:
    schema = {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"]}
    found = ask(format={**schema, "additionalProperties": False})
    assert isinstance(json.loads(found.message.content)["yes"], bool)
    assert ask(format="json").message.content.startswith("{")
    unmet = object_of(a={"type": "string", "enum": ["b"], "not": {"const": "b"}})
    for stream in (False, True):
        with pytest.raises(ollama.ResponseError, match="the answer does not match the schema: a: "):
            list(ask(format=unmet, stream=stream))


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate", "/api/show", "/api/embed", "/api/embeddings"])
def test_only_browsers_must_say_that_it_is_json(server: Server, path: str) -> None:
    """curl sends a form's type, LiteLLM none; a page of another site can do both without asking first."""
    body = json.dumps({"messages": QUESTION, "prompt": "A", "input": "A", "options": {"num_predict": 2}})
    types = ("application/x-www-form-urlencoded", "text/plain", "")
    for kind in types:
        found = request(server, "POST", path, body.encode(), **{"Content-Type": kind})
        # The shared artifact makes no embeddings.
        assert found[0] == (400 if "embed" in path else 200) and b"Content-Type" not in found[2]
        for mark in ({"Origin": "https://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "none"}):
            answered = request(server, "POST", path, body.encode(), **{"Content-Type": kind, **mark})
            assert answered[0] == 415, (kind, mark)
    assert request(server, "POST", "/v1/messages", b"{}", **{"Content-Type": ""})[0] == 415


def weather(city: str) -> str:
    """Tell the weather.

    Args:
        city: where
    """
    return city


def test_tools_round_trip(ask: Callable[..., Any], model: Model) -> None:
    """The tiny model makes no call by itself, so a result is given to one of an earlier turn."""
    messages = [
        *QUESTION,
        {"role": "assistant", "content": "", "tool_calls": [
            {"function": {"name": "weather", "arguments": {"city": "Rome"}}},
            {"function": {"name": "clock", "arguments": {}}},
        ]},
        {"role": "tool", "tool_name": "clock", "content": "noon"},
        {"role": "tool", "tool_name": "weather", "content": "sun"},
    ]  # fmt: skip
    calls = [
        {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}},
        {"type": "function", "function": {"name": "clock", "arguments": {}}},
    ]
    tool = ollama._utils.convert_function_to_tool(weather).model_dump(exclude_none=True)
    expected = model.generate(
        [
            *QUESTION,
            {"role": "assistant", "content": "", "tool_calls": calls},
            {"role": "tool", "content": "sun"},
            {"role": "tool", "content": "noon"},
        ],
        max_tokens=30,
        sampling=GREEDY,
        tools=[tool],
    )
    assert ask(messages, tools=[weather]).message.content == "".join(expected)


def test_calls_are_told_when_they_are_whole() -> None:
    """As the worker's pieces come; one that was cut off is not told."""
    call = "<tool_call>\n<function=weather>\n<parameter=city>\n{}\n</parameter>\n</function>\n</tool_call>"
    text = f"Let me see.\n\n{call.format('Rome')}\n{call.format('Oslo')}\n{call.format('Bonn')[:-40]}"

    async def told() -> list[tuple[dict[str, Any], dict[str, Any]]]:
        engine: Any = None  # nothing is cancelled
        answer = Answer(engine, 0)
        for at in range(0, len(text), 7):
            answer.replies.put_nowait(Piece(0, text[at : at + 7], ()))
        answer.replies.put_nowait(Done(0, "length", None, 50, (), None))
        tool = {"type": "function", "function": {"name": "weather"}}
        return [line async for line in answer_lines(answer, AnswerParser(False, [tool]), begun=0)]

    lines = asyncio.run(told())
    said = [line for line, _ in lines]
    assert "".join(line.get("content", "") for line in said) == "Let me see."
    functions = [[call["function"] for call in line["tool_calls"]] for line in said if "tool_calls" in line]
    assert functions == [
        [{"index": 0, "name": "weather", "arguments": {"city": "Rome"}}],
        [{"index": 1, "name": "weather", "arguments": {"city": "Oslo"}}],
    ]
    assert lines[-1][1]["done_reason"] == "length" and lines[-1][1]["eval_count"] == 50


def test_results_belong_to_calls() -> None:
    """By id, by name, or in their order."""
    call = {"function": {"name": "f", "arguments": {}}}
    messages = [
        {"role": "user", "content": "Go."},
        {"role": "assistant", "tool_calls": [call, {"id": "mine", **call}, {"function": {"name": "g"}}]},
        {"role": "tool", "content": "1", "tool_call_id": "mine"},
        {"role": "tool", "content": "2", "tool_name": "g"},
        {"role": "tool", "content": "3"},
    ]
    chat = parse(OllamaChatRequest, json.dumps({"messages": messages}).encode()).as_chat()
    calls = chat.messages[1].tool_calls or []
    ids = [call.id for call in calls]
    assert len(set(ids)) == 3
    assert [message.tool_call_id for message in chat.messages[2:]] == ["mine", ids[2], ids[0]]


def test_what_models_there_are(client: Client, server: Server, model: Model) -> None:
    [entry] = client.list().models
    assert entry.model == model.info.name and entry.size and entry.size > 1000 and entry.details
    assert (entry.details.family, entry.details.format) == ("qwen3_5_text", "onnx")
    [running] = client.ps().models
    assert (running.model, running.context_length) == (model.info.name, model.info.context_length)
    found = client.show(model.info.name)
    assert found.capabilities == ["completion", "tools", "thinking"]
    assert found.modelinfo and found.modelinfo["qwen3_5_text.context_length"] == model.info.context_length
    assert found.template == (TINY / "chat_template.jinja").read_text()
    spoken = json.loads(request(server, "GET", "/api/version")[2])["version"]
    assert tuple(map(int, spoken.split("."))) >= (0, 6, 4)  # what editors ask for
    with pytest.raises(ollama.ResponseError, match="/api/pull"):
        client.pull("other")


def test_images(exported: Exported) -> None:
    artifact = exported(TINY_VL, load_profile("cpu"))
    file = io.BytesIO()
    Image.effect_noise((200, 150), 80).convert("RGB").save(file, "PNG")
    parts = [{"type": "image", "image": file.getvalue()}, {"type": "text", "text": "What is this?"}]
    with Model.load(artifact) as model:
        messages = [{"role": "user", "content": parts}]
        text = "".join(model.generate(messages, max_tokens=20, sampling=GREEDY))
    options = {"temperature": 0, "num_predict": 20}
    with serving(artifact) as server:
        client = Client(host=server.url)
        asked: Any = [{"role": "user", "content": "What is this?", "images": [file.getvalue()]}]
        assert client.chat("any", messages=asked, options=options).message.content == text
        generated = client.generate("any", prompt="What is this?", images=[file.getvalue()], options=options)
        assert generated.response == text
        assert "vision" in (client.show("any").capabilities or [])
