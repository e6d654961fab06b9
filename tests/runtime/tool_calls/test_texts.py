"""Regular expressions of schemas, which search, as those that match the whole."""

from __future__ import annotations

import re

import pytest
from qwen_runtime.tool_calls.texts import Text, texts, whole

SAMPLES = ["", "a", "b", "ab", "ba", "aab", "a/b", "5", "a5", "[", "{x}", "a\nb", "é", "٣", "&~", "-"]
PATTERNS = [
    "a", "^a", "b$", "^a|b$", "^(?:a|b)$", r"\d", r"^\w$", r"[^\d]", "a+?b", "^.b?$", "[&~-]", "{x}", "^$",
    "a/b", r"a\/b", r"^[\w/]+$", "(a|b){1,2}$", "|a$",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_whole_matches_what_the_pattern_is_found_in(pattern: str) -> None:
    found = whole(pattern)
    assert found is not None
    ascii_only = re.compile(pattern, re.ASCII)  # as ECMA-262 has it
    for sample in SAMPLES:
        matched = re.fullmatch(found, sample) is not None
        expected = ascii_only.search(sample) is not None
        assert matched == expected or (sample == "٣" and not matched), sample


@pytest.mark.parametrize(
    "pattern", ["(^a|b)$", "a^", "a$b", "(?=a)", r"(a)\1", r"\bx", r"\p{L}", "[]", "[^]", "(", "[a"]
)
def test_patterns_that_have_no_such_form(pattern: str) -> None:
    assert whole(pattern) is None


def test_forms_of_strings() -> None:
    root = {"$defs": {"S": {"minLength": 2}, "loop": {"$ref": "#/$defs/loop"}}}
    branches = {"anyOf": [{"type": "string", "maxLength": 9}, {"type": "integer"}, {"const": "x"}]}
    assert texts({"allOf": [{"$ref": "#/$defs/S"}, branches]}, root) == [Text(2, 9)]
    assert texts({"enum": ["a"]}, root) == texts({"minLength": 2, "maxLength": 1}, root) == []
    assert texts({"$ref": "#/$defs/loop"}, root) == []
    assert texts({"minLength": 2.0, "maxLength": True}, root) == [Text(2)]
