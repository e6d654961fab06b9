"""Variables for the chat template, and messages as agents send them, from a request to the prompt."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from click.testing import CliRunner
from openai import OpenAI
from qwen_common.errors import USER_ERROR, UserError
from qwen_profiles.schema import load_profile
from qwen_runtime import Model
from qwen_runtime.cli import main

from benchmarks.support.artifacts import make_artifact
from benchmarks.support.checkpoints import TINY
from tests.support.servers import serving

USER = {"role": "user", "content": "What is assert?"}
# Says in its refusal what it was given.
TELLING = """{{- raise_exception({
  'thinking': enable_thinking,
  'effort': reasoning_effort if reasoning_effort is defined else none,
  'preserve': preserve_thinking if preserve_thinking is defined else none,
  'other': other if other is defined else none
} | tojson) }}"""
DEFAULTS = {"thinking": False, "effort": None, "preserve": None, "other": None}
SAID = {
    "nothing": ({}, {}),
    "enable_thinking": ({"enable_thinking": True}, {"thinking": True}),
    "kwargs": (
        {"chat_template_kwargs": {"preserve_thinking": True, "other": {"a": [1, "x"]}}},
        {"preserve": True, "other": {"a": [1, "x"]}},
    ),
    "kwargs come first": (
        {
            "chat_template_kwargs": {"enable_thinking": False},
            "enable_thinking": True,
            "reasoning_effort": "high",
        },
        {"thinking": False, "effort": "high"},
    ),
    "null": (
        {"chat_template_kwargs": {"enable_thinking": None}, "enable_thinking": True},
        {"thinking": True},
    ),
    "effort": ({"reasoning_effort": "low"}, {"thinking": True, "effort": "low"}),
    "no effort": ({"reasoning_effort": "none"}, {}),
    "effort in kwargs": (
        {"chat_template_kwargs": {"reasoning_effort": "max"}},
        {"thinking": True, "effort": "max"},
    ),
    "effort without thinking": (
        {"reasoning_effort": "high", "enable_thinking": False},
        {"thinking": False, "effort": "high"},
    ),
}


@pytest.fixture(scope="module")
def telling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("telling")
    checkpoint = Path(shutil.copytree(TINY, folder / "checkpoint"))
    # Only there: not in a file of its own.
    (checkpoint / "chat_template.jinja").unlink()
    config = json.loads((checkpoint / "tokenizer_config.json").read_text())
    (checkpoint / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TELLING}))
    return make_artifact(checkpoint, load_profile("cpu"), folder / "artifact", all_logits=False)


def told(message: str) -> dict[str, Any]:
    return json.loads(message[message.index("{") : message.rindex("}") + 1])


@pytest.fixture(scope="module")
def telling_client(telling: Path) -> Iterator[OpenAI]:
    with serving(telling) as server:
        yield server.client()


@pytest.mark.parametrize("kind", SAID)
def test_requests(telling_client: OpenAI, kind: str) -> None:
    said, expected = SAID[kind]
    model = telling_client.models.list().data[0].id
    with pytest.raises(openai.BadRequestError) as refused:
        telling_client.chat.completions.create(model=model, messages=[USER], extra_body=said)
    assert told(refused.value.body["message"]) == DEFAULTS | expected
    if "reasoning_effort" in said:
        said = {**said, "reasoning": {"effort": said["reasoning_effort"]}}
        del said["reasoning_effort"]
    with pytest.raises(openai.BadRequestError) as refused:
        telling_client.responses.create(model=model, input="What?", extra_body=said)
    assert told(refused.value.body["message"]) == DEFAULTS | expected


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"chat_template_kwargs": {"enable_thinking": "no"}}, "enable_thinking is neither true nor false"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"messages": []}}, "messages is what the conversation says"),
    ],
)
def test_variables_that_are_none(telling_client: OpenAI, said: dict[str, Any], message: str) -> None:
    model = telling_client.models.list().data[0].id
    with pytest.raises(openai.BadRequestError, match=message):
        telling_client.chat.completions.create(model=model, messages=[USER], extra_body=said)


def test_the_command_and_python(telling: Path) -> None:
    arguments = [str(telling), "Why?", "--think", "--template-arg", "preserve_thinking=true"]
    result = CliRunner().invoke(main, [*arguments, "--template-arg", "other=a=b", "--template-arg", "x=1"])
    assert result.exit_code == USER_ERROR
    assert told(result.output) == DEFAULTS | {"thinking": True, "preserve": True, "other": "a=b"}
    result = CliRunner().invoke(main, [*arguments, "--template-arg", "preserve"])
    assert result.exit_code == USER_ERROR and "write NAME=VALUE" in result.output
    with Model.load(telling) as model, pytest.raises(UserError) as refused:
        model.generate([USER], template_kwargs={"reasoning_effort": "high", "enable_thinking": True})
    assert told(str(refused.value)) == DEFAULTS | {"thinking": True, "effort": "high"}


def message(role: str, content: str = "Be brief.") -> dict[str, str]:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("roles", "like"),
    [
        (["system", "system", "user"], ["system", "user"]),
        (["system", "developer", "user"], ["system", "user"]),
        (["developer", "user"], ["system", "user"]),
        (["system", "user", "system"], ["system", "user", "user"]),
        (["user", "assistant", "developer", "user"], ["user", "assistant", "user", "user"]),
    ],
)
def test_agents_messages(client: OpenAI, cpu_artifact: Path, roles: list[str], like: list[str]) -> None:
    name = client.models.list().data[0].id
    asked: Callable[..., Any] = client.chat.completions.create
    answer = asked(model=name, messages=[message(role) for role in roles], max_tokens=1, temperature=0)
    expected = [message(role) for role in like]
    if len(like) < len(roles):
        expected[0]["content"] = "Be brief.\n\nBe brief."
    with Model.load(cpu_artifact) as model:
        prompt = model.apply_chat_template(expected)
        assert answer.usage.prompt_tokens == len(model.encode(prompt))


def test_instructions_and_a_developer_item(client: OpenAI, cpu_artifact: Path) -> None:
    name = client.models.list().data[0].id
    items: Any = [message("developer", "Use British spelling."), message("user", "What is assert?")]
    answer = client.responses.create(
        model=name, instructions="Be brief.", input=items, max_output_tokens=1, temperature=0
    )
    with Model.load(cpu_artifact) as model:
        system = message("system", "Be brief.\n\nUse British spelling.")
        prompt = model.apply_chat_template([system, message("user", "What is assert?")])
        assert answer.usage and answer.usage.input_tokens == len(model.encode(prompt))
