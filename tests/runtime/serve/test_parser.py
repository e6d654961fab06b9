"""What the model writes, taken apart, in pieces of every size."""

from __future__ import annotations

import json
import re
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from qwen_runtime.template import render
from qwen_runtime.tool_calls import qwen3_5

from benchmarks.support.checkpoints import TINY
from tests.support.answers import argument, call, calls_of, pieces, read_answer

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "parameters": {
                "type": "object",
                "properties": {
                    "word": {"type": "string"},
                    "limit": {"type": "integer"},
                    "deep": {"type": "boolean"},
                    "tags": {"type": "array"},
                    "unit": {"enum": ["km", "5"]},
                    "maybe": {"type": ["integer", "null"]},
                    "any": {},
                },
            },
        },
    },
    {"type": "function", "function": {"name": "stop"}},
]


def parse(text: str, size: int, thinking: bool = False, tools: Any = TOOLS) -> dict[str, Any]:
    return read_answer(pieces(text, size), thinking, tools)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_thoughts_text_and_calls(size: int) -> None:
    text = "I wonder.\n\nYes.\n</think>\n\nI look.\n\n" + call(
        "look", argument("word", "a b") + argument("limit", "3")
    )
    message = parse(text + "\n" + call("stop", ""), size, thinking=True)
    assert message["reasoning_content"] == "I wonder.\n\nYes."
    assert message["content"] == "I look."
    assert calls_of(message) == [("look", {"word": "a b", "limit": 3}), ("stop", {})]
    assert len({found["id"] for found in message["tool_calls"]}) == 2


@pytest.mark.parametrize("size", [1, 4, 1000])
@pytest.mark.parametrize(
    "name,written,value",
    [
        ("word", "5", "5"),
        ("word", "", ""),
        ("word", "one\n\ntwo\n", "one\n\ntwo\n"),
        ("word", 'say "</tool_call>" and <parameter', 'say "</tool_call>" and <parameter'),
        ("word", "in </parameter> line", "in </parameter> line"),
        ("word", "中文 🙂", "中文 🙂"),
        ("limit", "many", "many"),
        ("deep", "True", True),
        ("deep", "false", False),
        ("tags", '["a", 1]', ["a", 1]),
        ("unit", "5", "5"),
        ("maybe", "None", None),
        ("any", "12", "12"),
        ("unknown", "12", "12"),
    ],
)
def test_values(name: str, written: str, value: Any, size: int) -> None:
    assert calls_of(parse(call("look", argument(name, written)), size)) == [("look", {name: value})]


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("thinking", [False, True])
def test_a_thought_that_the_model_begins(thinking: bool, size: int) -> None:
    """As it does with a template that leaves it to the model; some write the mark although it is there."""
    text = "<think>\nHm.\n</think>\n\nYes <think>, no."
    for begin in ("", "\n", " "):
        message = parse(begin + text, size, thinking=thinking)
        assert (message["reasoning_content"], message["content"]) == ("Hm.", "Yes <think>, no.")
    for other in ("<thin", "<thinking>", "a <think>"):
        assert parse(other, size)["content"] == other


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_looser_forms(size: int) -> None:
    arguments = "<parameter=word>a b</parameter><parameter=limit>\n</parameter>"
    text = f"<tool_call><function=look>{arguments}</function></tool_call>"
    assert calls_of(parse(text, size)) == [("look", {"word": "a b", "limit": ""})]


@pytest.mark.parametrize("size", [1, 5, 1000])
@pytest.mark.parametrize(
    "text,content",
    [
        ("a <tool and </think> <tool_call", "a <tool and </think> <tool_call"),
        ('<tool_call>\n{"name": "look"}\n</tool_call>', '<tool_call>\n{"name": "look"}\n</tool_call>'),
        ("I see.\n\n<tool_call>\n<func", "I see.\n\n<tool_call>\n<func"),
        ("  indented\n ", "  indented\n "),
    ],
)
def test_what_only_looks_like_a_call_stays_text(text: str, content: str, size: int) -> None:
    assert parse(text, size) == {"role": "assistant", "content": content}


@pytest.mark.parametrize("size", [1, 1000])
def test_calls_without_tools_are_text(size: int) -> None:
    text = "See: " + call("look", "")
    assert parse(text, size, tools=()) == {"role": "assistant", "content": text}


