"""One answer, token by token."""

from __future__ import annotations

import math
import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from qwen_common.errors import UserError

from qwen_runtime.backends.protocol import Tokenizer
from qwen_runtime.prefix import State
from qwen_runtime.speculative import Acceptance
from qwen_runtime.stop import StopFilter

Logits = npt.NDArray[np.float32]

# What ONNX Runtime GenAI says when llguidance fails.
_GUIDANCE_FAILURES = ("Error committing tokens", "Error computing mask")
_NO_CHANCE = 1000.0  # its exponential is infinite, and float32 still tells such logits apart


@dataclass(frozen=True)
class TokenLogprob:
    """How likely the model found a token that it wrote, before temperature and penalties.

    Attributes:
        text: the token, alone; a part of a character shows as U+FFFD.
        offset: where its text begins in the answer, in characters; each part of a character where that does.
        logprob: natural logarithm of its probability.
        top: the likeliest tokens at its place and their logarithms, likeliest first.
    """

    text: str
    offset: int
    logprob: float
    top: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Plan:
    """What a generation is to do.

    Attributes:
        prompt: ids.
        snapshot: how far into the prompt the state shall be able to return; None: nowhere.
        step: most tokens to append at a time.
        max_tokens: most tokens to generate.
        end_tokens: ids that end an answer.
        stop: texts at which to stop.
        presence_penalty: subtracted from the logit of each token that the answer has already.
        frequency_penalty: the same, as often as it has it.
        logit_bias: added to these tokens' logits at each place.
        min_p: tokens less than this many times as likely as the likeliest are ruled out; 0 rules none out.
        temperature: at which they are compared.
        logprobs: how many of the likeliest tokens to report at each place; None reports nothing.
        inputs: prompt and images as the backend's `image_inputs` made them, where the prompt has images.
            They are read all at once: only a generator's first run takes images and their positions.
    """

    prompt: Sequence[int]
    snapshot: int | None
    step: int
    max_tokens: int
    end_tokens: frozenset[int]
    stop: Sequence[str] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    min_p: float = 0.0
    temperature: float = 1.0
    logprobs: int | None = None
    inputs: Any = None


