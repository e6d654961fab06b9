"""A model whose template asks for calls as JSON, and always begins a thought: Qwen3-Next-Thinking's kind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from anthropic import Anthropic
from ollama import Client
from openai import OpenAI
from qwen_common import manifest as manifests

from benchmarks.support.checkpoints import TINY
from tests.support.servers import Server, request, serving

_TOOLS = """{%- if tools %}{{- '<|im_start|>system\\n# Tools' }}
{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
{{- '\\n<tool_call>\\n{\\"name\\": <function-name>, \\"arguments\\": <args-json-object>}\\n</tool_call>' }}
{{- '<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + ('user' if message.role == 'tool' else message.role) + '\\n' + message.content }}
    {%- for call in message.tool_calls or [] %}
        {{- '\\n<tool_call>\\n{\\"name\\": \\"' + call.function.name + '\\", \\"arguments\\": ' }}
        {{- call.function.arguments | tojson }}{{- '}\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"""
TEMPLATES = {
    "instruct": _TOOLS + "{%- endif %}",
    "thinking": _TOOLS + "{{- '<think>\\n' }}{%- endif %}",
}
WORD = {"type": "object", "properties": {"word": {"enum": ["assert", "yield"]}, "deep": {"type": "boolean"}}}
WORD = {**WORD, "required": ["word", "deep"], "additionalProperties": False}
FUNCTION: Any = {"name": "look_up", "parameters": WORD}
TOOL: Any = {"type": "function", "function": FUNCTION}
QUESTION: Any = {"role": "user", "content": "What is assert?"}
Named = dict[str, Server]


@pytest.fixture(scope="module")
def servers(cpu_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Named]:
    folder = tmp_path_factory.mktemp("hermes")
    artifacts = []
    for name, template in TEMPLATES.items():
        artifacts.append(Path(shutil.copytree(cpu_artifact, folder / name)))
        contents = {"chat_template.jinja": template.encode()}
        manifests.put_files(artifacts[-1], manifests.read(artifacts[-1]), contents)
    with serving(artifacts[0]) as instruct, serving(artifacts[1]) as thinking:
        yield {"instruct": instruct, "thinking": thinking}


@pytest.fixture(params=TEMPLATES)
def server(request: pytest.FixtureRequest, servers: Named) -> Server:
    found: Server = servers[request.param]
    return found


def asking(server: Server) -> Callable[..., Any]:
    client: OpenAI = server.client()
    model = client.models.list().data[0].id

    def create(**options: Any) -> Any:
        given = {"messages": [QUESTION], "temperature": 0, "max_tokens": 300, "tools": [TOOL], **options}
        return client.chat.completions.create(model=model, **given)

    return create


def test_forced_calls_fit(server: Server) -> None:
    ask = asking(server)
    named: Any = {"type": "function", "function": {"name": "look_up"}}
    for seed in (1, 2):
        choice = ask(tool_choice=named, temperature=1.5, seed=seed).choices[0]
        if choice.finish_reason == "length":  # a thought without an end
            continue
        [call] = choice.message.tool_calls
        arguments = json.loads(call.function.arguments)
        assert call.function.name == "look_up" and arguments.keys() == {"word", "deep"}
        assert arguments["word"] in ("assert", "yield") and arguments["deep"] in (True, False)
        assert choice.finish_reason == "tool_calls" and not choice.message.content


def test_streamed_calls_are_those_of_a_whole_answer(servers: Named) -> None:
    ask = asking(servers["instruct"])
    options: Any = {"tool_choice": "required", "parallel_tool_calls": False}
    [whole] = ask(**options).choices[0].message.tool_calls
    chunks = [chunk.choices[0] for chunk in ask(stream=True, **options)]
    deltas = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
    assert deltas[0].function.name == "look_up"
    assert "".join(call.function.arguments for call in deltas) == whole.function.arguments
    assert json.loads(whole.function.arguments) and chunks[-1].finish_reason == "tool_calls"


def test_strict_tools_are_taken(server: Server) -> None:
    strict: Any = {"type": "function", "function": {**FUNCTION, "strict": True}}
    assert asking(server)(tools=[strict], max_tokens=20).choices[0].message


def test_thoughts_without_being_asked_for(servers: Named) -> None:
    """Neither server was given --think."""
    thought = asking(servers["thinking"])(tools=[], max_tokens=12).choices[0].message
    assert thought.reasoning_content and not thought.content
    for more in ({}, {"reasoning_effort": "high"}):
        plain = asking(servers["instruct"])(tools=[], max_tokens=12, **more).choices[0].message
        assert plain.content and not hasattr(plain, "reasoning_content")


def test_earlier_calls_are_written_as_transformers_writes_them(servers: Named) -> None:
    from transformers import AutoTokenizer

    call = {"name": "look_up", "arguments": '{"word": "yield", "deep": true}'}
    calls = [{"id": "c1", "type": "function", "function": call}]
    result = {"role": "tool", "tool_call_id": "c1", "content": "42"}
    messages = [QUESTION, {"role": "assistant", "content": "", "tool_calls": calls}, result]
    body = json.dumps({"messages": messages, "tools": [TOOL]}).encode()
    found = json.loads(request(servers["thinking"], "POST", "/apply-template", body)[2])["prompt"]
    calls[0]["function"] = {"name": "look_up", "arguments": {"word": "yield", "deep": True}}
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    options: Any = {"tokenize": False, "add_generation_prompt": True, "chat_template": TEMPLATES["thinking"]}
    assert found == tokenizer.apply_chat_template(messages, tools=[TOOL], **options)
    assert found.endswith("<think>\n")


def test_anthropic(server: Server, servers: Named) -> None:
    client = Anthropic(base_url=server.url, api_key="unused", max_retries=0)
    tool: Any = {"name": "look_up", "input_schema": WORD}
    found = client.messages.create(
        model="any",
        messages=[QUESTION],
        max_tokens=300,
        tools=[tool],
        tool_choice={"type": "any"},
        extra_body={"temperature": 0},
    )
    if found.stop_reason != "max_tokens":
        [use] = [block for block in found.content if block.type == "tool_use"]
        assert use.name == "look_up" and use.input.keys() == {"word", "deep"}
    assert (found.content[0].type == "thinking") == (server is servers["thinking"])


def test_ollama(server: Server, servers: Named) -> None:
    client = Client(host=server.url)
    thinks = server is servers["thinking"]
    expected = ["completion", "tools", *(["thinking"] if thinks else [])]
    assert client.show("any").capabilities == expected
    options = {"temperature": 0, "num_predict": 20}
    message = client.chat("any", messages=[QUESTION], tools=[TOOL], options=options).message
    assert bool(message.thinking) == thinks and bool(message.content) != thinks
    prompt = "<|im_start|>user\nWhat is assert?<|im_end|>\n<|im_start|>assistant\n"
    raw = client.generate("any", prompt=prompt, raw=True, options=options)
    assert raw.response and not raw.thinking


def test_an_answer_that_is_begun_ends_the_thought(servers: Named) -> None:
    messages = [QUESTION, {"role": "assistant", "content": "It"}]
    body = json.dumps({"messages": messages}).encode()
    for name, end in (("thinking", "<think>\n\n</think>\n\nIt"), ("instruct", "assistant\nIt")):
        found = json.loads(request(servers[name], "POST", "/apply-template", body)[2])["prompt"]
        assert found.endswith(end)
    found = asking(servers["thinking"])(messages=messages, tools=[], max_tokens=12).choices[0].message
    assert found.content and not hasattr(found, "reasoning_content")
