"""The dialect in which Hermes, Qwen2.5, Qwen3 and Qwen3-Next call tools:

    <tool_call>
    {"name": NAME, "arguments": {ARGUMENT: VALUE, ...}}
    </tool_call>

Models leave the last bracket or mark out, put the arguments before the name, write several calls into one
pair of marks, break lines inside of strings, or write Python's literals: all that is read. Text inside of a
string is the string's, marks too.

Sources: the published chat templates; vLLM's `hermes` and SGLang's `qwen` parsers for what others take.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any, NamedTuple

from qwen_runtime.tool_calls import values
from qwen_runtime.tool_calls.arguments import ArgumentsReader
from qwen_runtime.tool_calls.json_schema import allowed, argument_schema
from qwen_runtime.tool_calls.protocol import Opening

CALL, CALL_END = "<tool_call>", "</tool_call>"
NAME, ARGUMENTS = "name", "arguments"

_ARGUMENTS = (ARGUMENTS, "parameters")  # the second is what models write that have seen other dialects
_LONGEST_HEAD = 20_000  # characters before the arguments; all are looked at with each piece of an answer
_OPENING = re.compile(rf"(?:{CALL}\s*){{1,2}}(?:\[\s*)?")
_NAME = re.compile(r"[^\s{}<>\"']+")
_SPACE = re.compile(r"[\s,]*")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*+"', re.DOTALL)
_COLON = re.compile(r"\s*:\s*")
_TAIL = re.compile(r"[\s\]},]*")  # after a call's arguments, before its mark
_BEFORE_MEMBER = re.compile(rf'"|\}}|{CALL_END}|{CALL}')
# As much of a string as can be read for certain; its end is no part.
_CERTAIN = re.compile(r'(?:[^"\\]++|\\u[0-9a-fA-F]{4}|\\[^u])*+', re.DOTALL)
_UNFINISHED_ESCAPE = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?\Z")
_HALF_PAIR = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}\Z")
_NO_ESCAPE = re.compile(r'\\(?:(["\\/bfnrt]|u[0-9a-fA-F]{4})|)')
_STEP = re.compile(rf"""["'\[\](){{}},]|{CALL_END}|{CALL}""")
_IN_QUOTES = {quote: re.compile(rf"\\.|{quote}", re.DOTALL) for quote in "\"'"}


def asked_for(template: str) -> bool:
    """Whether a chat template tells the model to write calls so."""
    return CALL in template and f'"{ARGUMENTS}"' in template.replace("\\", "")


def find_call(text: str, functions: Collection[str], final: bool, strict: bool = False) -> Opening:
    """As `protocol.Reading`. A call without `<tool_call>` is text."""
    for found in _OPENING.finditer(text):
        begun = not final and CALL.startswith(text[found.end() :])  # the mark once more, perhaps
        head = None if begun else _head(text, found.end(), final)
        if head is None:
            return Opening(found.start(), found.end(), None)
        if head.name is not None and (head.name in functions or not strict):
            return Opening(found.start(), head.end, head.name)
    end = len(text) if final else _complete(text)
    return Opening(end, end, None)


def after_call(text: str, final: bool) -> tuple[int, str | None] | None:
    """As `protocol.Reading`."""
    at = _after(_TAIL, text, 0)
    while text.startswith('"', at):  # members after the arguments, such as the name
        key = _STRING.match(text, at)
        colon = key and _COLON.match(text, key.end())
        if key and not colon and text[key.end() :].strip():
            return at, None
        end = _Extent(colon.end()).find(text) if colon else None
        if end is None:
            return (at, None) if final else None
        at = _after(_TAIL, text, end)
    if text.startswith(CALL_END, at):
        return at + len(CALL_END), None
    if text.startswith("{", at):
        head = _head(text, at, final)
        return head and ((head.end, head.name) if head.name is not None else (at, None))
    return None if not final and CALL_END.startswith(text[at:]) else (at, None)


