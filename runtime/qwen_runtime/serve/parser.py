"""What the model writes, taken apart: thoughts, text for the user, calls of tools.

The parser takes text in any pieces, and passes on each thing as soon as it is certain what it is. What it
finds depends on the text alone, not on the pieces.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qwen_runtime.template import THOUGHT, THOUGHT_END
from qwen_runtime.tool_calls.protocol import CallReader, Opening
from qwen_runtime.tool_calls.registry import DEFAULT, DIALECTS

Delta = dict[str, Any]


@dataclass
class Call:
    """A call as far as it has come: what `whole` puts together, in OpenAI's form."""

    id: str
    name: str
    arguments: list[str] = field(default_factory=list)  # in pieces

    @property
    def whole(self) -> dict[str, Any]:
        function = {"name": self.name, "arguments": "".join(self.arguments)}
        return {"id": self.id, "type": "function", "function": function}


class AnswerParser:
    """Turns an answer's text into the deltas of OpenAI's chat completion chunks.

    A thought begins with the answer, with a mark where the template leaves that to the model, and ends with
    one. A call inside a thought is one if its function is known: models forget to end their thoughts. The
    thought goes on after it.

    Args:
        thinking: the prompt ended inside a thought.
        tools: the functions that may be called; without any, calls are taken as the text that they are.
        several: more than one call is allowed; otherwise the answer ends after the first.
        check: says what is wrong with the text for the user; that becomes the message's refusal.
        call_checks: the same of the arguments of a function, by its name.
        dialect: in which calls are written, by its name in `tool_calls.registry`.
    """

    def __init__(
        self,
        thinking: bool,
        tools: Sequence[Mapping[str, Any]] = (),
        several: bool = True,
        check: Callable[[str], str | None] | None = None,
        call_checks: Mapping[str, Callable[[str], str | None]] = {},
        dialect: str = DEFAULT,
    ) -> None:
        self._made_of = thinking, tools, several, check, call_checks, dialect
        self._reading = DIALECTS[dialect].reading
        self._said: dict[str, list[str]] = {}
        self._calls: list[Call] = []
        self._blanks: list[str] = []  # pieces of nothing but white space, which wait for what follows them
        self._functions = {tool["function"]["name"]: tool["function"] for tool in tools}
        self._several = several
        self._check = check
        self._call_checks = call_checks
        self._thinking = thinking
        self._rest = ""
        self._final = False
        self._blank = thinking  # nothing but white space since the last mark, and none of it is passed on
        self._reader: CallReader | None = None
        # Each takes what it can from `_rest`, and returns False when it needs more text.
        self._state: Callable[[list[Delta]], bool] = self._beginning

    def fresh(self) -> AnswerParser:
        """One for another answer to the same request."""
        return AnswerParser(*self._made_of)

    def feed(self, text: str) -> list[Delta]:
        """The deltas that `text` adds."""
        if text.isspace() and not self._final:
            self._blanks.append(text)  # else a long run of it would be looked at with each piece
            return []
        self._rest += "".join([*self._blanks, text])
        self._blanks.clear()
        deltas: list[Delta] = []
        while self._state(deltas):
            pass
        return deltas

    def finish(self) -> list[Delta]:
        """The deltas of what was held back. A call that was cut off stays JSON that was cut off.

        One that lacks no more than its last mark is whole.
        """
        self._final = True
        deltas = self.feed("")
        if fault := next(self._faults(), None):
            self._said["refusal"] = [fault]
            deltas.append({"refusal": fault})
        return deltas

    @property
    def calls(self) -> Sequence[Call]:
        """Those that have begun, in their order."""
        return self._calls

    @property
    def message(self) -> dict[str, Any]:
        """What the deltas add up to, put together when it is asked for: once, at the end."""
        found: dict[str, Any] = {"role": "assistant", "content": None}
        found |= {kind: "".join(pieces) for kind, pieces in self._said.items()}
        return found | ({"tool_calls": [call.whole for call in self._calls]} if self._calls else {})

    def _faults(self) -> Iterator[str]:
        content = "".join(self._said.get("content", ()))
        if self._check and content and (fault := self._check(content)):
            yield fault
        for call in self._calls:
            check = self._call_checks.get(call.name)
            if check and (fault := check("".join(call.arguments))):
                yield fault

    @property
    def in_call(self) -> bool:
        """Whether the last call's arguments have no end yet."""
        return self._reader is not None and not self._reader.ended

    @property
    def ended(self) -> bool:
        """Whether nothing more is taken from the answer."""
        return self._state == self._nothing

    def _beginning(self, deltas: list[Delta]) -> bool:
        """The mark of a thought, or anything else."""
        text = self._rest.lstrip()
        if text.startswith(THOUGHT):
            self._rest = text.removeprefix(THOUGHT)
            self._thinking = self._blank = True
        elif THOUGHT.startswith(text) and not self._final:
            return False
        self._state = self._prose
        return True

    def _prose(self, deltas: list[Delta]) -> bool:
        """A thought, or text for the user."""
        text, kind = self._rest, "reasoning_content" if self._thinking else "content"
        call = Opening(len(text), len(text), None)
        if self._functions:
            call = self._reading.find_call(text, self._functions, self._final, strict=self._thinking)
        end = text.find(THOUGHT_END) if self._thinking else -1
        if 0 <= end < call.start:  # not in what may become a call
            deltas += self._say(kind, text[:end].rstrip())
            self._rest = text[end + len(THOUGHT_END) :]
            self._thinking, self._blank = False, True
            return True
        if call.name is not None:
            deltas += self._say(kind, text[: call.start].rstrip())
            self._rest = text[call.end :]
            deltas.append(self._begin_call(call.name))
            return True
        if not self._final:
            text = text[: call.start]
            text = (text[: _unfinished(text, THOUGHT_END)] if self._thinking else text).rstrip()
        deltas += self._say(kind, text.rstrip() if self._thinking else text)
        self._rest = "" if self._final else self._rest[len(text) :]
        return False

    def _arguments(self, deltas: list[Delta]) -> bool:
        assert self._reader is not None
        fragment = self._reader.feed(self._rest, self._final)
        self._rest = self._reader.rest if self._reader.ended else ""
        if fragment:
            self._calls[-1].arguments.append(fragment)
            index = len(self._calls) - 1
            deltas.append({"tool_calls": [{"index": index, "function": {"arguments": fragment}}]})
        if self._reader.ended:
            self._state = self._after_call if self._several else self._nothing
        return self._reader.ended

    def _after_call(self, deltas: list[Delta]) -> bool:
        found = self._reading.after_call(self._rest, self._final)
        if found is None:
            return False
        self._rest = self._rest[found[0] :]
        self._state, self._blank = self._prose, True
        if found[1] is not None:
            deltas.append(self._begin_call(found[1]))
        return True

    def _nothing(self, deltas: list[Delta]) -> bool:
        self._rest = ""
        return False

    def _begin_call(self, name: str) -> Delta:
        self._reader = self._reading.CallReader(self._functions.get(name, {}).get("parameters"))
        self._state = self._arguments
        call = Call(f"call_{uuid.uuid4().hex[:24]}", name)
        self._calls.append(call)
        return {"tool_calls": [{"index": len(self._calls) - 1, **call.whole}]}

    def _say(self, kind: str, text: str) -> Iterator[Delta]:
        if self._blank:
            text = text.lstrip()
        if text:
            self._blank = False
            self._said.setdefault(kind, []).append(text)
            yield {kind: text}


async def finish(parser: AnswerParser) -> list[Delta]:
    """As `AnswerParser.finish`, in a thread, for to check an answer may take seconds."""
    return await asyncio.to_thread(parser.finish)


def _unfinished(text: str, mark: str) -> int:
    """Where `mark` may begin at the end of `text`; its length where it does not."""
    at = text.rfind("<")
    return at if at >= 0 and mark.startswith(text[at:]) else len(text)
