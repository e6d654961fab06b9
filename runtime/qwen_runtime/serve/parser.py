"""What the model writes, taken apart: thoughts, text for the user, calls of tools.

Qwen3.5 writes a call as

    <tool_call>
    <function=NAME>
    <parameter=ARGUMENT>
    VALUE, over one or more lines
    </parameter>
    </function>
    </tool_call>

(source: the published chat template). The parser takes text in any pieces, and passes on each thing as soon
as it is certain what it is.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from qwen_runtime.grammar import takes_text

Delta = dict[str, Any]

_THOUGHT_END = "</think>"
_CALL = "<tool_call>"
_CALL_END = "</tool_call>"
_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>")
_PARAMETER = re.compile(
    r"\s*<parameter=([^>\n]+)>(?:\n?</parameter>|\n(.*?)\n</parameter>|([^\n]*?)</parameter>)", re.DOTALL
)
# Of a whole call that is not written as it should be: the value's last line has the mark, or there is none.
_LOOSE_PARAMETER = re.compile(
    r"\s*<parameter=([^>\n]+)>\n?(.*?)()(?:\n?</parameter>|(?=\n?</function>|\n?</tool_call>))", re.DOTALL
)
_FUNCTION_END = re.compile(r"\s*</function>\s*</tool_call>")
_ARGUMENTS_END = re.compile(r"\s*</function>")
_PYTHON = {"True": True, "False": False, "None": None}  # how the chat template writes them


class AnswerParser:
    """Turns an answer's text into the deltas of OpenAI's chat completion chunks.

    Args:
        thinking: the prompt ended inside a thought.
        tools: the functions that may be called; without any, calls are taken as the text that they are.

    Attributes:
        message: what the deltas add up to.
    """

    def __init__(self, thinking: bool, tools: Sequence[Mapping[str, Any]] = ()) -> None:
        self.message: dict[str, Any] = {"role": "assistant", "content": None}
        self._functions = {tool["function"]["name"]: tool["function"] for tool in tools}
        self._rest = ""
        self._parameter = _PARAMETER
        self._blank = thinking  # nothing but white space since the last mark, and none of it is passed on
        # Each takes what it can from `_rest`, and returns False when it needs more text.
        self._state: Callable[[list[Delta]], bool] = self._thought if thinking else self._text

    def feed(self, text: str) -> list[Delta]:
        """The deltas that `text` adds."""
        self._rest += text
        deltas: list[Delta] = []
        while self._state(deltas):
            pass
        return deltas

    def finish(self) -> list[Delta]:
        """The deltas of what was held back. A call that was cut off stays JSON that was cut off.

        One that lacks no more than its last mark is whole.
        """
        deltas: list[Delta] = []
        if self.in_call and _CALL_END in self._rest:
            self._parameter = _LOOSE_PARAMETER
            deltas += self.feed("")
        if self.in_call and _ARGUMENTS_END.match(self._rest):
            deltas.append(self._end_call())
            self._rest = ""
        rest, self._rest = self._rest, ""
        if self._state == self._thought:
            deltas += self._say("reasoning_content", rest.rstrip())
        elif not self.in_call:
            deltas += self._say("content", _CALL + rest if self._state == self._call else rest)
        return deltas

    @property
    def in_call(self) -> bool:
        """Whether the last call's arguments have no end yet."""
        return self._state == self._arguments

    def _thought(self, deltas: list[Delta]) -> bool:
        text, ended = self._until(_THOUGHT_END)
        deltas += self._say("reasoning_content", text)
        if ended:
            self._state, self._blank = self._text, True
        return ended

    def _text(self, deltas: list[Delta]) -> bool:
        if self._functions:
            text, ended = self._until(_CALL)
        else:
            text, self._rest, ended = self._rest, "", False
        deltas += self._say("content", text)
        if ended:
            self._state = self._call
        return ended

    def _call(self, deltas: list[Delta]) -> bool:
        if found := _FUNCTION.match(self._rest):
            self._rest = self._rest[found.end() :]
            calls = self.message.setdefault("tool_calls", [])
            function = {"name": found[1].strip(), "arguments": ""}
            calls.append({"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function})
            deltas.append({"tool_calls": [{"index": len(calls) - 1, **calls[-1], "function": {**function}}]})
            self._state = self._arguments
            return True
        if _CALL_END in self._rest:  # not a call after all
            text, _, self._rest = self._rest.partition(_CALL_END)
            deltas += self._say("content", _CALL + text + _CALL_END)
            self._state = self._text
            return True
        return False

    def _arguments(self, deltas: list[Delta]) -> bool:
        function = self.message["tool_calls"][-1]["function"]
        if found := self._parameter.match(self._rest):
            name = found[1].strip()
            value = _value(found[2] or found[3] or "", self._schema(function["name"], name))
            fragment = f"{json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}"
            deltas.append(self._argue((", " if function["arguments"] else "{") + fragment))
            self._rest = self._rest[found.end() :]
            return True
        found = _FUNCTION_END.match(self._rest)
        if found or ("<parameter=" not in self._rest and _CALL_END in self._rest):
            deltas.append(self._end_call())
            end = found.end() if found else self._rest.index(_CALL_END) + len(_CALL_END)
            self._rest = self._rest[end:]
            return True
        return False

    def _until(self, mark: str) -> tuple[str, bool]:
        """Take the text before `mark`, without white space at its end, and whether the mark was there."""
        text, found, after = self._rest.partition(mark)
        if found:
            self._rest = after
            return text.rstrip(), True
        held = next((size for size in range(len(mark) - 1, 0, -1) if text.endswith(mark[:size])), 0)
        text = text[: len(text) - held].rstrip()
        self._rest = self._rest[len(text) :]
        return text, False

    def _say(self, kind: str, text: str) -> Iterator[Delta]:
        if self._blank:
            text = text.lstrip()
        if text:
            self._blank = False
            self.message[kind] = (self.message.get(kind) or "") + text
            yield {kind: text}

    def _end_call(self) -> Delta:
        self._state, self._blank = self._text, True
        return self._argue("}" if self.message["tool_calls"][-1]["function"]["arguments"] else "{}")

    def _argue(self, fragment: str) -> Delta:
        calls = self.message["tool_calls"]
        calls[-1]["function"]["arguments"] += fragment
        return {"tool_calls": [{"index": len(calls) - 1, "function": {"arguments": fragment}}]}

    def _schema(self, function: str, parameter: str) -> Mapping[str, Any]:
        parameters = self._functions.get(function, {}).get("parameters") or {}
        found: Mapping[str, Any] = parameters.get("properties", {}).get(parameter, {})
        return found


def _value(text: str, schema: Mapping[str, Any]) -> Any:
    """The argument that `text` stands for: itself where the schema takes text, else JSON."""
    choices = schema.get("enum")
    if takes_text(schema) or (isinstance(choices, list) and text in choices):
        return text
    if text in _PYTHON:
        return _PYTHON[text]
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
