"""One answer, token by token."""

from __future__ import annotations

import threading
from collections import Counter, abc
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType

from qwen_common.errors import UserError

from qwen_runtime.backends.protocol import Generator, Logits, LogitsGenerator
from qwen_runtime.echo import Echo
from qwen_runtime.logits import LogitsProcessor, TokenLogprob, token_logprob, within
from qwen_runtime.prefill import Prefill
from qwen_runtime.speculative.acceptance import Acceptance
from qwen_runtime.stop import StopFilter
from qwen_runtime.tokenizer import Tokenizer

# What ONNX Runtime GenAI says when llguidance fails.
_GUIDANCE_FAILURES = ("Error committing tokens", "Error computing mask")


@dataclass(frozen=True)
class Decoding:
    """How an answer is made once its prompt was read.

    Attributes:
        max_tokens: most tokens to generate.
        end_tokens: ids that end it.
        stop: texts at which to stop.
        logprobs: how many of the likeliest tokens to report at each place; None reports nothing. With these,
            or a processor that changes anything, the generator is a `LogitsGenerator`.
        end_logprob: the token that ended the answer is reported too.
    """

    max_tokens: int
    end_tokens: frozenset[int]
    stop: Sequence[str] = ()
    processor: LogitsProcessor = field(default_factory=LogitsProcessor)
    logprobs: int | None = None
    end_logprob: bool = False


@dataclass
class _Progress:
    """What a running answer tells.

    Apart from `Generation`, so that no reference cycle keeps the KV cache of a dropped answer until Python
    next collects garbage.
    """

    cancelled: threading.Event
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    stop_string: str | None = None
    prompt_read: int = 0


class Generation:
    """One answer as it grows: iterate it for pieces of text, with `for` or `async for`, or `run` it.

    A context manager, or call `close`; one that is dropped frees what it holds too. A `UserError` comes where
    the answer cannot be held to its guidance.

    Attributes:
        text: the pieces yielded so far.
        prompt_tokens: number of tokens of the prompt.
        cached_tokens: how many of them did not have to be read, because an earlier answer had read them.
        acceptance: how many drafted tokens were right; None unless decoding is speculative.
    """

    def __init__(
        self,
        prefill: Prefill,
        decoding: Decoding,
        tokenizer: Tokenizer,
        *,
        cancelled: threading.Event | None = None,
        acceptance: Acceptance | None = None,
        echo: Echo | None = None,
        on_prompt: Callable[[int], object] = lambda read: None,
    ) -> None:
        """Args:
        tokenizer: the backend's.
        cancelled: stops the answer when it is set, as `cancel` does.
        echo: what is told first.
        on_prompt: called before each chunk of the prompt with `prompt_read`.
        """
        self.text = ""
        self.prompt_tokens = prefill.prompt_tokens
        self.cached_tokens = prefill.cached_tokens
        self.acceptance = acceptance
        self._progress = _Progress(cancelled or threading.Event(), prompt_read=prefill.cached_tokens)
        self._pieces = _generate(prefill, decoding, tokenizer, self._progress, echo, on_prompt)

    @property
    def tokens(self) -> list[int]:
        """Ids generated so far, without the one that ended the answer."""
        return self._progress.tokens

    @property
    def prompt_read(self) -> int:
        """How many tokens of the prompt are read, those of `cached_tokens` among them; it grows by chunks."""
        return self._progress.prompt_read

    @property
    def logprobs(self) -> list[TokenLogprob]:
        """One for each of `tokens` but those whose text a stop string cut off, if they were asked for; before
        them those of a prompt that is told too."""
        return self._progress.logprobs

    @property
    def finish_reason(self) -> str | None:
        """ "stop" at an end token or stop string, "length", "cancelled"; None while it runs."""
        return self._progress.finish_reason

    @property
    def stop_string(self) -> str | None:
        """The text that stopped it; None where it was none."""
        return self._progress.stop_string

    def cancel(self) -> None:
        """Stop before the next token. Safe to call from another thread."""
        self._progress.cancelled.set()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        piece = next(self._pieces)
        self.text += piece
        return piece

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        """The next piece, made in a thread. Cancelling the task stops the answer."""
        import asyncio  # most programs do without

        step = asyncio.ensure_future(asyncio.to_thread(next, self, None))
        try:
            piece = await asyncio.shield(step)
        except asyncio.CancelledError:
            self.cancel()
            await asyncio.wait([step])  # so that the caller may close what nobody uses any more
            raise
        if piece is None:
            raise StopAsyncIteration
        return piece

    def run(self, on_text: Callable[[str], object] = lambda piece: None) -> str:
        """Make the rest of the answer and call `on_text` with each piece, in this thread; the whole text."""
        for piece in self:
            on_text(piece)
        return self.text

    def close(self) -> None:
        """Free what the generation holds; what it would still have yielded is lost."""
        self._pieces.close()

    def __enter__(self) -> Generation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _generate(
    prefill: Prefill,
    decoding: Decoding,
    tokenizer: Tokenizer,
    progress: _Progress,
    echo: Echo | None,
    on_prompt: Callable[[int], object],
) -> abc.Generator[str]:
    usable = True
    try:

        def cancelled(done: int) -> bool:
            progress.prompt_read = done
            on_prompt(done)
            return progress.cancelled.is_set()

        if prefill.read(cancelled):
            progress.prompt_read = prefill.prompt_tokens
            if echo is not None:
                progress.logprobs += echo.logprobs
                yield echo.text
            begin = len(echo.text) if echo is not None else 0
            yield from _decode(prefill.generator, decoding, tokenizer, progress, begin)
        else:
            progress.finish_reason = "cancelled"
    except Exception as error:
        usable = False
        if any(failure in str(error) for failure in _GUIDANCE_FAILURES):
            reason = str(error).partition(": ")[2].partition("\n")[0]
            raise UserError(f"the answer could not be held to the guidance: {reason}") from error
        raise
    finally:
        if usable:
            prefill.release()


