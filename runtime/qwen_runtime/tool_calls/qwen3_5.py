"""The dialect in which Qwen3.5, 3.6 and 3.8 call tools, as Qwen3-Coder did:

    <tool_call>
    <function=NAME>
    <parameter=ARGUMENT>
    VALUE, over one or more lines
    </parameter>
    </function>
    </tool_call>

A value has no escapes: text is written as it is, anything else as JSON. So a value may have marks in it, and
a call that lacks a mark looks much like that. Marks inside a value that are in balance, and end before a
`</parameter>` after which the call goes on, belong to the value; otherwise the value ends before the first of
them. Every decision rests on the text alone, never on the pieces in which it came.

Sources: the published chat template; vLLM's `qwen3_coder` parser for what models do to it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any

from qwen_runtime.tool_calls import values
from qwen_runtime.tool_calls.arguments import ArgumentsReader
from qwen_runtime.tool_calls.json_schema import (
    Allowed,
    allowed,
    argument_schema,
)
from qwen_runtime.tool_calls.protocol import Opening

CALL, CALL_END = "<tool_call>", "</tool_call>"
FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"

LONGEST_NAME = 1000  # characters; one without an end would be looked at with each piece of an answer
_ONE_NAME = rf"[^<>\n]{{1,{LONGEST_NAME}}}"
_MARKS = (CALL, CALL_END, FUNCTION, FUNCTION_END, PARAMETER, PARAMETER_END)
# Some write `</parameter=NAME>`.
_NAMED_END = rf"(?:=[^<>\n]{{0,{LONGEST_NAME}}})?"
_MARK = re.compile(
    rf"{CALL}|{CALL_END}|{FUNCTION}(?P<function>{_ONE_NAME})>|</function{_NAMED_END}>"
    rf"|{PARAMETER}(?P<parameter>{_ONE_NAME})>|</parameter{_NAMED_END}>"
)
_UNFINISHED = re.compile(rf"(?:{FUNCTION}|{PARAMETER}|</function=|</parameter=)[^<>\n]{{0,{LONGEST_NAME}}}")
_LONGEST_MARK = LONGEST_NAME + len("</parameter=>")
# Some write the first mark twice; more often is a model that has lost its way.
_OPENING = re.compile(rf"(?:{CALL}\s*){{0,2}}{FUNCTION}(?P<function>{_ONE_NAME})>|(?:{CALL}\s*){{1,2}}")
_SPACE = re.compile(r"\s*")
_NAME = re.compile(r"[^\s{}<>\"']+")
# What comes after a mark that ends something, where that is no part of a value.
_GOES_ON = {
    PARAMETER_END: (PARAMETER, FUNCTION_END, "</function=", CALL_END, CALL, FUNCTION),
    FUNCTION_END: (CALL_END, CALL, FUNCTION),
    CALL_END: (CALL, FUNCTION),
    CALL: (FUNCTION,),
}
_BEGINNING = {PARAMETER_END: PARAMETER, FUNCTION_END: FUNCTION, CALL_END: CALL}


def asked_for(template: str) -> bool:
    """Whether a chat template tells the model to write calls so."""
    return FUNCTION in template


def find_call(text: str, functions: Collection[str], final: bool, strict: bool = False) -> Opening:
    """As `protocol.Reading`. Without `<tool_call>` only a known function is called, and only where the text
    goes on as a call does."""
    for found in _OPENING.finditer(text):
        undecided = Opening(found.start(), found.end(), None)
        if found["function"] is None:
            rest = text[found.end() : found.end() + _LONGEST_MARK + 1]
            if not final and _may_become(rest, (CALL, FUNCTION)):
                return undecided
            continue
        name = _unquoted(found["function"])
        bare = not found[0].startswith(CALL)
        if name not in functions and (bare or strict or not _NAME.fullmatch(name)):
            continue
        goes_on = not bare or _goes_on(text, found.end(), (PARAMETER, FUNCTION_END, "</function="), final)
        if goes_on is None:
            return undecided
        if goes_on:
            return Opening(found.start(), found.end(), name)
    end = len(text) if final else _complete(text)
    return Opening(end, end, None)


def after_call(text: str, final: bool) -> tuple[int, str | None] | None:
    """As `protocol.Reading`."""
    start = _skip_space(text, 0)
    if found := _MARK.match(text, start):
        if found[0] == CALL_END:
            return found.end(), None
        if found["function"] and _NAME.fullmatch(name := _unquoted(found["function"])):
            return found.end(), name
    elif not final and _may_become(text[start : start + _LONGEST_MARK + 1], (CALL_END, FUNCTION)):
        return None
    return 0, None


class CallReader(ArgumentsReader):
    """As `protocol.CallReader`."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters)
        self._known = {name for form in self._forms for name in form.properties}

    def _step(self, final: bool) -> str | None:
        """Past a mark between arguments. Whatever stands before it has no place in a call."""
        found = _MARK.search(self.rest)
        if found is None:
            self.rest = self.rest[_complete(self.rest) :]
            return None
        if found["parameter"]:
            self._value = self._argument(_meant(found["parameter"], self._known))
        elif _mark(found) != PARAMETER_END:
            self.rest = self.rest[found.end() if _mark(found) == FUNCTION_END else found.start() :]
            return self._end()
        self.rest = self.rest[found.end() :]
        return ""

    def _argument(self, name: str) -> _Value:
        schema = argument_schema(self._forms, name)
        begin = self._begin_value(name)
        missing = self._known - self._given if self._known else None
        return _Value(begin, allowed(schema, self._parameters), missing)


