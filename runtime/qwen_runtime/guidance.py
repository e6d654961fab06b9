"""What an answer must look like."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Guidance(NamedTuple):
    """What an answer must look like: a JSON schema, a regular expression, a grammar for llguidance, or what
    `grammar.make_guidance` makes of tools."""

    kind: Literal["json_schema", "regex", "lark_grammar", "answer"]
    text: str