@dataclass
class _Progress:
    """What a running answer tells.

    Apart from `Generation`, so that no reference cycle keeps the KV cache of a dropped answer until Python
    next collects garbage.
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)


class Generation:
    """One answer as it grows: iterate it for pieces of text, with `for` or `async for`, or `run` it.

    A context manager, or call `close`; one that is dropped frees what it holds too. A `UserError` comes where
    the answer cannot be held to its guidance.

    Attributes:
        text: the pieces yielded so far.
        prompt_tokens: number of tokens of the prompt.
        cached_tokens: how many of them did not have to be read, because an earlier answer had read them.
        acceptance: how the MTP head's guesses fare; None unless decoding is speculative.
    """

    def __init__(
        self,
        state: State,
        tokenizer: Tokenizer,
        plan: Plan,
        release: Callable[[State], None],
        acceptance: Acceptance | None = None,
    ) -> None:
        """Args:
        state: what holds the beginning of the prompt, or nothing yet.
        tokenizer: the backend's.
        release: called at the end with the state, if it can be used again.
        """
        self.text = ""
        self.prompt_tokens = len(plan.prompt)
        self.cached_tokens = len(state.tokens)
        self.acceptance = acceptance
        self._progress = _Progress()
        self._pieces = _run(state, tokenizer, plan, release, self._progress)

    @property
    def tokens(self) -> list[int]:
        """Ids generated so far, without the one that ended the answer."""
        return self._progress.tokens

    @property
    def logprobs(self) -> list[TokenLogprob]:
        """One for each of `tokens` but those whose text a stop string cut off, if they were asked for."""
        return self._progress.logprobs

    @property
    def finish_reason(self) -> str | None:
        """ "stop" at an end token or stop string, "length", "cancelled"; None while it runs."""
        return self._progress.finish_reason

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


def _run(
    state: State, tokenizer: Tokenizer, plan: Plan, release: Callable[[State], None], progress: _Progress
) -> Generator[str]:
    usable = True
    try:
        if _read(state, plan, progress.cancelled.is_set):
            yield from _answer(state.generator, tokenizer, plan, progress)
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
            release(state)


def _read(state: State, plan: Plan, cancelled: Callable[[], bool]) -> bool:
    """Whether the whole prompt was read."""
    if plan.inputs is None:
        return state.read(plan.prompt, plan.snapshot, plan.step, cancelled)
    state.generator.set_inputs(plan.inputs)
    return True


def _answer(generator: Any, tokenizer: Tokenizer, plan: Plan, progress: _Progress) -> Generator[str]:
    decoder = tokenizer.create_stream()
    stop = StopFilter(plan.stop)
    seen: Counter[int] = Counter()
    decoded = shown = 0  # characters
    while True:
        if progress.cancelled.is_set():
            progress.finish_reason = "cancelled"
            break
        logits = _prepare(generator, plan, seen)
        generator.generate_next_token()
        new = generator.get_next_tokens()
        if not len(new):  # a piece of a long prompt was read, and there is more of it
            continue
        token = int(new[0])
        if token in plan.end_tokens:
            progress.finish_reason = "stop"
            break
        seen[token] += 1
        if logits is not None:
            progress.logprobs.append(_logprob(logits, token, decoded, plan.logprobs or 0, tokenizer))
        progress.tokens.append(token)
        text = decoder.decode(token)
        piece = stop.feed(text)
        decoded, shown = decoded + len(text), shown + len(piece)
        if stop.stopped:  # before the last piece, so that nobody hears of what was cut off
            progress.finish_reason = "stop"
            del progress.logprobs[within(progress.logprobs, shown) :]
        if piece:
            yield piece
        if stop.stopped:
            return
        if len(progress.tokens) == plan.max_tokens or generator.is_done():
            progress.finish_reason = "length"
            break
    if rest := stop.flush():
        yield rest


def _prepare(generator: Any, plan: Plan, seen: Mapping[int, int]) -> Logits | None:
    """Apply penalties, bias and min_p, unknown to ONNX Runtime GenAI. The logits before, if reported."""
    penalised = bool(seen) and (plan.presence_penalty != 0 or plan.frequency_penalty != 0)
    changed = penalised or bool(plan.logit_bias) or plan.min_p > 0
    if plan.logprobs is None and not changed:
        return None
    logits: Logits = generator.get_logits()
    reported = logits.reshape(-1, logits.shape[-1])[-1].copy() if plan.logprobs is not None else None
    if penalised:
        tokens = np.fromiter(seen, np.int64)
        counts = np.fromiter(seen.values(), np.float32)
        logits[..., tokens] -= plan.presence_penalty + plan.frequency_penalty * counts
    if plan.logit_bias:
        logits[..., list(plan.logit_bias)] += np.fromiter(plan.logit_bias.values(), np.float32)
    if plan.min_p > 0:
        unlikely = logits < logits.max() + plan.temperature * math.log(plan.min_p)
        # Not to minus infinity: a grammar, which comes next, may leave none of the others.
        logits[unlikely] -= _NO_CHANCE * plan.temperature
    if changed:
        generator.set_logits(logits)
    return reported


def within(logprobs: Sequence[TokenLogprob], length: int) -> int:
    """How many of these tokens begin in the first `length` characters of their answer."""
    return bisect_left(logprobs, length, key=lambda entry: entry.offset)


def _logprob(logits: Logits, token: int, offset: int, count: int, tokenizer: Tokenizer) -> TokenLogprob:
    def text(token: int) -> str:
        return str(tokenizer.decode(np.array([token], np.int32)))

    highest = logits.max()
    logprobs = logits - (highest + np.log(np.exp(logits - highest, dtype=np.float64).sum()))
    likeliest = np.argpartition(-logits, count)[:count]
    likeliest = likeliest[np.argsort(-logits[likeliest])]
    top = tuple((text(int(other)), float(logprobs[other])) for other in likeliest)
    return TokenLogprob(text(token), offset, float(logprobs[token]), top)
