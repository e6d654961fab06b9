"""Calls as JSON between marks, in pieces of every size."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from qwen_runtime.serve.parser import AnswerParser

from tests.support.answers import calls_of, hermes_call, pieces, read_answer

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "parameters": {
                "type": "object",
                "properties": {"word": {"type": "string"}, "limit": {"type": "integer"}, "any": {}},
            },
        },
    },
    {"type": "function", "function": {"name": "stop"}},
]
SIZES = pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])


def parse(text: str, size: int, thinking: bool = False, **more: Any) -> dict[str, Any]:
    return read_answer(pieces(text, size), thinking, TOOLS, dialect="hermes", **more)


@SIZES
def test_thoughts_text_and_calls(size: int) -> None:
    text = "Hm.\n</think>\n\nI look.\n" + hermes_call("look", '{"word": "a b", "limit": 3}')
    message = parse(text + "\n" + hermes_call("stop", "{}"), size, thinking=True)
    assert (message["reasoning_content"], message["content"]) == ("Hm.", "I look.")
    assert calls_of(message) == [("look", {"word": "a b", "limit": 3}), ("stop", {})]


@SIZES
@pytest.mark.parametrize(
    "value",
    [
        "", "a\nb\t\"c\" \\ /", "中文 🙂 \u00e9", "</tool_call> <tool_call>", '{"a": [1]}', 5, -1.5e3,
        True, None, [], {}, [1, [2, {"a": "]}"}], "x, y"], {"a": {"b": "}", "c": None}}, 12345678901234567890,
    ],
)  # fmt: skip
def test_whatever_json_has_is_read(value: Any, size: int) -> None:
    """As `json` reads it, with characters escaped and not."""
    for plain in (False, True):
        arguments = json.dumps({"any": value, "word": "end"}, ensure_ascii=plain)
        assert calls_of(parse(hermes_call("look", arguments), size)) == [
            ("look", {"any": value, "word": "end"})
        ]
        pretty = json.dumps({"any": value, "word": "end"}, ensure_ascii=plain, indent=2)
        assert calls_of(parse(hermes_call("look", pretty), size)) == [("look", {"any": value, "word": "end"})]


@SIZES
@pytest.mark.parametrize(
    "written,value",
    [
        ('"a\nb"', "a\nb"),  # a raw line break
        (r'"\d+\.\w \u12 \x"', r"\d+\.\w \u12 \x"),  # no escapes of JSON
        (r'"\ud83d x"', "\ufffd x"),  # half a pair
        ("True", True),
        ("None", None),
        ("['a', (1, 2)]", ["a", [1, 2]]),
        ("{'a': \"it's\"}", {"a": "it's"}),
        ("NaN", "NaN"),
        ("Infinity", "Infinity"),
        ("several words", "several words"),
    ],
)
def test_what_is_nearly_json(written: str, value: Any, size: int) -> None:
    message = parse(hermes_call("look", f'{{"any": {written}, "limit": 5.0}}'), size)
    assert calls_of(message) == [("look", {"any": value, "limit": 5})]


LOOK, STOP = '{"name": "look", "arguments": {"word": "a"}}', '{"name": "stop"}'
LOOKS, STOPS = ("look", {"word": "a"}), ("stop", {})


@SIZES
@pytest.mark.parametrize(
    "inside,calls",
    [
        (f"<tool_call>\n{LOOK}", [LOOKS]),
        ('{"name":"look","arguments":{"word":"a"}}', [LOOKS]),
        ('{"arguments": {"word": "a"}, "name": "look"}', [LOOKS]),
        ('{"name": "look", "parameters": {"word": "a"}}', [LOOKS]),
        ('{"id": 1, "name": "look", "type": "f", "arguments": {"word": "a"}}', [LOOKS]),
        ('{"name": "look", "arguments": {"word": "a"}', [LOOKS]),
        ('{"name": "look", "arguments": {"word": "a"', [LOOKS]),
        ('{"name": "look", "arguments": {"word": "a"}}}', [LOOKS]),
        ('{"name": "look", "arguments": {"word": "a",}}', [LOOKS]),
        ('{"name": "look", "arguments": {"word": "a", "word": "b"}}', [LOOKS]),
        ('{"name": "look", "arguments": "{\\"word\\": \\"a\\"}"}', [LOOKS]),
        ('{"name": "stop"', [STOPS]),
        ('{"name": "stop", "arguments": null}', [STOPS]),
        ('{"name": "stop", "arguments": ""}', [STOPS]),
        ('{"name": "other", "arguments": {"a": 1}}', [("other", {"a": 1})]),
        (f"{LOOK}\n{STOP}", [LOOKS, STOPS]),
        (f"[{LOOK}, {STOP}]", [LOOKS, STOPS]),
        (f"{LOOK}\n<tool_call>\n{STOP}", [LOOKS, STOPS]),
    ],
)
def test_looser_forms(inside: str, calls: Any, size: int) -> None:
    for text in (f"<tool_call>\n{inside}\n</tool_call>", f"<tool_call>{inside}</tool_call>"):
        message = parse(f"I look.\n{text}", size)
        assert (message["content"], calls_of(message)) == ("I look.", calls)
        assert parse(f"{text}\nDone.", size)["content"] == "Done."


@SIZES
@pytest.mark.parametrize(
    "text",
    [
        "a <tool and </tool_call> <tool_call",
        "<tool_call>\nlook(word)\n</tool_call>",
        '<tool_call>\n{"word": "a"}\n</tool_call>',
        '<tool_call>\n{"name": "a b", "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": 5, "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name',
        '{"name": "look", "arguments": {}}',
        "<function=look>\n</function>",
        "Use <tool_call> for {this}.",
    ],
)
def test_what_only_looks_like_a_call_stays_text(text: str, size: int) -> None:
    assert parse(text, size) == {"role": "assistant", "content": text}


@pytest.mark.parametrize("size", [1, 1000])
def test_calls_in_thoughts(size: int) -> None:
    """Only of known functions: the model thinks aloud of others."""
    unknown = hermes_call("other", "{}")
    message = parse(f"I could {unknown}.</think>Yes.", size, thinking=True)
    assert message == {"role": "assistant", "reasoning_content": f"I could {unknown}.", "content": "Yes."}
    message = parse(f"I must. {hermes_call('stop', '{}')}", size, thinking=True)
    assert calls_of(message) == [("stop", {})]


@SIZES
def test_the_end_of_a_thought_inside_a_call(size: int) -> None:
    text = '<tool_call>\n{"name": "stop", "</think>": 1, "arguments": {}}\n</tool_call>'
    assert calls_of(parse(text, size, thinking=True)) == [("stop", {})]


@pytest.mark.parametrize("size", [1, 1000])
def test_cut_off(size: int) -> None:
    whole = hermes_call("look", '{"word": "a b", "limit": 3}')
    seen = set()
    for end in range(len('<tool_call>\n{"name": "look", "arguments": {'), len(whole)):
        [made] = parse(whole[:end], size)["tool_calls"]
        arguments = made["function"]["arguments"]
        assert '{"word": "a b", "limit": 3}'.startswith(arguments)
        seen.add(arguments)
    assert {"", '{"word": "a', '{"word": "a b"', '{"word": "a b", "limit": 3}'} <= seen


def test_a_string_is_streamed() -> None:
    parser = AnswerParser(False, TOOLS, dialect="hermes")
    parser.feed('<tool_call>\n{"name": "look", "arguments": {"word": "one')
    [delta] = parser.feed(" two")
    assert delta["tool_calls"][0]["function"] == {"arguments": " two"}


def test_one_call_where_more_are_not_wanted() -> None:
    text = hermes_call("stop", "{}") + "\n" + hermes_call("look", "{}")
    assert calls_of(parse(text, 3, several=False)) == [("stop", {})]


def test_long_answers_take_no_longer_for_each_piece() -> None:
    def seconds(length: int) -> float:
        values = json.dumps({"any": ["x" * 10] * (length // 14), "word": "y" * length})
        begun = time.process_time()
        parse(hermes_call("look", values), 4)
        return time.process_time() - begun

    assert seconds(60_000) < 20 * seconds(6_000) + 1
