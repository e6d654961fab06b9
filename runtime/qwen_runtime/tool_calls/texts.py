"""What a JSON schema asks of a string, as regular expressions that match the whole of it.

A dialect that writes strings without quotes cannot leave them to a library's JSON grammar. What is made here
allows no more than the schema does, and in odd cases less: JSON Schema's regular expressions are ECMA-262's,
whose classes are ASCII's, and search.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen_runtime.tool_calls.json_schema import combined, types_of

ANY = r"(.|\n)*"
_CLASSES = {"d": "0-9", "w": "A-Za-z0-9_"}
_COUNT = re.compile(r"\{\d+(,\d*)?\}")
# Look-around and groups with names, references back, classes of Unicode, borders of words.
_IRREGULAR = re.compile(r"\(\?(?!:)|\\[1-9kpPbBc]")


def _formats() -> dict[str, str]:
    """Those of dates have no day that only some years have."""
    date = (
        "[1-9][0-9]{3}-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])"
        "|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8]))"
    )
    hour = "([01][0-9]|2[0-3])"
    time = rf"{hour}:[0-5][0-9]:[0-5][0-9](\.[0-9]{{1,6}})?(Z|[+-]{hour}:[0-5][0-9])"
    minutes, days = "[0-9]+M([0-9]+S)?", "[0-9]+M([0-9]+D)?"
    clock = f"T([0-9]+H({minutes})?|{minutes}|[0-9]+S)"
    duration = f"P(([0-9]+Y({days})?|{days}|[0-9]+D)({clock})?|{clock}|[0-9]+W)"
    label = "[A-Za-z](-?[A-Za-z0-9]){0,30}"
    byte = "(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
    word = "[0-9A-Fa-f]{1,4}"
    ipv6 = [f"({word}:){{7}}{word}", f"::({word}(:{word}){{0,6}})?", f"({word}:){{7}}:"]
    ipv6 += [f"{word}(:{word}){{{left}}}::({word}(:{word}){{0,{5 - left}}})?" for left in range(6)]
    return {
        "date": date,
        "time": time,
        "date-time": f"{date}T{time}",
        "duration": duration,
        "hostname": rf"{label}(\.{label}){{0,3}}",
        "email": rf"[A-Za-z0-9_+-]{{1,32}}(\.[A-Za-z0-9_+-]{{1,15}})?@{label}(\.{label}){{1,2}}",
        "ipv4": rf"{byte}(\.{byte}){{3}}",
        "ipv6": "|".join(ipv6),
        "uuid": "[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}",
    }


FORMATS = _formats()


@dataclass(frozen=True)
class Text:
    """One form that a string may have: so many characters, and each of `patterns` matches it as a whole."""

    fewest: int = 0
    most: int | None = None
    patterns: tuple[str, ...] = ()

    @property
    def free(self) -> bool:
        return self == Text()

    @property
    def regexes(self) -> Sequence[str]:
        """That all match it."""
        if not self.fewest and self.most is None:
            return self.patterns or (ANY,)
        most = "" if self.most is None else str(self.most)
        return (rf"(.|\n){{{self.fewest},{most}}}", *self.patterns)

    def __and__(self, other: Text) -> Text:
        most = [limit for limit in (self.most, other.most) if limit is not None]
        patterns = tuple(dict.fromkeys((*self.patterns, *other.patterns)))
        return Text(max(self.fewest, other.fewest), min(most) if most else None, patterns)

    @property
    def possible(self) -> bool:
        return self.most is None or self.fewest <= self.most


def texts(schema: Any, root: Any) -> list[Text]:
    """The forms of strings that `schema` allows, those apart that `enum` and `const` name.

    Args:
        root: the schema that `$ref` refers into.
    """
    try:
        found = combined(schema, root, _own, [])
    except RecursionError:
        return [Text()]
    return list(dict.fromkeys(text for text in found if text.possible))


def _own(schema: Any) -> list[Text]:
    """What `schema` says of a string by itself, without what no regular expression says."""
    if not isinstance(schema, Mapping):
        return [] if schema is False else [Text()]
    if "const" in schema or schema.get("enum") or not {"any", "string"} & types_of(schema.get("type")):
        return []
    patterns = []
    pattern, form = schema.get("pattern"), schema.get("format")
    if isinstance(pattern, str) and (found := whole(pattern)) is not None:
        patterns.append(found)
    if isinstance(form, str) and form in FORMATS:
        patterns.append(FORMATS[form])
    fewest, most = (_count(schema.get(keyword)) for keyword in ("minLength", "maxLength"))
    return [Text(fewest or 0, most, tuple(patterns))]


def whole(pattern: str) -> str | None:
    """A regular expression for llguidance that matches the whole of what `pattern` is found in; None where
    there is none."""
    if _IRREGULAR.search(re.sub(r"\\\\", "", pattern)):
        return None
    branches = []
    parts: list[str] = []  # of the branch at hand
    depth = 0
    begins = ends = False  # whether the branch has an anchor
    for step in [*_steps(pattern), "|"]:
        if step == "|" and not depth:
            inner = f"({''.join(parts)})" if parts else ""
            branches.append(f"{'' if begins else ANY}{inner}{'' if ends else ANY}")
            parts, begins, ends = [], False, False
        elif step in ("^", "$") and (depth or (step == "^" and parts)):
            return None
        elif step == "^":
            begins = True
        elif ends or step == "":  # something after the end, or a class that is none
            return None
        elif step == "$":
            ends = True
        else:
            depth += (step == "(") - (step == ")")
            parts.append(step)
    return None if depth else "|".join(branches)


def _steps(pattern: str) -> Iterator[str]:
    """Characters, classes and quantifiers, in the way of Rust's crate regex; "" for what it has not."""
    at = 0
    while at < len(pattern):
        sign = pattern[at]
        if sign == "\\":
            yield _escape(pattern[at + 1 : at + 2])
            at += 2
        elif sign == "[":
            found, at = _class(pattern, at)
            yield found
        elif sign == "(":
            yield "("
            at += 3 if pattern.startswith("(?:", at) else 1
        elif sign in "*+?" or (sign == "{" and _COUNT.match(pattern, at)):
            count = _COUNT.match(pattern, at)
            yield count[0] if count else sign
            at = count.end() if count else at + 1
            if pattern[at : at + 1] == "?":  # lazy, which makes no difference to the whole
                at += 1
        else:
            yield {".": r"[^\n\r]", "{": r"\{", "}": r"\}", "]": r"\]"}.get(sign, sign)
            at += 1


def _escape(letter: str) -> str:
    if letter in _CLASSES:
        return f"[{_CLASSES[letter]}]"
    return {"": "", "0": r"\x00", **dict.fromkeys("/<>", letter)}.get(letter, f"\\{letter}")


def _class(pattern: str, at: int) -> tuple[str, int]:
    """The class that begins at `at`, and where it ends."""
    begin = at + 2 if pattern.startswith("[^", at) else at + 1
    negated = begin == at + 2
    found = []
    at = begin
    while at < len(pattern) and pattern[at] != "]":
        if pattern[at] == "\\":
            letter = pattern[at + 1 : at + 2]
            plain = letter in ("<", ">") or (letter in _CLASSES and not negated)
            found.append(_CLASSES.get(letter, letter) if plain else f"\\{letter}")
            at += 2
        else:
            found.append(f"\\{pattern[at]}" if pattern[at] in "[&~" else pattern[at])
            at += 1
    if at == begin or at >= len(pattern):
        return "", len(pattern)
    return f"[{'^' if negated else ''}{''.join(found)}]", at + 1


def _count(value: Any) -> int | None:
    """JSON has one kind of number."""
    whole = isinstance(value, int | float) and not isinstance(value, bool) and value == int(value)
    return int(value) if whole else None
