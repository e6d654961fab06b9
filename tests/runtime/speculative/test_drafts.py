"""Prompt lookup against a search through the whole text."""

from __future__ import annotations

import numpy as np
import pytest
from qwen_runtime.speculative.drafts import PromptLookup


def searched(tokens: list[int], most: int) -> tuple[int, list[int]] | None:
    """Size of the longest match, and what followed it the last time."""
    for size in (4, 3, 2):
        for end in range(len(tokens) - 1, size - 1, -1):
            if len(tokens) > size and tokens[end - size : end] == tokens[-size:]:
                return size, tokens[end : end + most]
    return None


@pytest.mark.parametrize("vocabulary", [2, 5, 30])
def test_the_longest_and_latest_match(vocabulary: int) -> None:
    """In texts that grow by a few tokens from draft to draft, as an answer does."""
    random = np.random.default_rng(vocabulary)
    lookup, tokens = PromptLookup(), random.integers(0, vocabulary, 60).tolist()
    found = 0
    for _ in range(200):
        most = int(random.integers(1, 8))
        expected, draft = searched(tokens, most), lookup.draft(tokens, most)
        assert (draft is None) is (expected is None)
        if draft is not None and expected is not None:
            assert (f"a match of {expected[0]} tokens", expected[1]) == (draft.source, draft.tokens)
            found += 1
        tokens += random.integers(0, vocabulary, int(random.integers(1, 4))).tolist()
    assert found > 20


@pytest.mark.parametrize("tokens", [[], [1], [1, 2], [1, 1]])
def test_texts_that_are_too_short(tokens: list[int]) -> None:
    assert PromptLookup().draft(tokens, 7) is None
