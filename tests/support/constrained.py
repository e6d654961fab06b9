"""What a grammar lets through, rubbish too: what a model without any sense might write."""

from __future__ import annotations

import random

import llguidance
import llguidance.numpy
import numpy as np

_TOKENIZER = llguidance.LLTokenizer("byte")
_ENDS = b'\n<>/}]",0'  # else strings and numbers would hardly ever end


def takes(lark: str, text: str) -> bool:
    """Whether `text` is a whole answer of the grammar `lark`, as `qwen_runtime.grammar.lark` writes it."""
    matcher = llguidance.LLMatcher(_TOKENIZER, lark)
    assert not matcher.get_error()
    tokens = _TOKENIZER.tokenize_bytes(text.encode())
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def rubbish(lark: str, seed: int, begin: str = "", longest: int = 3000) -> str | None:
    """A whole answer of the grammar `lark`, of random bytes; None where it has no end after `longest`.

    Args:
        begin: what it begins with.

    Raises:
        ValueError: the grammar is none, or leads where nothing fits.
    """
    matcher = llguidance.LLMatcher(_TOKENIZER, llguidance.LLMatcher.grammar_from_lark(lark), log_level=0)
    if matcher.is_error():
        raise ValueError(matcher.get_error())
    choose = random.Random(seed)
    size = _TOKENIZER.vocab_size
    bits = llguidance.numpy.allocate_token_bitmask(1, size)
    found = bytearray(begin.encode())
    if not matcher.consume_tokens(list(found)):
        raise ValueError(f"{begin!r} does not fit")
    while len(found) < longest:
        llguidance.numpy.fill_next_token_bitmask(matcher, bits)
        allowed = np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little")[:size]).tolist()
        if matcher.is_error() or not allowed:
            raise ValueError(f"nothing fits after {bytes(found)!r}: {matcher.get_error()}")
        plain = [token for token in allowed if token != _TOKENIZER.eos_token]
        if matcher.is_accepting() and (not plain or choose.random() < 0.3):
            return found.decode()
        ends = [token for token in plain if token in _ENDS]
        token = choose.choice(ends if ends and choose.random() < 0.5 else plain)
        if not matcher.consume_token(token):
            raise ValueError(matcher.get_error())
        found.append(token)
    return None
