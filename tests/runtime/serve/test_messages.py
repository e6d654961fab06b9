"""`/v1/messages` through the official `anthropic` client, over a real socket."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anthropic
import pytest
from anthropic import Anthropic, AsyncAnthropic
from anthropic.types import RawMessageStreamEvent
from PIL import Image
from pydantic import TypeAdapter
from qwen_profiles.schema import load_profile
from qwen_runtime import Model, Sampling
from qwen_runtime.serve.schema.anthropic import MessagesRequest
from qwen_runtime.serve.schema.base import parse

from benchmarks.support.checkpoints import TINY_VL
from tests.support.exported import Exported
from tests.support.schemas import object_of
from tests.support.servers import Server, request, serving

QUESTION: Any = [{"role": "user", "content": "What is assert?"}]
GREEDY = Sampling(temperature=0)
LOOK_UP: Any = {
    "name": "look_up",
    "description": "Look a word up.",
    "input_schema": {
        "type": "object",
        "properties": {"word": {"enum": ["assert", "yield"]}},
        "required": ["word"],
    },
}
UNMET = object_of(a={"type": "string", "enum": ["b"], "not": {"const": "b"}})
FUNCTION: Any = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Look a word up.",
        "parameters": LOOK_UP["input_schema"],
    },
}


def sdk(server: Server, **options: Any) -> Anthropic:
    return Anthropic(base_url=server.url, api_key="unused", max_retries=0, **options)


@pytest.fixture(scope="module")
def ask(server: Server, model: Model) -> Callable[..., Any]:
    client = sdk(server)

    def create(messages: Any = QUESTION, **options: Any) -> Any:
        options = {"max_tokens": 30, **options}
        # The client's newest version has no argument for it.
        options["extra_body"] = {"temperature": 0, **options.get("extra_body", {})}
        return client.messages.create(model=model.info.name, messages=messages, **options)

    return create


def test_answer_is_the_models(ask: Callable[..., Any], model: Model) -> None:
    messages = [{"role": "system", "content": "Be short.\n\nBe kind."}, *QUESTION]
    expected = model.generate(messages, max_tokens=30, sampling=GREEDY)
    text = "".join(expected)
    blocks = [{"type": "text", "text": "Be short."}, {"type": "text", "text": "Be kind."}]
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "assert?"}]
    for system, content in (("Be short.\n\nBe kind.", "What is assert?"), (blocks, parts)):
        found = ask([{"role": "user", "content": content}], system=system)
        assert [(block.type, block.text) for block in found.content] == [("text", text)]
        assert (found.stop_reason, found.stop_sequence) == ("max_tokens", None)
        usage = found.usage
        assert usage.input_tokens + usage.cache_read_input_tokens == expected.prompt_tokens
        assert usage.output_tokens == 30
        assert (found.model, found.role, found.type) == (model.info.name, "assistant", "message")


def test_stream_has_the_official_events(ask: Callable[..., Any]) -> None:
    whole = ask()
    events = list(ask(stream=True))
    official: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
    for event in events:
        official.validate_python(event.model_dump(), strict=False)
    deltas = [event.delta.text for event in events if event.type == "content_block_delta"]
    assert [event.type for event in events] == [
        "message_start",
        "content_block_start",
        *["content_block_delta"] * len(deltas),
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert len(deltas) > 20 and "".join(deltas) == whole.content[0].text
    assert events[0].message.content == [] and events[0].message.stop_reason is None
    assert events[-2].delta.stop_reason == "max_tokens" and events[-2].usage.output_tokens == 30


def test_stream_names_its_events(server: Server) -> None:
    """The client above drops the pings."""
    body = json.dumps({"max_tokens": 2, "messages": QUESTION, "stream": True}).encode()
    status, headers, found = request(server, "POST", "/v1/messages?beta=true", body)
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    events = [event.split("\n") for event in found.decode().split("\n\n") if event]
    for name, data in events:
        assert name == f"event: {json.loads(data.removeprefix('data: '))['type']}"
    assert [name for name, _ in events][:2] == ["event: message_start", "event: ping"]


def test_stream_helper_sync_and_async(server: Server, ask: Callable[..., Any], model: Model) -> None:
    text = ask().content[0].text
    options: Any = {"model": model.info.name, "max_tokens": 30, "messages": QUESTION}
    options["extra_body"] = {"temperature": 0}
    with sdk(server).messages.stream(**options) as stream:
        assert "".join(stream.text_stream) == text
        final = stream.get_final_message()
    assert final.content[0].text == text and final.usage.output_tokens == 30

    async def several() -> list[Any]:
        async with AsyncAnthropic(base_url=server.url, api_key="unused") as client:

            async def streamed() -> Any:
                async with client.messages.stream(**options) as stream:
                    return await stream.get_final_message()

            return await asyncio.gather(client.messages.create(**options), *(streamed() for _ in range(3)))

    assert [found.content[0].text for found in asyncio.run(several())] == [text] * 4


def test_stop_sequences(ask: Callable[..., Any]) -> None:
    text = ask().content[0].text
    stop = text[20:26]
    found = ask(stop_sequences=["never", stop])
    assert found.content[0].text == text[: text.index(stop)]
    assert (found.stop_reason, found.stop_sequence) == ("stop_sequence", stop)
    last = list(ask(stop_sequences=[stop], stream=True))[-2]
    assert (last.delta.stop_reason, last.delta.stop_sequence) == ("stop_sequence", stop)
    empty = ask(stop_sequences=[text[:3]])
    assert empty.content == [] and empty.stop_reason == "stop_sequence"


def test_answer_that_is_begun_goes_on(ask: Callable[..., Any], model: Model) -> None:
    prompt = model.apply_chat_template(QUESTION) + "The answer"
    expected = "".join(model.generate(prompt, max_tokens=30, sampling=GREEDY))
    begun = ask([*QUESTION, {"role": "assistant", "content": "The answer"}])
    assert begun.content[0].text == expected


@pytest.mark.parametrize("kind", ["enabled", "adaptive"])
def test_thoughts_are_blocks(ask: Callable[..., Any], model: Model, kind: str) -> None:
    text = "".join(model.generate(QUESTION, max_tokens=30, sampling=GREEDY, thinking=True))
    thought, _, said = text.partition("</think>")
    thinking = {"type": kind, "budget_tokens": 20} if kind == "enabled" else {"type": kind}
    found = ask(thinking=thinking, output_config={"effort": "low"})
    assert found.content[0].type == "thinking" and found.content[0].thinking == thought.strip()
    assert found.content[0].signature
    assert [block.text for block in found.content[1:]] == ([said.strip()] if said.strip() else [])
    events = list(ask(thinking=thinking, stream=True))
    kinds = [event.delta.type for event in events if event.type == "content_block_delta"]
    assert kinds[0] == "thinking_delta" and "signature_delta" in kinds
    hidden = ask(thinking={**thinking, "display": "omitted"})
    assert hidden.content[0].thinking == "" and hidden.content[0].signature == found.content[0].signature
    assert ask(thinking={"type": "disabled"}).content == ask().content


def test_tools_round_trip(ask: Callable[..., Any], model: Model) -> None:
    """What the model reads next is what it wrote, and the result."""
    named = {"type": "tool", "name": "look_up"}
    found = ask(tools=[LOOK_UP], tool_choice=named, max_tokens=100)
    [call] = found.content
    assert (found.stop_reason, call.type, call.name) == ("tool_use", "tool_use", "look_up")
    assert call.input["word"] in ("assert", "yield")
    events = list(ask(tools=[LOOK_UP], tool_choice=named, max_tokens=100, stream=True))
    parts = [event.delta.partial_json for event in events if event.type == "content_block_delta"]
    assert json.loads("".join(parts)) == call.input
    assert events[-2].delta.stop_reason == "tool_use"

    thought = {"type": "thinking", "thinking": "Hm.", "signature": "x"}
    redacted = {"type": "redacted_thinking", "data": "x"}
    for error in (False, True):
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "A statement.", "is_error": error}
        history = [
            *QUESTION,
            {"role": "assistant", "content": [redacted, thought, *found.content]},
            {"role": "user", "content": [result, {"type": "text", "text": "Go on."}]},
        ]
        function = {"name": "look_up", "arguments": call.input}
        messages = [
            *QUESTION,
            {
                "role": "assistant",
                "content": "",
                "reasoning_content": "Hm.",
                "tool_calls": [{"type": "function", "function": function}],
            },
            {"role": "tool", "content": "Error: A statement." if error else "A statement."},
            {"role": "user", "content": "Go on."},
        ]
        expected = "".join(model.generate(messages, max_tokens=20, sampling=GREEDY, tools=[FUNCTION]))
        answer = ask(history, tools=[LOOK_UP], max_tokens=20)
        assert answer.content[0].text == expected


def test_tool_choice(ask: Callable[..., Any]) -> None:
    calls = ask(tools=[LOOK_UP], tool_choice={"type": "any"}, max_tokens=300).content
    assert calls and all(block.type == "tool_use" for block in calls)
    one = {"type": "any", "disable_parallel_tool_use": True}
    assert len(ask(tools=[LOOK_UP], tool_choice=one, max_tokens=300).content) == 1
    untold = ask(tools=[LOOK_UP], tool_choice={"type": "none"})
    assert untold.content[0].text == ask().content[0].text
    with pytest.raises(anthropic.BadRequestError, match="no tool 'clock'"):
        ask(tools=[LOOK_UP], tool_choice={"type": "tool", "name": "clock"})


def test_call_that_is_cut_off(ask: Callable[..., Any]) -> None:
    """What came of its arguments is there."""
    schema = {"type": "object", "properties": {"text": {"type": "string", "minLength": 200}}}
    tool = {"name": "say", "input_schema": {**schema, "required": ["text"]}}
    found = ask(tools=[tool], tool_choice={"type": "any"}, max_tokens=60)
    assert found.stop_reason == "max_tokens"
    assert 0 < len(found.content[-1].input["text"]) < 200


def test_json_schema(ask: Callable[..., Any]) -> None:
    schema = {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"]}
    form = {"type": "json_schema", "schema": {**schema, "additionalProperties": False}}
    for options in ({"output_config": {"format": form}}, {"extra_body": {"output_format": form}}):
        assert isinstance(json.loads(ask(**options).content[0].text)["yes"], bool)


def test_answer_that_does_not_match_its_schema(ask: Callable[..., Any]) -> None:
    """The text stays, and the ending says what is wrong with it."""
    options: Any = {"output_config": {"format": {"type": "json_schema", "schema": UNMET}}}
    found = ask(**options)
    assert json.loads(found.content[0].text) == {"a": "b"} and found.stop_reason == "refusal"
    assert found.stop_details.explanation.startswith("the answer does not match the schema: a: ")
    last = list(ask(**options, stream=True))[-2]
    assert last.delta.stop_details == found.stop_details


def test_tokens_are_counted(server: Server, ask: Callable[..., Any], model: Model) -> None:
    asked: Any = {"messages": QUESTION, "system": "Be short.", "tools": [LOOK_UP]}
    usage = ask(**asked, max_tokens=1).usage
    count = sdk(server).messages.count_tokens(model=model.info.name, **asked).input_tokens
    assert count == usage.input_tokens + usage.cache_read_input_tokens > 50


def test_models(server: Server, model: Model) -> None:
    client = sdk(server)
    [found] = client.models.list()
    assert (found.id, found.type) == (model.info.name, "model") and found.created_at.year > 2020
    assert client.models.retrieve(model.info.name).display_name == model.info.name


@pytest.mark.parametrize(
    "options,says",
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        (
            {"messages": [{"role": "user", "content": "word " * 9000}]},
            r"'prompt is too long: 90\d\d tokens > 8192 maximum'",
        ),
        ({"messages": [{"role": "king", "content": ""}]}, "messages.0.*king"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, r"tools\.0"),
        ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "thinking.budget_tokens"),
        ({"extra_body": {"mcp_servers": [{"type": "url"}]}}, "mcp_servers"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "type 'audio' is not supported"),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "tool_result", "tool_use_id": "none", "content": "x"}],
                    }
                ]
            },
            "no call before it has the id 'none'",
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "document", "source": {"type": "base64", "data": ""}}],
                    }
                ]
            },
            "type 'base64' is not supported",
        ),
    ],
)
def test_what_is_refused(ask: Callable[..., Any], options: dict[str, Any], says: str) -> None:
    for stream in (False, True):
        with pytest.raises(anthropic.BadRequestError, match=says) as caught:
            ask(**{"stream": stream, **options})
        body: Any = caught.value.body
        assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error"


def test_errors_are_anthropics(cpu_artifact: Path, server: Server) -> None:
    assert json.loads(request(server, "GET", "/v1/messages")[2])["type"] == "error"
    with serving(cpu_artifact, "--api-key", "sesame", "--strict-model") as guarded:
        with pytest.raises(anthropic.AuthenticationError) as unknown:
            sdk(guarded).models.list()
        assert unknown.value.status_code == 401
        for client in (
            Anthropic(base_url=guarded.url, api_key="sesame", max_retries=0),
            Anthropic(base_url=guarded.url, auth_token="sesame", max_retries=0),
        ):
            with pytest.raises(anthropic.NotFoundError, match="no model 'claude'") as caught:
                client.messages.create(model="claude", max_tokens=1, messages=QUESTION)
            assert caught.value.type == "not_found_error"
        with pytest.raises(anthropic.AuthenticationError) as wrong:
            sdk(guarded).messages.count_tokens(model="x", messages=QUESTION)
        assert wrong.value.type == "authentication_error"


def test_images(exported: Exported) -> None:
    artifact = exported(TINY_VL, load_profile("cpu"))
    file = io.BytesIO()
    Image.effect_noise((200, 150), 80).convert("RGB").save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}}
    parts = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
        {"type": "text", "text": "What is this?"},
    ]
    with Model.load(artifact) as model:
        expected = model.generate([{"role": "user", "content": parts}], max_tokens=20, sampling=GREEDY)
        text = "".join(expected)
    with serving(artifact) as server:
        client = sdk(server)
        messages: Any = [{"role": "user", "content": [image, parts[1]]}]
        options: Any = {"model": "any", "extra_body": {"temperature": 0}}
        found = client.messages.create(messages=messages, max_tokens=20, **options)
        assert [block.text for block in found.content if block.type == "text"] == [text]
        count = client.messages.count_tokens(model="any", messages=messages).input_tokens
        assert found.usage.input_tokens == count == expected.prompt_tokens
        remote: Any = {"type": "image", "source": {"type": "url", "url": "https://example.org/a.png"}}
        with pytest.raises(anthropic.BadRequestError, match="none is fetched"):
            client.messages.create(messages=[{"role": "user", "content": [remote]}], max_tokens=1, **options)


def test_results_of_tools_may_be_pictures() -> None:
    """And texts in several blocks or documents; what stands between them stays there."""
    source = {"type": "base64", "media_type": "image/png", "data": "AAAA"}
    plain = {"type": "text", "media_type": "text/plain", "data": "Once."}
    shown = [
        {"type": "text", "text": "Look: "},
        {"type": "image", "source": source},
        {"type": "document", "source": plain, "title": "A tale"},
    ]
    call = {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": [1]}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": shown}
    between = {"type": "text", "text": "Wait."}
    empty = {"type": "tool_result", "tool_use_id": "t1"}
    asked = {
        "max_tokens": 1,
        "messages": [
            {"role": "assistant", "content": [{"type": "text", "text": "I call."}, call]},
            {"role": "user", "content": [result, between, empty]},
        ],
    }
    chat = parse(MessagesRequest, json.dumps(asked).encode()).as_chat()
    said, picture, wait, nothing = chat.messages
    assert said.content == "I call." and said.tool_calls is not None
    assert json.loads(said.tool_calls[0].function.arguments) == {"a": [1]}
    assert [part.model_dump() for part in picture.content or () if not isinstance(part, str)] == [
        {"type": "text", "text": "Look: "},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
        {"type": "text", "text": "A tale\n"},
        {"type": "text", "text": "Once."},
    ]
    assert [message.role for message in chat.messages] == ["assistant", "tool", "user", "tool"]
    assert picture.tool_call_id == nothing.tool_call_id == "t1"
    assert (wait.tool_call_id, len(nothing.content or "")) == (None, 1)