class _Value:
    """Reads the value of one argument.

    Args:
        begin: JSON before the value; without any, the value is passed over.
        missing: names of the arguments that may still come; None where any may.

    Attributes:
        ended: the value is whole.
        rest: the text after its end.
    """

    def __init__(self, begin: str, known: Allowed, missing: Collection[str] | None) -> None:
        self.ended = False
        self.rest = ""
        self._begin = begin
        self._allowed = known
        self._missing = missing
        self._text = ""
        self._at = 0  # where the search for marks goes on
        self._last = 0  # end of the last mark that is one,
        self._space = 0  # and of the white space after it
        self._open: list[str] = []  # marks inside the value that have no end yet
        self._doubt: int | None = None  # the first mark that is in the value, or ends it
        self._sent = 0  # characters of the value that were passed on

    def feed(self, text: str, final: bool) -> str:
        """The JSON that `text` adds."""
        whole, self._text = self._text, ""  # so that Python need not copy it
        whole += text
        self._text = whole
        if end := self._find_end(final):
            self.ended = True
            self.rest = self._text[end[1] :]
            return self._whole(end[0])
        if not self._begin or not (final or values.grows(self._allowed)):
            return ""
        return self._part(self._at if self._doubt is None else self._doubt, final)

    def _unsent(self, end: int) -> str:
        """What was not passed on of the value, if it ends there."""
        begin = 2 if self._text.startswith("\r\n") else self._text.startswith("\n")
        value = self._text[begin + self._sent : end]
        return value.removesuffix("\r\n") if value.endswith("\r\n") else value.removesuffix("\n")

    def _whole(self, end: int) -> str:
        if not self._begin:
            return ""
        value = self._unsent(end)
        if self._sent:
            return values.escaped(value) + '"'
        return self._begin + json.dumps(values.value_of(value, self._allowed), ensure_ascii=False)

    def _part(self, end: int, final: bool) -> str:
        """What is certain of a value whose end has not come, or never comes."""
        value = self._unsent(end)
        if not final:
            value = value.removesuffix("\r")  # a line break's first half, perhaps
        if not value:
            return ""
        if values.grows(self._allowed) and (self._sent or not values.undecided(value, self._allowed)):
            added = values.escaped(value)
            added = added if self._sent else f'{self._begin}"{added}'
            self._sent += len(value)
            return added
        begun = values.begun(value, self._allowed) if final else ""
        return self._begin + begun if begun else ""

    def _find_end(self, final: bool) -> tuple[int, int] | None:
        """Where the value ends, and where the text after it begins; None before that is certain."""
        for found in _MARK.finditer(self._text, self._at):
            self._at = found.start()
            expected = self._is_expected(found, final)
            if expected is None:
                return None
            self._at = found.end()
            if not expected and not self._on_a_line(found.start()):
                continue
            doubt = found.start() if self._doubt is None else self._doubt
            beginning = _BEGINNING.get(_mark(found))
            if beginning is None:
                self._doubt = doubt
                self._open.append(_kind(found))
            elif beginning in self._open:
                while self._open.pop() != beginning:
                    pass
            elif expected and beginning == PARAMETER:
                return found.span()
            else:
                if expected:  # of the call itself, which has ended before its value has
                    return doubt, doubt
                self._doubt = doubt
            self._last = found.end()
        self._at = max(self._at, _complete(self._text))
        return (self._doubt, self._doubt) if final and self._doubt is not None else None

    def _is_expected(self, found: re.Match[str], final: bool) -> bool | None:
        """Whether a mark is one wherever it stands, as the text goes on; None where that takes more text."""
        if name := found["parameter"]:
            return self._missing is None or _meant(name, self._missing) in self._missing
        follows = _GOES_ON.get(_mark(found))
        return _goes_on(self._text, found.end(), follows, final) if follows else False

    def _on_a_line(self, start: int) -> bool:
        if self._text[start - 1 : start] == "\n":
            return True
        if self._space < self._last:
            self._space = self._last
        if self._space < start:
            self._space = _skip_space(self._text, self._space)
        return self._space >= start


def _kind(found: re.Match[str]) -> str:
    return PARAMETER if found["parameter"] else FUNCTION if found["function"] else found[0]


def _mark(found: re.Match[str]) -> str:
    """Without the name that an end may have."""
    return re.sub("=.*", ">", found[0]) if found[0].startswith("</") else found[0]


def _unquoted(name: str) -> str:
    """A name as it should be: some write `<function="name">`."""
    return name.strip().strip("\"'")


def _meant(name: str, known: Collection[str]) -> str:
    """The name of an argument; one that is known may have quotes of its own."""
    return name if name in known else _unquoted(name)


def _goes_on(text: str, at: int, marks: tuple[str, ...], final: bool) -> bool | None:
    """Whether one of `marks`, or nothing, comes next; None where that takes more text."""
    start = _skip_space(text, at)
    if text.startswith(marks, start):
        return True
    rest = text[start : start + len(PARAMETER_END)]  # which is the longest mark
    if not any(mark.startswith(rest) for mark in marks):
        return False
    return True if final else None


def _may_become(text: str, marks: tuple[str, ...]) -> bool:
    """Whether `text` may grow into one of `marks`."""
    begins = any(mark.startswith(text) and mark != text for mark in marks)
    return begins or bool(_UNFINISHED.fullmatch(text))


def _complete(text: str) -> int:
    """Where a mark begins at the end of `text` that is not whole yet; its length where there is none."""
    at = text.rfind("<")
    end = at + _LONGEST_MARK + 1
    if at < 0 or text.find(">", at, end) >= 0:  # no mark, or a whole one
        return len(text)
    return at if _may_become(text[at:end], _MARKS) else len(text)


def _skip_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at