def _decode(
    generator: Generator, decoding: Decoding, tokenizer: Tokenizer, progress: _Progress, begin: int
) -> abc.Generator[str]:
    """Args:
    begin: how many characters were told before.
    """
    if not decoding.max_tokens:
        progress.finish_reason = "length"
        return
    stream = tokenizer.create_stream()
    stop = StopFilter(decoding.stop)
    counts: Counter[int] = Counter()
    decoded = shown = begin  # characters
    while True:
        if progress.cancelled.is_set():
            progress.finish_reason = "cancelled"
            break
        logits = _process_logits(generator, decoding, counts)
        generator.generate_next_token()
        new = generator.get_next_tokens()
        if not len(new):  # a chunk of a long prompt was read, and there is more of it
            continue
        token = int(new[0])
        if token in decoding.end_tokens:
            progress.finish_reason = "stop"
            if logits is not None and decoding.end_logprob:
                entry = token_logprob(logits, token, decoded, decoding.logprobs or 0, tokenizer)
                progress.logprobs.append(entry)
            break
        counts[token] += 1
        if logits is not None:
            entry = token_logprob(logits, token, decoded, decoding.logprobs or 0, tokenizer)
            progress.logprobs.append(entry)
        progress.tokens.append(token)
        text = stream.decode(token)
        piece = stop.feed(text)
        decoded, shown = decoded + len(text), shown + len(piece)
        if stop.stopped:  # before the last piece, so that nobody hears of what was cut off
            progress.finish_reason, progress.stop_string = "stop", stop.found
            del progress.logprobs[within(progress.logprobs, shown) :]
        if piece:
            yield piece
        if stop.stopped:
            return
        if len(progress.tokens) == decoding.max_tokens or generator.is_done():
            progress.finish_reason = "length"
            break
    rest = stop.feed(stream.flush())
    if stop.stopped:
        progress.finish_reason, progress.stop_string = "stop", stop.found
    if rest := rest + stop.flush():
        yield rest


def _process_logits(generator: Generator, decoding: Decoding, counts: Mapping[int, int]) -> Logits | None:
    """Change the logits as `decoding` says. Those of before, [vocab], if they are reported."""
    changed = decoding.processor.changes(counts)
    if decoding.logprobs is None and not changed:
        return None
    assert isinstance(generator, LogitsGenerator)
    logits = generator.get_logits()
    reported = logits.reshape(-1, logits.shape[-1])[-1].copy() if decoding.logprobs is not None else None
    if changed:
        decoding.processor(logits, counts)
        generator.set_logits(logits)
    return reported
