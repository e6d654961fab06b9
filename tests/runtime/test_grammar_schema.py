"""Numbers in schemas that have more digits than llguidance makes a grammar of."""

from __future__ import annotations

import json
from typing import Any

import llguidance
import pytest
from qwen_runtime.grammar_schema import carried, left_out

BOUNDS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")


def refused(schema: Any) -> str:
    grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema))
    return llguidance.LLMatcher.validate_grammar(grammar)


@pytest.mark.parametrize("kind", ["integer", "number"])
def test_bounds_and_multiples_of_any_length(kind: str) -> None:
    sizes = [0, 1, 2**53 + 1, 10**18 - 65, 10**18 - 1, 2**63 - 1, 2**64, 1e18, 1e308]
    for keyword in BOUNDS:
        for value in (sign * size for size in sizes for sign in (1, -1)):
            found = carried({"type": kind, keyword: value})
            assert refused(found) == "", (keyword, value)
            taken = kind == "integer" and "aximum" in keyword and value > 0
            assert (keyword in found) == (taken or abs(value) < 10**18 - 64)
    for value in (1, 5, 10**7, 2**40 + 1, 1e20, 0.01, 1e-9, 1e-20, 1.234567891, 123456.789, 3.3333333):
        found = carried({"type": kind, "multipleOf": value})
        assert refused(found) == "", value
        assert (found == {"type": kind}) == (list(left_out({"multipleOf": value})) == ["multipleOf"])
    assert carried({"multipleOf": 0.01}) == {"multipleOf": 0.01}


def test_the_bounds_of_64_bits_take_nothing_from_a_call() -> None:
    """Numbers of calls have at most 18 digits. What would ask for longer ones is not carried."""
    integer = {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}
    assert not list(left_out(integer))
    assert carried(integer) == {"type": "integer"}
    assert carried({**integer, "minimum": 0}) == {**integer, "minimum": 0}  # as it was
    for longer in ({"minimum": 2**60}, {"type": "number"}, {"multipleOf": 2}):
        assert "minimum" in left_out({**integer, **longer})
    assert carried({"minimum": 2**60, "exclusiveMinimum": True}) == {}  # draft 4's
    assert carried({"minimum": True, "multipleOf": "1"}) == {"minimum": True, "multipleOf": "1"}
