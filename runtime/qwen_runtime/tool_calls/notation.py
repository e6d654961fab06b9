"""How regular expressions, literals and tags are written for llguidance (in Lark) and xgrammar."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

# One line, spaced as models write it. With white space left free, small models write little else.
SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def either(elements: list[Any]) -> Any:
    return {"type": "or", "elements": elements} if len(elements) > 1 else elements[0]


def sequence(*elements: Any) -> dict[str, Any]:
    return {"type": "sequence", "elements": list(elements)}


def const(text: str) -> dict[str, Any]:
    return {"type": "const_string", "value": text}


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def one_of(texts: Sequence[str]) -> str:
    """A regular expression in slashes. Of rules llguidance takes no more than 2000 side by side."""
    return f"({'|'.join(in_slashes(re.escape(text)) for text in texts)})"


def in_slashes(regex: str) -> str:
    """A regular expression as Lark writes it, in which a slash ends it and a line cannot."""
    special = {"/": r"\/", "\n": r"\n", "\r": r"\r", "\\\n": r"\n", "\\\r": r"\r"}
    return re.sub(r"\\.|[/\n\r]", lambda found: special.get(found[0], found[0]), regex, flags=re.DOTALL)
