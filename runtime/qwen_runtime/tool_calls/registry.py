"""Which dialect of calls a chat template asks for."""

from __future__ import annotations

from dataclasses import dataclass

from qwen_runtime.tool_calls import hermes, hermes_grammar, qwen3_5, qwen3_5_grammar
from qwen_runtime.tool_calls.protocol import Grammar, Reading

_CALL = "<tool_call>"  # in all of Qwen's templates, and in others


@dataclass(frozen=True)
class Dialect:
    reading: Reading
    grammar: Grammar


# In the order in which templates are asked.
DIALECTS = {
    "qwen3_5": Dialect(qwen3_5, qwen3_5_grammar),
    "hermes": Dialect(hermes, hermes_grammar),
}
DEFAULT = "qwen3_5"  # where a template says nothing of calls


def dialect_of(template: str) -> str | None:
    """The name of the dialect; None where it is one that is not known."""
    asked = (name for name, dialect in DIALECTS.items() if dialect.reading.asked_for(template))
    return next(asked, None if _CALL in template else DEFAULT)
