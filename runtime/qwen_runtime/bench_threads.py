"""Several numbers of threads beside each other, in turns: which is the quickest on this machine."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from qwen_common.errors import UserError
from rich.table import Table

from qwen_runtime.bench import DEFAULT_ROUNDS, DEFAULT_TOKENS, ENDED, Timing, fitting, timed
from qwen_runtime.child import ChildEnded, child
from qwen_runtime.load_options import DEFAULTS, LoadOptions
from qwen_runtime.threads import Threads

_DEFAULT_CONTEXT = 512


@dataclass(frozen=True)
class Row:
    """One choice after one length of prompt; medians of the rounds.

    Attributes:
        asked: the choice, as it was written.
        decode_range: least and most of the rounds' decode rates.
        decode_ratios: of each round, to the first choice's in the same round.
    """

    asked: str
    threads: Threads
    context: int
    prefill_rate: float
    decode_rate: float
    decode_range: tuple[float, float]
    decode_ratios: tuple[float, ...]

    @property
    def ratio(self) -> float:
        return statistics.median(self.decode_ratios)


@dataclass(frozen=True)
class Comparison:
    model: str
    profile: str
    reason: str
    rounds: int
    tokens: int
    rows: tuple[Row, ...]


def compare(
    artifact: Path,
    choices: Sequence[str],
    options: LoadOptions = DEFAULTS,
    contexts: Sequence[int] | None = None,
    tokens: int = DEFAULT_TOKENS,
    rounds: int = DEFAULT_ROUNDS,
    note: Callable[[str], None] = lambda message: None,
) -> Comparison:
    """Measure each choice in a process of its own. They stay loaded and take turns, so that what else the
    machine does meets them all.

    Args:
        choices: as `threads` of `LoadOptions`, in place of the options' own; ratios are to the first.
        contexts: lengths of prompt, in tokens; None is one of 512, or what fits.
        tokens, rounds, note: as of `bench`.

    Raises:
        UserError: as of `bench`.
    """
    timings: dict[tuple[int, str], list[Timing]] = {}
    try:
        with ExitStack() as stack:
            models = {}
            for choice in choices:
                note(f"loading: {choice}")
                models[choice] = stack.enter_context(child(artifact, replace(options, threads=choice)))
            infos = {choice: model.loaded.info for choice, model in models.items()}
            room = infos[choices[0]].context_length - tokens
            lengths = fitting((min(_DEFAULT_CONTEXT, room),) if contexts is None else contexts, room)
            for at in range(rounds + 1):
                for length in lengths:
                    for choice, model in models.items():
                        note(f"round {at} of {rounds}: {length} tokens, {choice}" if at else "warming up")
                        timings.setdefault((length, choice), []).append(model.call(timed, length, tokens))
    except ChildEnded as error:
        raise UserError(ENDED.format(artifact)) from error
    rows = []
    for (length, choice), timed_rounds in timings.items():
        found, first = timed_rounds[1:], timings[length, choices[0]][1:]  # the first round warms up
        rates = [_rate(timing) for timing in found]
        threads = infos[choice].threads
        assert threads is not None  # a loaded artifact's
        rows.append(
            Row(
                asked=choice,
                threads=threads,
                context=length,
                prefill_rate=length / statistics.median(timing.first for timing in found),
                decode_rate=statistics.median(rates),
                decode_range=(min(rates), max(rates)),
                decode_ratios=tuple(rate / _rate(timing) for rate, timing in zip(rates, first, strict=True)),
            )
        )
    told = infos[choices[0]]
    return Comparison(told.name, told.profile, told.reason, rounds, tokens, tuple(rows))


def table(found: Comparison) -> Table:
    """The rows, for a terminal."""
    first = found.rows[0].asked
    shown = Table("threads", "prompt", "prefill, tokens/s", "decode, tokens/s", f"times '{first}'")
    shown.columns[0].no_wrap = True
    for row in found.rows:
        low, high = row.decode_range
        decode = f"{row.decode_rate:.1f} ({low:.1f} to {high:.1f})"
        shown.add_row(row.asked, str(row.context), f"{row.prefill_rate:.1f}", decode, f"{row.ratio:.2f}")
    return shown


def meanings(found: Comparison) -> str:
    """What each choice came to, a line for each."""
    came = {row.asked: row.threads for row in found.rows}
    width = max(map(len, came))
    return "\n".join(f"{asked:{width}}  {threads}" for asked, threads in came.items())


def verdict(found: Comparison) -> str:
    """Which choice decodes the quickest after each length of prompt, if the rounds agree about it."""
    lines = []
    for length in dict.fromkeys(row.context for row in found.rows):
        best, second = sorted(
            (row for row in found.rows if row.context == length), key=lambda row: row.ratio, reverse=True
        )[:2]
        rounds = list(zip(best.decode_ratios, second.decode_ratios, strict=True))
        times = statistics.median(one / other for one, other in rounds)
        text = (
            f"after {length} tokens '{best.asked}' decodes the quickest, {times:.2f} times '{second.asked}'"
        )
        if any(one <= other for one, other in rounds):
            text += ", but not in every round: not told apart, try more --rounds on a quiet machine"
        lines.append(text)
    return "\n".join(lines)


def _rate(timing: Timing) -> float:
    return 1 / statistics.median(timing.next)
