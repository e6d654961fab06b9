"""Calls as models damage them: nothing is swallowed, nothing lost, in whatever pieces they come."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from qwen_runtime.serve.parser import AnswerParser
from qwen_runtime.template import render

from benchmarks.support.checkpoints import TINY
from tests.support.answers import argument, call, calls_of, read_answer

TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "parameters": {
                "type": "object",
                "properties": {
                    "word": {"type": "string"},
                    "limit": {"type": "integer"},
                    "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                    "tags": {"type": "array", "items": {"type": "string"}},
                },
            },
        },
    },
    {"type": "function", "function": {"name": "stop"}},
]
STOP = call("stop", "")
WORD, LIMIT = argument("word", "a b"), argument("limit", "3")
BOTH = [("look", {"word": "a b", "limit": 3}), ("stop", {})]
END = "</function>\n</tool_call>"


def look(body: str) -> str:
    return f"<tool_call>\n<function=look>\n{body}"


# What was written, and the calls and the text that it is.
DAMAGED: list[tuple[str, list[tuple[str, Any]], str | None]] = [
    # As it should be, and with marks in other places.
    (call("look", WORD + LIMIT) + "\n" + STOP, BOTH, None),
    (f"I look.\n\n{call('look', WORD + LIMIT)}\n{STOP}", BOTH, "I look."),
    ((call("look", WORD + LIMIT) + STOP).replace("\n", ""), BOTH, None),
    (call("look", WORD + LIMIT).replace("\n", "\n\n  ", 2) + STOP, BOTH, None),
    # No line break before the end of a value.
    (call("look", "<parameter=word>\na b</parameter>\n" + LIMIT) + STOP, BOTH, None),
    (call("look", WORD + "<parameter=limit>3</parameter>\n") + STOP, BOTH, None),
    # Ends with names, as marks of the beginning have them.
    (call("look", WORD + LIMIT).replace("</parameter>", "</parameter=word>") + STOP, BOTH, None),
    ((call("look", WORD + LIMIT) + STOP).replace("</function>", "</function=look>"), BOTH, None),
    ((call("look", WORD + LIMIT) + STOP).replace("</parameter>", "</parameter=>").replace("\n", ""),
     BOTH, None),
    (look("<parameter=word>\na b\n</parameter=word>\n</function=look>\n") + STOP,
     [("look", {"word": "a b"}), BOTH[1]], None),
    # Lines that end as on Windows.
    ((call("look", WORD + LIMIT) + "\n" + STOP).replace("\n", "\r\n"), BOTH, None),
    (call("look", "<parameter=word>\r\na b\r\nc\r\n</parameter>\r\n"),
     [("look", {"word": "a b\r\nc"})], None),
    (call("look", "<parameter=word>\na b\r</parameter>\n"), [("look", {"word": "a b\r"})], None),
    # No end of a value.
    (call("look", "<parameter=word>\na b\n" + LIMIT) + STOP, BOTH, None),
    (call("look", "<parameter=word>\na b\n\n" + LIMIT), [("look", {"word": "a b\n", "limit": 3})], None),
    (call("look", "<parameter=word>a b" + LIMIT) + STOP, BOTH, None),
    (call("look", WORD + "<parameter=limit>\n3\n") + STOP, BOTH, None),
    (call("look", WORD + "<parameter=limit>\n3") + STOP, BOTH, None),
    (call("look", "<parameter=word>\na b\n<parameter=limit>\n3\n") + STOP, BOTH, None),
    (call("look", "<parameter=word>\na b\n<parameter=unknown>\n3\n") + STOP,
     [("look", {"word": "a b", "unknown": "3"}), BOTH[1]], None),
    (call("other", "<parameter=x>a<parameter=y>b") + STOP, [("other", {"x": "a", "y": "b"}), BOTH[1]], None),
    # No end of the function.
    (look(WORD + LIMIT) + "</tool_call>\n" + STOP, BOTH, None),
    (look(WORD + "<parameter=limit>\n3\n") + "</tool_call>\n" + STOP, BOTH, None),
    (look(WORD + "<parameter=limit>\n3\n") + "</tool_call>\nThere.", BOTH[:1], "There."),
    # No end of the call.
    (look(WORD + LIMIT) + "</function>\n" + STOP, BOTH, None),
    (look(WORD + "<parameter=limit>\n3\n") + "</function>\n" + STOP, BOTH, None),
    (look(WORD + "<parameter=limit>\n3\n") + "</function>\nThere.", BOTH[:1], "There."),
    (look(WORD + LIMIT) + "</function>\nThere.", BOTH[:1], "There."),
    # No end of anything.
    (look(WORD + LIMIT) + STOP, BOTH, None),
    (look(WORD + "<parameter=limit>\n3\n") + STOP, BOTH, None),
    (look(WORD + "<parameter=limit>\n3") + STOP, BOTH, None),
    # Several functions in one call.
    (look(WORD + LIMIT) + "</function>\n<function=stop>\n" + END, BOTH, None),
    (look(WORD + LIMIT) + "<function=stop>\n" + END, BOTH, None),
    (look(WORD + "<parameter=limit>\n3\n") + "<function=stop>\n" + END, BOTH, None),
    (look(WORD + LIMIT) + "</function>\n<function=other>\n" + END, [BOTH[0], ("other", {})], None),
    # A function without a call.
    (f"<function=look>\n{WORD}{LIMIT}</function>\n<function=stop>\n</function>", BOTH, None),
    (f"I look: <function=look>\n{WORD}{LIMIT}{END}\n{STOP}", BOTH, "I look:"),
    (f"<function=look>{WORD}{LIMIT}<function=stop></function>", BOTH, None),
    # Names in quotes, unknown names, names twice.
    (call('"look"', '<parameter="word">\na b\n</parameter>\n' + LIMIT) + STOP, BOTH, None),
    (call("'look'", WORD + LIMIT) + STOP, BOTH, None),
    (call(" look ", WORD + LIMIT) + STOP, BOTH, None),
    (call("other", WORD + LIMIT) + STOP, [("other", {"word": "a b", "limit": "3"}), BOTH[1]], None),
    (call("look", argument("other", "3")), [("look", {"other": "3"})], None),
    (call("look", WORD + LIMIT + argument("word", "c")) + STOP, BOTH, None),
    (call("look", WORD + argument("word", "c") + LIMIT) + STOP, BOTH, None),
    (call("look", "<parameter=word>\na b\n<parameter=word>\nc\n</parameter>\n" + LIMIT) + STOP, BOTH, None),
    ("<tool_call>\n" + call("look", WORD + LIMIT) + STOP, BOTH, None),
    # Rubbish.
    (call("look", WORD + "rubbish\n" + LIMIT) + STOP, BOTH, None),
    (call("look", "rubbish " + WORD + LIMIT + "rubbish ") + STOP, BOTH, None),
    (call("look", WORD + LIMIT) + "</tool_call>" + STOP, BOTH, "</tool_call>"),
    # No calls.
    ("<tool_call>\nnothing\n</tool_call>", [], "<tool_call>\nnothing\n</tool_call>"),
    ("Write <function=look> first.", [], "Write <function=look> first."),
    ("Write `<function=other>\n<parameter=x>`.", [], "Write `<function=other>\n<parameter=x>`."),
    (call("{{ name }}", ""), [], call("{{ name }}", "")),
    ("1 <", [], "1 <"),
    ("a </think> b", [], "a </think> b"),
]  # fmt: skip

# What is written into a value, and back out of it.
VALUES = [
    "in </parameter> line",
    'x = "</parameter>"\ny = "</function>"',
    "</parameter>\nmore",
    "one\n</parameter>\nmore",
    "one\n</parameter>",
    "<parameters>\n<parameter>\n5\n</parameter>\n</parameters>",
    "<function>\n1\n</function>\n",
    "<parameter=x>\n5\n</parameter>",
    "<parameter=limit>\n5\n</parameter>\n",
    f"It writes\n{call('look', argument('word', 'x') + argument('limit', '3'))}\nand ends.",
    call("look", argument("word", "x")),
    f"{call('look', argument('x', 'x'))}\n{STOP}",
    'print("<tool_call>\\n<function=look>\\n<parameter=word>")',
    "<tool_call>",
    "</tool_call>\n",
    "a <tool_call> b",
    "a\n</function>\nb",
    "</function",
    "<function=look>",
    "<",
    "a<b>c</b>\n",
    "\n\n",
    " ",
    "\n",
    "x </think> y",
    "{}",
    "null ",
    "\u2028 中🙂",
]


def ways(text: str) -> Iterator[list[str]]:
    """In one piece, in characters, in every two pieces, and in some others."""
    yield [text]
    yield list(text)
    for at in range(1, len(text)):
        yield [text[:at], text[at:]]
    chance = random.Random(text)
    for _ in range(40):
        cuts = sorted(chance.sample(range(len(text) + 1), min(len(text), chance.randint(2, 12))))
        yield [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    calls = [{**made, "id": None} for made in message.get("tool_calls", ())]
    return {**message, "tool_calls": calls}


def read(text: str, **options: Any) -> dict[str, Any]:
    """What `text` is, in whatever pieces."""
    found = [without_ids(read_answer(pieces, tools=TOOLS, **options)) for pieces in ways(text)]
    assert all(message == found[0] for message in found)
    return found[0]


@pytest.mark.parametrize("text,calls,content", DAMAGED)
def test_damaged_calls(text: str, calls: list[tuple[str, Any]], content: str | None) -> None:
    message = read(text)
    assert (calls_of(message), message["content"]) == (calls, content)
    for made in message["tool_calls"]:
        json.loads(made["function"]["arguments"], object_pairs_hook=no_name_twice)


def no_name_twice(pairs: list[tuple[str, Any]]) -> None:
    assert len(dict(pairs)) == len(pairs)


@pytest.mark.parametrize("value", VALUES)
def test_marks_in_values(value: str) -> None:
    """Through the chat template and back."""
    arguments = {"word": value, "limit": 3, "note": value, "tags": [value]}
    made = {"type": "function", "function": {"name": "look", "arguments": arguments}}
    template = Path(TINY / "chat_template.jinja").read_text(encoding="utf-8")
    answer = {"role": "assistant", "content": "", "tool_calls": [made]}
    text = render({"default": template}, [{"role": "user", "content": "?"}, answer]).split(
        "<|im_start|>assistant\n"
    )[1]
    text = text.removesuffix("<|im_end|>\n") + "\n" + STOP
    assert calls_of(read(text)) == [("look", arguments), ("stop", {})]


def test_every_beginning_of_an_answer() -> None:
    """A cut-off answer reads the same in all pieces, and its arguments are a beginning of the whole ones."""
    made = call("look", argument("word", "a b\nc") + argument("limit", "35"))
    text = f"Hm.\n</think>\n\nI look.\n\n{made}\n{STOP}"
    whole = read(text, thinking=True)
    for end in range(len(text)):
        message = read_answer([text[:end]], True, TOOLS)
        assert without_ids(message) == without_ids(read_answer(text[:end], True, TOOLS))
        for made, complete in zip(message.get("tool_calls", ()), whole["tool_calls"], strict=False):
            assert complete["function"]["arguments"].startswith(made["function"]["arguments"])
        assert (message["content"] or "").startswith(whole["content"]) or end < text.index("<tool_call>")


@pytest.mark.parametrize(
    "body,arguments",
    [
        ("<parameter=word>\na b\nc", '{"word": "a b\\nc'),
        ("<parameter=word>\na b\n</param", '{"word": "a b'),
        ("<parameter=word>\na b\n</parameter>\n", '{"word": "a b"'),
        (WORD + "<parameter=limit>\n12", '{"word": "a b", "limit": 12'),
        (WORD + "<parameter=limit>\n", '{"word": "a b"'),
        (WORD + '<parameter=tags>\n["a", "b', '{"word": "a b", "tags": ["a", "b'),
        ("<parameter=note>\nnul", ""),
        ("<parameter=note>\nnuls", '{"note": "nuls'),
        ("<parameter=wor", ""),
    ],
)
def test_a_call_that_is_cut_off_keeps_what_came(body: str, arguments: str) -> None:
    [made] = read(look(body))["tool_calls"]
    assert made["function"] == {"name": "look", "arguments": arguments}


@pytest.mark.parametrize("name", ["word", "note"])
def test_text_streams_as_it_comes(name: str) -> None:
    """But for a line break that may belong to the end of the value."""
    parser = AnswerParser(False, TOOLS)
    parser.feed(look(f"<parameter={name}>\nOnce"))
    told = []
    for piece in (" upon", " a", " time", "\n", "there", "\nwas"):
        deltas = parser.feed(piece)
        told.append("".join(delta["tool_calls"][0]["function"]["arguments"] for delta in deltas))
    assert told == [" upon", " a", " time", "", "\\nthere", "\\nwas"]
    assert parser.message["tool_calls"][0]["function"]["arguments"] == (
        f'{{"{name}": "Once upon a time\\nthere\\nwas'
    )


def test_calls_in_thoughts() -> None:
    text = f"I should look.\n\n{call('look', WORD + LIMIT)}"
    message = read(text, thinking=True)
    assert (message["reasoning_content"], message["content"]) == ("I should look.", None)
    assert calls_of(message) == BOTH[:1]
    message = read(f"{text}\n{STOP}\n</think>\n\nThere.", thinking=True)
    assert (message["reasoning_content"], message["content"]) == ("I should look.", "There.")
    assert calls_of(message) == BOTH
    for no_call in ("Not <tool_call>.", call("example_function_name", WORD), "<function=look>"):
        message = read(f"{no_call}\n</think>\n\nThere.", thinking=True)
        assert (message["reasoning_content"], message["tool_calls"]) == (no_call, [])
        assert message["content"] == "There."


@pytest.mark.parametrize("thinking", [False, True])
def test_one_call_where_no_more_are_allowed(thinking: bool) -> None:
    text = ("</think>\n\n" if thinking else "") + call("look", WORD + LIMIT)
    for more in ("", "\n" + STOP, "<function=stop>\n</function>", "\nThere.\n" + STOP):
        message = read(text + more, thinking=thinking, several=False)
        assert calls_of(message) == BOTH[:1] and message["content"] is None
