"""`/v1/responses` and `logit_bias` through the official `openai` client, over a real socket."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter
from qwen_runtime import Model, Sampling
from qwen_runtime.serve.schema.base import parse
from qwen_runtime.serve.schema.responses import ResponseRequest

from tests.support.servers import Server

GREEDY = Sampling(temperature=0)
MESSAGES = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "What is assert?"}]
TOOL = {
    "type": "function",
    "name": "look_up",
    "description": "Look a word up.",
    "parameters": {
        "type": "object",
        "properties": {"word": {"enum": ["assert", "yield"]}},
        "required": ["word"],
    },
    "strict": True,
}


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return server.client()


def ask(client: OpenAI, model: Model, asked: Any = "What is assert?", **options: Any) -> Any:
    options = {"temperature": 0, "max_output_tokens": 30, **options}
    return client.responses.create(model=model.info.name, input=asked, **options)


def test_answer_is_the_models(client: OpenAI, model: Model) -> None:
    expected = model.generate(MESSAGES, max_tokens=30, sampling=GREEDY)
    text = "".join(expected)
    found = ask(client, model, instructions="Be short.")
    assert found.output_text == text
    assert (found.status, found.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert found.usage.input_tokens == expected.prompt_tokens and found.usage.output_tokens == 30
    parts = [{"type": "input_text", "text": "What is "}, {"type": "input_text", "text": "assert?"}]
    items = [{"role": "developer", "content": "Be short."}, {"role": "user", "content": parts}]
    assert ask(client, model, items).output_text == text
    assert ask(client, model, [*items, *found.model_dump()["output"], items[1]]).usage.input_tokens > 60


@pytest.mark.parametrize("effort", ["none", "high"])
def test_stream_has_the_official_events(client: OpenAI, model: Model, effort: str) -> None:
    options = {"reasoning": {"effort": effort}, "max_output_tokens": 20}
    events = list(ask(client, model, stream=True, **options))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    official: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    for event in events:
        if not event.type.startswith("response.in"):  # the client's own types of states want a usage detail
            official.validate_python(event.model_dump(exclude_unset=True), strict=False)
    kind = "output_text" if effort == "none" else "reasoning_text"
    types = [event.type for event in events]
    deltas = [event.delta for event in events if event.type == f"response.{kind}.delta"]
    assert types == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *[f"response.{kind}.delta"] * len(deltas),
        f"response.{kind}.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    last = events[-1].response
    assert "".join(deltas) == last.output[0].content[0].text == events[-4].text
    whole = ask(client, model, **options)
    assert whole.output[0].content[0].text == "".join(deltas)
    assert last.usage.output_tokens == 20


def test_tools_round_trip(client: OpenAI, model: Model) -> None:
    options: dict[str, Any] = {"tools": [TOOL], "tool_choice": {"type": "function", "name": "look_up"}}
    events = list(ask(client, model, max_output_tokens=100, stream=True, **options))
    call = events[-1].response.output[0]
    assert events[-1].type == "response.completed" and (call.type, call.name) == ("function_call", "look_up")
    assert json.loads(call.arguments)["word"] in ("assert", "yield")
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(deltas) == call.arguments
    question = {"role": "user", "content": "What is assert?"}
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "A statement."}
    history = [question, call.model_dump(), output]
    function = {"name": "look_up", "arguments": json.loads(call.arguments)}
    messages = [
        question,
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]},
        {"role": "tool", "content": "A statement."},
    ]
    nested = {"type": "function", "function": {key: TOOL[key] for key in TOOL if key != "type"}}
    expected = "".join(model.generate(messages, max_tokens=20, sampling=GREEDY, tools=[nested]))
    found = ask(client, model, history, tools=[TOOL], tool_choice="auto", max_output_tokens=20)
    assert found.output_text == expected


def test_a_turn_of_text_and_calls_is_one_message() -> None:
    """As the model wrote it, and as chat completions have it."""
    calls = [
        {"type": "function_call", "call_id": f"c{at}", "name": "f", "arguments": "{}"} for at in range(3)
    ]
    outputs = [{"type": "function_call_output", "call_id": f"c{at}", "output": "x"} for at in range(3)]
    outputs[1]["output"] = [{"type": "input_text", "text": "x"}]  # type: ignore[assignment]
    items = [
        {"role": "user", "content": "Go."},
        {"role": "assistant", "content": "I call."},
        *calls[:2],
        *outputs[:2],
        calls[2],
        outputs[2],
    ]
    chat = parse(ResponseRequest, json.dumps({"input": items}).encode()).as_chat()
    assert [(message.role, len(message.tool_calls or ())) for message in chat.messages] == [
        ("user", 0),
        ("assistant", 2),
        ("tool", 0),
        ("tool", 0),
        ("assistant", 1),
        ("tool", 0),
    ]


def test_json_schema(client: OpenAI, model: Model) -> None:
    schema = {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"]}
    form = {"type": "json_schema", "name": "answer", "schema": {**schema, "additionalProperties": False}}
    assert isinstance(json.loads(ask(client, model, text={"format": form}).output_text)["yes"], bool)


@pytest.mark.parametrize(
    "options,says",
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id: not supported"),
        ({"tools": [{"type": "web_search"}]}, "tools.0"),
        ({"asked": []}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
    ],
)
def test_what_is_refused(client: OpenAI, model: Model, options: dict[str, Any], says: str) -> None:
    with pytest.raises(openai.BadRequestError, match=says):
        ask(client, model, **options)


def test_logit_bias(client: OpenAI, model: Model) -> None:
    """100 makes a token certain, -100 impossible; a little of it changes nothing here."""

    def answer(bias: dict[str, int], **options: Any) -> str:
        messages: Any = [{"role": "user", "content": "What is assert?"}]
        options = {"temperature": 0, "max_tokens": 5, **options}
        found = client.chat.completions.create(
            model=model.info.name, messages=messages, logit_bias=bias, **options
        )
        return str(found.choices[0].message.content)

    plain = answer({})
    first = str(model.encode(plain)[0])
    token = model.encode(" list")
    assert len(token) == 1
    assert answer({str(token[0]): 100}) == model.decode(token * 5)
    assert answer({str(token[0]): 100}, temperature=1) == model.decode(token * 5)
    assert not answer({first: -100}).startswith(model.decode([int(first)]))
    assert answer({first: 0}) == plain
