"""The trained checkpoint's chat template and tokenizer, in both engines that read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnxruntime_genai as og
import pytest
from qwen_common.errors import UserError
from qwen_runtime.template import begins_thought, render
from transformers import AutoTokenizer

from benchmarks.support.checkpoints import TINY


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


USER = {"role": "user", "content": "What is `with`?"}
SYSTEM = {"role": "system", "content": "Be brief."}
THOUGHTFUL = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nA statement."}
CALLER = {"role": "assistant", "content": "", "tool_calls": [call("look", word="with", limit=3)]}
TALKER = {"role": "assistant", "content": "I look.", "tool_calls": [call("look", word="a b"), call("stop")]}
SHOWER = {
    "role": "user",
    "content": [
        {"type": "image"},
        {"type": "image_url", "image_url": {"url": "data:,"}},
        {"type": "text", "text": "Which?"},
    ],
}
RESULT = {"role": "tool", "content": "42"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "description": "Find “é” < 3 times",
            "parameters": {"type": "object", "properties": {"word": {"type": "string"}}},
        },
    }
]


@pytest.fixture(scope="module")
def genai_tokenizer(cpu_artifact: Path) -> og.Tokenizer:
    return og.Tokenizer(og.Model(str(cpu_artifact)))


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
@pytest.mark.parametrize(
    "messages",
    [
        [USER],
        [SYSTEM, USER],
        [USER, THOUGHTFUL, USER],
        [USER, CALLER, RESULT, THOUGHTFUL, USER],
        [SYSTEM, USER, TALKER, RESULT],
        [USER, {**CALLER, "content": None}, RESULT],
        [SYSTEM, SHOWER],
    ],
    ids=["user", "system", "thoughts", "call", "two-calls", "no-content", "pictures"],
)
def test_both_engines_render_the_same(
    genai_tokenizer: og.Tokenizer, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
) -> None:
    """C, C++ and C# programs have only ONNX Runtime GenAI's engine."""
    expected = AutoTokenizer.from_pretrained(TINY).apply_chat_template(
        messages, tools=tools, add_generation_prompt=True, tokenize=False
    )
    found = genai_tokenizer.apply_chat_template(
        json.dumps(messages),
        template_str=(TINY / "chat_template.jinja").read_text(encoding="utf-8"),
        add_generation_prompt=True,
        **({"tools": json.dumps(tools)} if tools else {}),
    )
    assert found == expected
    assert expected.endswith("<|im_start|>assistant\n<think>\n")


def test_thoughts_are_dropped_and_calls_kept() -> None:
    text = AutoTokenizer.from_pretrained(TINY).apply_chat_template(
        [USER, TALKER, RESULT, THOUGHTFUL, USER],
        add_generation_prompt=True,
        enable_thinking=False,
        tokenize=False,
    )
    assert text == (
        "<|im_start|>user\nWhat is `with`?<|im_end|>\n"
        "<|im_start|>assistant\nI look.\n\n"
        "<tool_call>\n<function=look>\n<parameter=word>\na b\n</parameter>\n</function>\n</tool_call>\n"
        "<tool_call>\n<function=stop>\n</function>\n</tool_call><|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n42\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\nA statement.<|im_end|>\n"
        "<|im_start|>user\nWhat is `with`?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


def test_template_is_the_same_in_every_file() -> None:
    """Older readers take the template from tokenizer_config.json."""
    template = (TINY / "chat_template.jinja").read_text(encoding="utf-8")
    assert template == (TINY.parent / "chat_template.jinja").read_text(encoding="utf-8")
    assert template == json.loads((TINY / "tokenizer_config.json").read_text("utf-8"))["chat_template"]


def test_both_tokenizers_agree(genai_tokenizer: og.Tokenizer) -> None:
    text = (TINY.parent / "eval.txt").read_text(
        encoding="utf-8"
    ) + "<|im_start|>ünïcödé 🙂 <think>\n\n\n</think>"
    expected = AutoTokenizer.from_pretrained(TINY)(text, add_special_tokens=False)["input_ids"]
    assert genai_tokenizer.encode(text).tolist() == expected


def test_template_that_refuses() -> None:
    question = [{"role": "user", "content": "What is assert?"}]
    with pytest.raises(UserError, match="does not take these messages: only users"):
        render({"default": "{{ raise_exception('only users') }}"}, question)
    with pytest.raises(UserError, match="does not take these messages"):
        render({"default": "{{ messages.__class__.__mro__ }}"}, question)


# The ends of published templates, with what of them decides.
_TURN = "{%- for message in messages %}{{- message.role + message.content }}{%- endfor %}"
_OPEN, _EMPTY = "{{- '<think>\\n' }}", "{{- '<think>\\n\\n</think>\\n\\n' }}"
_ENDS = {
    "Qwen3-Next-Thinking": f"{{{{- 'assistant\\n' }}}}{_OPEN}",
    "Qwen3-Next-Instruct": "{{- 'assistant\\n' }}",
    "Qwen3": "{%- if enable_thinking is defined and enable_thinking is false %}" + _EMPTY + "{%- endif %}",
    "Qwen3.5": "{%- if enable_thinking is defined and enable_thinking is false %}" + _EMPTY
    + "{%- else %}" + _OPEN + "{%- endif %}",
}  # fmt: skip


@pytest.mark.parametrize(
    "name,asked,otherwise",
    [
        ("Qwen3-Next-Thinking", True, True),
        ("Qwen3-Next-Instruct", False, False),
        ("Qwen3", False, False),  # the model begins it
        ("Qwen3.5", True, False),
    ],
)
def test_whether_a_prompt_ends_in_a_thought(name: str, asked: bool, otherwise: bool) -> None:
    end = f"{_TURN}{{%- if add_generation_prompt %}}{_ENDS[name]}{{%- endif %}}"
    for enable_thinking, expected in ((True, asked), (False, otherwise)):
        variables = {"enable_thinking": enable_thinking}
        assert begins_thought({"default": end}, [USER], variables=variables) == expected
        bare = {**variables, "add_generation_prompt": False}
        assert not begins_thought({"default": end}, [USER], variables=bare)
    assert not begins_thought({"default": "{{ raise_exception('no') }}"}, [USER])
    assert not begins_thought({}, [USER])


def test_what_training_marks_is_rendered_as_transformers_renders_it() -> None:
    template = (
        "{% set said = 'x' %}{% for message in messages %}{{ message.role + ': ' }}{% generation %}\n"
        "{% set said = message.content %}{{ said }}{% endgeneration %}\n{{ said }}{% endfor %}"
    )
    expected = AutoTokenizer.from_pretrained(TINY).apply_chat_template(
        [USER, RESULT], chat_template=template, tokenize=False
    )
    assert render({"default": template}, [USER, RESULT]) == expected
