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
from qwen_runtime.tokenizer import TOKENIZER_FILE


class Guides:
    """Makes them for one artifact. Its vocabulary is read when somebody first asks, which takes seconds."""

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact
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
            artifact = self._artifact
            text = (artifact.root / TOKENIZER_FILE).read_text(encoding="utf-8")
            ends = sorted(artifact.end_tokens)
            self._tokenizer = llguidance.LLTokenizer(text, n_vocab=artifact.vocab_size, eos_token=ends)
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


def _one_line(text: str) -> str:
    return " ".join(text.split())
