"""Speculative decoding: cheap guesses at the next tokens, which the model checks several in one run."""

from __future__ import annotations

from enum import StrEnum


class Speculative(StrEnum):
    """How exactly an answer is that of plain decoding.

    FAST: a run computes all its tokens at once, with kernels that round otherwise than those for one token.
    EXACT: every logit has the bits of plain decoding.
    """

    FAST = "fast"
    EXACT = "exact"