@pytest.mark.parametrize("size", [1, 1000])
def test_cut_off(size: int) -> None:
    assert parse("hm <", size, thinking=True) == {
        "role": "assistant", "content": None, "reasoning_content": "hm <",
    }  # fmt: skip
    message = parse(call("look", argument("word", "a") + argument("limit", "3"))[:70], size)
    arguments = message["tool_calls"][0]["function"]["arguments"]
    assert arguments == '{"word": "a"'
    garbled = parse(call("look", argument("word", "a") + "garbage\n"), size)
    assert calls_of(garbled) == [("look", {"word": "a"})]


@pytest.mark.parametrize("size", [1, 1000])
@pytest.mark.parametrize("missing", ["</tool_call>", "\n</tool_call>", "ool_call>"])
def test_a_call_that_lacks_only_its_last_mark_is_whole(missing: str, size: int) -> None:
    for name, body, arguments in ("look", argument("word", "a"), {"word": "a"}), ("stop", "", {}):
        message = parse(call(name, body).removesuffix(missing), size)
        assert calls_of(message) == [(name, arguments)]


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("body", ["\na b</parameter>\n", "\na b\n", "\na b", "a b\n"])
def test_a_whole_call_with_marks_out_of_place(body: str, size: int) -> None:
    message = parse(call("look", f"<parameter=word>{body}") + "\n" + call("stop", ""), size)
    found = [(made["function"]["name"], made["function"]["arguments"]) for made in message["tool_calls"]]
    assert found == [("look", '{"word": "a b"}'), ("stop", "{}")]
    assert message["content"] is None


def test_back_through_the_template() -> None:
    """What was parsed renders as the text that it came from."""
    text = (
        "I look.\n\n"
        + call("look", argument("word", "a b") + argument("limit", "3"))
        + "\n"
        + call("stop", "")
    )
    message = parse(text, 5)
    for found in message["tool_calls"]:
        found["function"]["arguments"] = json.loads(found["function"]["arguments"])
    template = Path(TINY / "chat_template.jinja").read_text(encoding="utf-8")
    user = {"role": "user", "content": uuid.uuid4().hex}
    rendered = render({"default": template}, [user, message, {"role": "tool", "content": "42"}], tools=TOOLS)
    assert f"<|im_start|>assistant\n{text}<|im_end|>\n<|im_start|>user\n<tool_response>\n42" in rendered


class Counting:
    """A regular expression that counts the characters it is given."""

    def __init__(self, pattern: re.Pattern[str]) -> None:
        self._pattern = pattern
        self.characters = 0

    def __getattr__(self, name: str) -> Any:
        def look(text: str, at: int = 0) -> Any:
            # A match of white space looks no further than that.
            near = name == "match" and self._pattern.pattern == r"\s*"
            found = getattr(self._pattern, name)(text, at)
            self.characters += found.end() - at + 1 if near else len(text) - at
            return found

        return look


CALLED = "<tool_call>\n<function=look>\n<parameter="


@pytest.mark.parametrize(
    "begin,unit",
    [
        ("", "word "),
        ("", " "),
        ("", "<"),
        ("", "<tool_call>"),
        ("", "<tool_call>x"),
        ("<tool_call>", "\n"),
        ("<tool_call>\n<function=", "a"),
        ("<function=look>", " "),
        (f"{CALLED}word>\n", "a b"),
        (f"{CALLED}word>\n", "\n"),
        (f"{CALLED}word>\nx", "<tool_call> "),
        (f"{CALLED}word>\n   x", "</tool_call> y"),
        (f"{CALLED}word>\nx\n</parameter>", " "),
        (f"{CALLED}", "a"),
        (f"{CALLED}tags>\n", '"a", '),
        (f"{CALLED}limit>\n5\n</parameter>\n", "rubbish "),
        (f"{CALLED}limit>\n5\n</parameter>\n</function>", "\n"),
    ],
)
@pytest.mark.parametrize("thinking", [False, True])
def test_work_grows_with_the_answer(
    monkeypatch: pytest.MonkeyPatch, begin: str, unit: str, thinking: bool
) -> None:
    """Not with its square: counted in characters that regular expressions look at."""

    def work(times: int) -> int:
        counting = {}
        for name in ("_MARK", "_OPENING", "_SPACE", "_UNFINISHED"):
            counting[name] = Counting(getattr(plain, name))
            monkeypatch.setattr(qwen3_5, name, counting[name])
        message = parse(begin + unit * times, 1, thinking)
        assert len(json.dumps(message)) < 20 * len(begin + unit * times) + 1000
        return sum(pattern.characters for pattern in counting.values())

    plain = SimpleNamespace(**vars(qwen3_5))
    times = 2 * qwen3_5.LONGEST_NAME if unit == "a" else 200
    once = work(times)
    assert work(2 * times) < 2.3 * once + 1000
