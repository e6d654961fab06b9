"""A prompt that is told again before its answer, with how likely the model found it."""

from __future__ import annotations

from collections.abc import Sequence

from qwen_runtime.backends.protocol import Generator, LogitsGenerator
from qwen_runtime.logits import TokenLogprob, token_logprob
from qwen_runtime.prefill import Cancelled, Prefill
from qwen_runtime.scoring import feed
from qwen_runtime.tokenizer import Tokenizer


class Echo:
    """Attributes:
    text: the prompt, special tokens included.
    logprobs: of its tokens, once they were read and if they were asked for.
    """

    def __init__(self, tokens: Sequence[int], tokenizer: Tokenizer) -> None:
        self.text = ""
        self.logprobs: list[TokenLogprob] = []
        self._tokens, self._tokenizer = tokens, tokenizer
        self._offsets: list[int] = []
        stream = tokenizer.create_stream(special=True)
        for token in tokens:
            self._offsets.append(len(self.text))
            self.text += stream.decode(token)
        self.text += stream.flush()

    def prefill(self, generator: Generator, count: int, appends: bool) -> Prefill:
        """Reads the prompt one token at a time, as an answer is computed, and fills `logprobs`.

        Args:
            generator: one that shows its logits.
            count: how many of the likeliest tokens to report at each place.
            appends: as for `feed`.
        """

        assert isinstance(generator, LogitsGenerator)

        def read(cancelled: Cancelled) -> bool:
            first = self._tokens[0]
            self.logprobs.append(TokenLogprob.first(first, self._tokenizer))
            feed(generator, first, appends=True)
            for done, (token, offset) in enumerate(zip(self._tokens, self._offsets, strict=True)):
                if not done:
                    continue
                if cancelled(done):
                    return False
                logits = generator.get_logits()
                entry = token_logprob(
                    logits.reshape(-1, logits.shape[-1])[-1], token, offset, count, self._tokenizer
                )
                self.logprobs.append(entry)
                feed(generator, token, appends)
            return True

        return Prefill(generator, len(self._tokens), read)
