"""Messages as agents send them, and where a template is found: the test template and the published one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from qwen_common.errors import UserError
from qwen_runtime.template import check, read_templates, render
from transformers.utils.chat_template_utils import render_jinja_template

from benchmarks.support.checkpoints import TINY
from tests.runtime.test_template import CALLER, RESULT, SHOWER, SYSTEM, TALKER, THOUGHTFUL, TOOLS, USER

# Data, of which the project has no copy.
PUBLISHED = Path(
    os.environ.get("QWEN_CHAT_TEMPLATE")
    or Path(__file__).parents[3] / "shared/data/qwen3_5/chat_template.jinja"
)
DEVELOPER = {"role": "developer", "content": "Use British spelling."}
LATER = {"role": "system", "content": "The date is known."}
PARTS = {"role": "system", "content": [{"type": "text", "text": "In parts."}]}


@pytest.fixture(scope="module", params=["test", "published"])
def template(request: pytest.FixtureRequest) -> str:
    if request.param == "test":
        return (TINY / "chat_template.jinja").read_text(encoding="utf-8")
    if not PUBLISHED.is_file():
        pytest.skip("needs the published template: give its path in QWEN_CHAT_TEMPLATE")
    return PUBLISHED.read_text(encoding="utf-8")


def by_transformers(template: str, messages: list[dict[str, Any]], **variables: Any) -> str:
    prompts, _ = render_jinja_template(
        [messages], chat_template=template, add_generation_prompt=True, **variables
    )
    return prompts[0]


@pytest.mark.parametrize("variables", [{}, {"enable_thinking": False}, {"enable_thinking": True}], ids=str)
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
@pytest.mark.parametrize(
    "messages",
    [
        [USER],
        [SYSTEM, USER],
        [PARTS, USER],
        [USER, THOUGHTFUL, USER],
        [USER, CALLER, RESULT, THOUGHTFUL, USER],
        [SYSTEM, USER, TALKER, RESULT, RESULT],
        [SYSTEM, SHOWER],
    ],
)
def test_ordinary_conversations_are_rendered_as_by_transformers(
    template: str,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    variables: dict[str, Any],
) -> None:
    expected = by_transformers(template, messages, tools=tools, **variables)
    assert render({"default": template}, messages, tools or (), variables) == expected


@pytest.mark.parametrize(
    ("messages", "carried"),
    [
        ([SYSTEM, LATER, USER], [{**SYSTEM, "content": "Be brief.\n\nThe date is known."}, USER]),
        ([SYSTEM, DEVELOPER, USER], [{**SYSTEM, "content": "Be brief.\n\nUse British spelling."}, USER]),
        ([DEVELOPER, USER], [{**DEVELOPER, "role": "system"}, USER]),
        ([SYSTEM] * 2 + [LATER, USER], [{**SYSTEM, "content": 2 * "Be brief.\n\n" + LATER["content"]}, USER]),
        ([SYSTEM, PARTS, USER], [{**SYSTEM, "content": "Be brief.\n\nIn parts."}, USER]),
        ([{**SYSTEM, "content": ""}, LATER, USER], [LATER, USER]),
        ([SYSTEM, USER, LATER], [SYSTEM, USER, {**LATER, "role": "user"}]),
        ([USER, DEVELOPER], [USER, {**DEVELOPER, "role": "user"}]),
        ([USER, CALLER, RESULT, LATER], [USER, CALLER, RESULT, {**LATER, "role": "user"}]),
        ([USER, THOUGHTFUL, DEVELOPER, USER], [USER, THOUGHTFUL, {**DEVELOPER, "role": "user"}, USER]),
    ],
)  # fmt: skip
def test_system_and_developer_messages_anywhere(
    template: str, messages: list[dict[str, Any]], carried: list[dict[str, Any]]
) -> None:
    before = json.dumps(messages)
    assert render({"default": template}, messages) == by_transformers(template, carried)
    assert json.dumps(messages) == before


def test_a_template_that_takes_later_system_messages_gets_them() -> None:
    template = "{% for message in messages %}{{ message.role }}:{{ message.content }};{% endfor %}"
    found = render({"default": template}, [SYSTEM, DEVELOPER, USER, LATER])
    assert (
        found
        == f"system:Be brief.\n\nUse British spelling.;user:{USER['content']};system:{LATER['content']};"
    )


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [SYSTEM],
        [SYSTEM, LATER],
        [THOUGHTFUL],
        [{"role": "user", "content": "<tool_response>\n42\n</tool_response>"}],
        [{"role": "critic", "content": "No."}, USER],
        [USER, {"role": "user", "content": [{"type": "sound", "sound": "x"}]}],
        [{"role": "system", "content": [{"type": "image"}]}, USER],
    ],
    ids=["nothing", "system", "systems", "answer", "result", "role", "part", "picture"],
)
def test_the_test_template_raises_where_the_published_one_does(
    template: str, messages: list[dict[str, Any]]
) -> None:
    with pytest.raises(Exception, match=r"No messages|No user query|Unexpected|cannot contain|beginning"):
        by_transformers(template, messages)
    with pytest.raises(UserError, match=r"does not take these messages: (No|Unexpected|System)"):
        render({"default": template}, messages)


@pytest.mark.parametrize("messages", [[SYSTEM, LATER, USER], [USER, LATER], [SYSTEM, USER, SYSTEM]])
def test_both_templates_refuse_later_system_messages(template: str, messages: list[dict[str, Any]]) -> None:
    with pytest.raises(Exception, match="System message must be at the beginning"):
        by_transformers(template, messages)


def test_variables_go_through_as_they_are() -> None:
    template = (
        "{{ effort is defined }} {{ flag is true }} {{ numbers | tojson }} {{ none is none }} "
        "{{ add_generation_prompt }}"
    )
    variables = {
        "effort": "x",
        "flag": True,
        "numbers": [1, {"a": None}],
        "none": None,
        "add_generation_prompt": 0,
    }
    assert render({"default": template}, [USER], (), variables) == 'True True [1, {"a": null}] True 0'
    for name in ("messages", "tools"):
        with pytest.raises(UserError, match=f"variable {name} is what the conversation says"):
            render({"default": template}, [USER], (), {name: []})


CONFIG_TEMPLATES: dict[str, tuple[Any, Mapping[str, str]]] = {
    "text": ("plain", {"default": "plain"}),
    "named": (
        [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}],
        {"default": "plain", "tool_use": "with tools"},
    ),
    "none": (None, {}),
}


@pytest.mark.parametrize("kind", CONFIG_TEMPLATES)
def test_a_template_in_tokenizer_config(kind: str, tmp_path: Path) -> None:
    written, expected = CONFIG_TEMPLATES[kind]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": written}))
    assert read_templates(tmp_path) == expected
    if kind == "named":
        assert render(expected, [USER]) == "plain"
        assert render(expected, [USER], TOOLS) == "with tools"
    (tmp_path / "chat_template.jinja").write_text("of its own")
    assert read_templates(tmp_path) == {"default": "of its own"}


def test_no_template(tmp_path: Path) -> None:
    assert read_templates(tmp_path) == {}
    with pytest.raises(UserError, match="has no chat template: give a raw prompt"):
        render({}, [USER])
    for content in ("{", '{"chat_template": [1]}', '{"chat_template": 5}', "[]"):
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(UserError, match="has no chat template that can be read"):
            read_templates(tmp_path)
    with pytest.raises(UserError, match="the default chat template is not valid"):
        check({"default": "{% if %}"})