class CallReader(ArgumentsReader):
    """As `protocol.CallReader`."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters)
        self._begun = False

    def _step(self, final: bool) -> str | None:
        if not self._begun:
            if not self._begin(final):
                return None
            return "{}" if self.ended else ""
        found = _BEFORE_MEMBER.search(self.rest)
        if found is None:
            self.rest = self.rest[_complete(self.rest) :]
            return None
        if found[0] == '"':
            return "" if self._member(found.start(), final) else None
        self.rest = self.rest[found.end() if found[0] == "}" else found.start() :]
        return self._end()

    def _begin(self, final: bool) -> bool:
        """Into the object; False where it takes more text."""
        self.rest = self.rest.lstrip()
        if self.rest.startswith('"'):  # an object as a text
            found = _STRING.match(self.rest)
            if found is None and not final:
                return False
            inner = _decoded(found[0][1:-1]) if found else ""
            self.rest = inner.lstrip() + self.rest[found.end() if found else len(self.rest) :]
        if self.rest.startswith("{"):
            self._begun = True
            self.rest = self.rest[1:]
        elif final or not "null".startswith(self.rest):  # null, or the end of a call without arguments
            self.ended = True
            self.rest = self.rest.removeprefix("null")
        return self._begun or self.ended

    def _member(self, at: int, final: bool) -> bool:
        """To the value of the argument whose name begins at `at`; False where it takes more text."""
        self.rest = self.rest[at:]
        key = _STRING.match(self.rest)
        if key is None:
            return False
        colon = _COLON.match(self.rest, key.end())
        if colon is None:
            if not self.rest[key.end() :].strip() and not final:
                return False
            self.rest = self.rest[key.end() :]  # no name
            return True
        if colon.end() == len(self.rest):
            return False
        name = _decoded(key[0][1:-1])
        begin = self._begin_value(name)
        self.rest = self.rest[colon.end() :]
        if self.rest.startswith('"'):
            self.rest = self.rest[1:]
            self._value = _String(begin)
        else:
            self._value = _Other(begin, argument_schema(self._forms, name), self._parameters)
        return True


class _String:
    """Reads a string, after its first quote.

    Args:
        begin: JSON before it; without any, it is passed over.

    Attributes:
        ended: it is whole.
        rest: the text after its end, or what cannot be read yet.
    """

    def __init__(self, begin: str) -> None:
        self.ended = False
        self.rest = ""
        self._begin = begin
        self._told = False

    def feed(self, text: str, final: bool) -> str:
        """The JSON that `text` adds."""
        found = ""
        at, end = 0, _after(_CERTAIN, text, 0)
        while text.startswith("\\", end) and (final or not _UNFINISHED_ESCAPE.match(text, end)):
            found += _decoded(text[at:end]) + "\\"  # of no escape
            at = end + 1
            end = _after(_CERTAIN, text, at)
        self.ended = text[end : end + 1] == '"'
        if not self.ended and not final and (half := _HALF_PAIR.search(text, at, end)):
            end = half.start()
        self.rest = text[end + 1 :] if self.ended else text[end:]
        found += _decoded(text[at:end])
        if not self._begin or not (found or self.ended):
            return ""
        begin = "" if self._told else f'{self._begin}"'
        self._told = True
        return begin + values.escaped(found) + ('"' if self.ended else "")


class _Other:
    """Reads a value that is no string of JSON. Arguments and attributes as `_String`'s."""

    def __init__(self, begin: str, schema: Any, parameters: Any) -> None:
        self.ended = False
        self.rest = ""
        self._begin = begin
        self._allowed = allowed(schema, parameters)
        self._extent = _Extent()

    def feed(self, text: str, final: bool) -> str:
        """The JSON of the whole value, once it is there."""
        end = self._extent.find(text)
        if end is None:
            self.rest = text
            return ""
        self.ended = True
        self.rest = text[end:]
        if not self._begin:
            return ""
        value = values.read(text[:end], self._allowed)
        return self._begin + json.dumps(value, ensure_ascii=False)


class _Extent:
    """Finds the end of a value in a text that grows, before the comma, bracket or mark after it."""

    def __init__(self, at: int = 0) -> None:
        self._at = at
        self._depth = 0
        self._quote = ""

    def find(self, text: str) -> int | None:
        while found := (_IN_QUOTES[self._quote] if self._quote else _STEP).search(text, self._at):
            self._at = found.end()
            mark = found[0]
            if self._quote:
                self._quote = "" if mark == self._quote else self._quote
            elif mark in "\"'":
                self._quote = mark
            elif mark in "[({":
                self._depth += 1
            elif len(mark) > 1 or self._depth == 0:  # the call's mark, or what comes after the value
                return found.start()
            elif mark in "])}":
                self._depth -= 1
        # Half of a mark, or of an escape, is looked at again.
        half = text.rfind("\\" if self._quote else "<", self._at)
        self._at = half if half >= 0 else len(text)
        return None


class _Head(NamedTuple):
    """Attributes:
    end: where the arguments begin.
    name: of the function; None where there is no call.
    """

    end: int
    name: str | None


def _head(text: str, at: int, final: bool) -> _Head | None:
    """Of the object that begins at `at`; None where it takes more text to know."""
    nothing = _Head(at, None)
    undecided = nothing if final or len(text) - at > _LONGEST_HEAD else None
    if at == len(text):
        return undecided
    if text[at] != "{":
        return nothing
    begin = at + 1
    name: str | None = None
    arguments: int | None = None
    while True:
        begin = _after(_SPACE, text, begin)
        if begin == len(text):
            return undecided
        if text[begin] == "}" or (name is not None and text.startswith(CALL_END, begin)):
            if name is None:
                return nothing
            return _Head(begin if arguments is None else arguments, name)
        key = _STRING.match(text, begin)
        if key is None:
            partial = text[begin] == '"' or (name is not None and CALL_END.startswith(text[begin:]))
            return undecided if partial else nothing
        colon = _COLON.match(text, key.end())
        if colon is None or colon.end() == len(text):
            return nothing if text[key.end() :].strip(" \t\r\n:") else undecided
        begin = colon.end()
        if (said := _decoded(key[0][1:-1])) in _ARGUMENTS and arguments is None:
            arguments = begin
            if name is not None:
                return _Head(begin, name)
        if said == NAME:
            written = _STRING.match(text, begin)
            if written is None:
                return undecided if text[begin] == '"' else nothing
            name = _decoded(written[0][1:-1])
            if not _NAME.fullmatch(name):
                return nothing
            if arguments is not None:
                return _Head(arguments, name)
            begin = written.end()
            continue
        end = _Extent(begin).find(text)
        if end is None:
            return undecided
        begin = end


def _decoded(written: str) -> str:
    """What stands inside of a string's quotes, as the text that it means."""
    try:
        text: str = json.loads(f'"{written}"', strict=False)
    except ValueError:  # an escape that JSON does not have is its characters
        proper = _NO_ESCAPE.sub(lambda found: found[0] if found[1] else "\\\\", written)
        text = json.loads(f'"{proper}"', strict=False)
    return values.without_surrogates(text)


def _complete(text: str) -> int:
    """Where a mark begins at the end of `text` that is not whole yet; its length where there is none."""
    at = text.rfind("<")
    return at if at >= 0 and any(mark.startswith(text[at:]) for mark in (CALL, CALL_END)) else len(text)


def _after(pattern: re.Pattern[str], text: str, at: int) -> int:
    """Where what matches at `at` ends, which may be nothing."""
    found = pattern.match(text, at)
    return found.end() if found else at
