"""Guidance by llguidance itself, the library that ONNX Runtime GenAI has inside."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from qwen_common.errors import UserError

from qwen_runtime.artifact import Artifact
from qwen_runtime.backends.protocol import Logits
from qwen_runtime.grammar import lark, why_refused
from qwen_runtime.guidance import Guidance
from qwen_runtime.tokenizer import Tokenizer


class Guides:
    """Makes them for one artifact. Its vocabulary is read when somebody first asks, which takes seconds."""

    def __init__(self, artifact: Artifact, tokenizer: Tokenizer) -> None:
        self._artifact, self._tokens = artifact, tokenizer
        self._tokenizer: Any = None

    def make(self, guidance: Guidance) -> LlGuide:
        """Raises:
        UserError: the guidance is not valid, or llguidance is not installed.
        """
        try:
            import llguidance
        except ImportError as error:
            raise UserError(
                "guidance where states are kept on disk needs llguidance: pip install 'qwen-edge[serve]'"
            ) from error
        if self._tokenizer is None:
            ends = sorted(self._artifact.end_tokens)
            vocabulary = Vocabulary(self._tokens, ends[0], self._artifact.vocab_size)
            wrapper = llguidance.TokenizerWrapper(vocabulary)
            self._tokenizer = llguidance.LLTokenizer(
                wrapper, n_vocab=self._artifact.vocab_size, eos_token=ends
            )
        kinds: Mapping[str, Callable[[str], str]] = {
            "answer": lambda text: llguidance.LLMatcher.grammar_from_lark(lark(text)),
            "lark_grammar": llguidance.LLMatcher.grammar_from_lark,
            "json_schema": llguidance.LLMatcher.grammar_from_json_schema,
            "regex": llguidance.LLMatcher.grammar_from_regex,
        }
        try:
            matcher = llguidance.LLMatcher(self._tokenizer, kinds[guidance.kind](guidance.text))
        except ValueError as error:
            raise UserError(f"the guidance is not valid: {why_refused(str(error))}") from error
        if matcher.is_error():
            raise UserError(f"the guidance is not valid: {why_refused(matcher.get_error())}")
        return LlGuide(matcher, self._artifact.vocab_size)


class Vocabulary:
    """The tokens as llguidance wants them: the bytes of each, and which stand for no text.

    It reads tokenizer.json too, but takes tokens like <tool_call> for none of a text: a grammar that has
    them written in it then forces a token that it does not accept.
    """

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, end: int, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = end
        self.tokens, self.special_token_ids = tokenizer.bytes_of_tokens(vocab_size)

    def __call__(self, text: str | bytes) -> list[int]:
        return self._tokenizer.encode(text if isinstance(text, str) else text.decode(errors="replace"))


class LlGuide:
    """A `Guide` of one answer."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        import llguidance.numpy

        self._matcher = matcher
        self._numpy = llguidance.numpy
        self._bits = llguidance.numpy.allocate_token_bitmask(1, vocab_size)

    def mask(self, logits: Logits) -> None:
        self._numpy.fill_next_token_bitmask(self._matcher, self._bits)
        allowed = np.unpackbits(self._bits.view(np.uint8), bitorder="little")[: len(logits)]
        logits[allowed == 0] = -np.inf

    def take(self, token: int) -> None:
        if not self._matcher.consume_token(token):
            reason = _one_line(self._matcher.get_error() or "no token fits")
            raise UserError(f"the answer could not be held to the guidance: {reason}")

    def forced(self) -> list[int]:
        return self._matcher.compute_ff_tokens()


def _one_line(text: str) -> str:
    return " ".join(text.split())
