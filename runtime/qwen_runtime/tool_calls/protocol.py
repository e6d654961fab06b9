"""What a dialect of calls of tools has: a module that reads it, and one that writes it as grammars."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol


class Opening(NamedTuple):
    """Where text ends and a call begins, or may begin.

    Attributes:
        start: before it there is no call.
        end: where the call's arguments begin.
        name: of the function; None where there is no call, or it takes more text to know.
    """

    start: int
    end: int
    name: str | None


class CallReader(Protocol):
    """Reads the arguments of one call, to pieces of their JSON.

    Attributes:
        ended: the arguments are whole.
        rest: the text after their end.
    """

    ended: bool
    rest: str

    def feed(self, text: str, final: bool = False) -> str:
        """The JSON that `text` adds.

        Args:
            final: nothing comes after `text`.
        """


class Reading(Protocol):
    """How calls are read. Every decision rests on the text alone, never on the pieces in which it came."""

    @property
    def CallReader(self) -> Callable[[Any], CallReader]:
        """Takes the function's JSON schema; None where there is none."""

    def asked_for(self, template: str) -> bool:
        """Whether a chat template tells the model to write calls so."""

    def find_call(self, text: str, functions: Collection[str], final: bool, strict: bool = False) -> Opening:
        """Where the first call in `text` begins.

        Args:
            functions: the names that are known.
            final: nothing comes after `text`.
            strict: calls of unknown functions are none.
        """

    def after_call(self, text: str, final: bool) -> tuple[int, str | None] | None:
        """What follows a call's arguments: how much of it belongs to it, and the function of one more call
        inside the same `<tool_call>`. None where it takes more text to know."""


class Grammar(Protocol):
    """How calls that must fit their schemas are written, for llguidance (rules of Lark) and xgrammar."""

    @property
    def BEGINS(self) -> str:
        """A regular expression in Lark's slashes, without them: what would be read as a call's beginning."""

    def lark(self, functions: Sequence[Mapping[str, Any]]) -> list[str]:
        """The rule for a call of one of these functions is `call`.

        Raises:
            UserError: nothing can be written that fits a function's schema.
        """

    def lark_unforced(self, functions: Sequence[Mapping[str, Any]]) -> list[str]:
        """For any text, in which calls of functions that are `strict` fit their schemas; the rule to begin
        with is `answer`. A call begins in the dialect's own way only.

        Raises:
            UserError: as `lark`.
        """

    def structural_tag(self, function: Mapping[str, Any]) -> dict[str, Any]:
        """A tag of xgrammar for a call of this function."""

    def structural_tag_unforced(self, functions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """As `lark_unforced`."""
