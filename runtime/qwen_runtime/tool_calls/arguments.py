"""Reads the arguments of a call one after the other; the dialects say what stands between their values."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Protocol

from qwen_runtime.tool_calls.json_schema import forms


class Value(Protocol):
    """Reads the value of one argument.

    Attributes:
        ended: the value is whole.
        rest: the text after its end, or what cannot be read yet.
    """

    @property
    def ended(self) -> bool: ...

    @property
    def rest(self) -> str: ...

    def feed(self, text: str, final: bool) -> str:
        """The JSON that `text` adds."""


class ArgumentsReader(ABC):
    """A `protocol.CallReader`, once a subclass has `_step`. Of an argument that is given twice the first
    counts, for it may have been passed on."""

    def __init__(self, parameters: Any) -> None:
        self.ended = False
        self.rest = ""
        self._parameters = parameters
        self._forms = forms(parameters, parameters)
        self._given: set[str] = set()
        self._value: Value | None = None

    def feed(self, text: str, final: bool = False) -> str:
        self.rest += text
        return "".join(self._read(final))

    def _read(self, final: bool) -> Iterator[str]:
        while not self.ended:
            if self._value is None:
                if (found := self._step(final)) is None:
                    return
                yield found
                continue
            yield self._value.feed(self.rest, final)
            self.rest = self._value.rest
            if not self._value.ended:
                return
            self._value = None

    @abstractmethod
    def _step(self, final: bool) -> str | None:
        """Go on between two values, to `_value` or `ended`: the JSON that this adds; None where it takes
        more text."""

    def _begin_value(self, name: str) -> str:
        """The JSON before an argument's value; empty where it has one, and this one is passed over."""
        if name in self._given:
            return ""
        begin = f"{', ' if self._given else '{'}{json.dumps(name, ensure_ascii=False)}: "
        self._given.add(name)
        return begin

    def _end(self) -> str:
        self.ended = True
        return "}" if self._given else "{}"
