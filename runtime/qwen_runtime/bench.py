"""How fast an artifact answers on this machine, and how near that is to what its memory allows."""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from qwen_common.errors import UserError
from rich.table import Table

from qwen_runtime.bandwidth import read_bandwidth
from qwen_runtime.child import ChildEnded, child
from qwen_runtime.load_options import DEFAULTS, LoadOptions
from qwen_runtime.model import Model
from qwen_runtime.threads import Threads

DEFAULT_CONTEXTS = (128, 512, 2048)
DEFAULT_TOKENS = 32
DEFAULT_ROUNDS = 3
_TEXT = "A list is mutable, and a tuple is not. "
_REPORT = "report.json"
ENDED = "{} ended the process that ran it: is there enough memory? Else try another provider"


@dataclass(frozen=True)
class Point:
    """Medians at one length of prompt.

    Attributes:
        context: tokens of the prompt.
        first_token_seconds: from the prompt's ids to the logits of the first token.
        prefill_rate: prompt tokens per second in that time.
        decode_rate: tokens per second after it.
        ceiling_share: of the rate at which the memory could be read through once for each token; None where
            the artifact does not say how many bytes that takes.
    """

    context: int
    first_token_seconds: float
    prefill_rate: float
    decode_rate: float
    ceiling_share: float | None


@dataclass(frozen=True)
class Bench:
    """What one run found.

    Attributes:
        load_seconds: from the artifact's folder to a model that can answer.
        load_bytes: resident after that, in the process that loaded it.
        peak_bytes: the most that was resident, at the longest prompt too.
        artifact_bytes: size of the artifact's files.
        bandwidth: bytes per second that all CPUs read together, measured after the model had ended.
        decode_bytes: bytes of weights that one token reads, by the artifact's report; None without one.
    """

    model: str
    profile: str
    provider: str
    reason: str
    threads: Threads | None
    rounds: int
    tokens: int
    load_seconds: float
    load_bytes: int
    peak_bytes: int
    artifact_bytes: int
    bandwidth: float
    decode_bytes: int | None
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Timing:
    """Seconds until the prompt was read, and for each further token."""

    first: float
    next: tuple[float, ...]


def bench(
    artifact: Path,
    options: LoadOptions = DEFAULTS,
    contexts: Sequence[int] | None = None,
    tokens: int = DEFAULT_TOKENS,
    rounds: int = DEFAULT_ROUNDS,
    note: Callable[[str], None] = lambda message: None,
) -> Bench:
    """Measure in a process of its own, whose memory is the model's.

    Args:
        contexts: lengths of prompt, in tokens; None is `DEFAULT_CONTEXTS`, as far as they fit.
        tokens: to decode after each prompt.
        rounds: how often each length is measured; one more before them warms up.
        note: told what is being done.

    Raises:
        UserError: the artifact cannot be loaded, a length does not fit its context, or the provider ended
            the process.
    """
    note("loading")
    try:
        with child(artifact, options) as model:
            loaded = model.loaded
            lengths = fitting(contexts, loaded.info.context_length - tokens)
            note("warming up")
            model.call(timed, lengths[0], tokens)
            timings: dict[int, list[Timing]] = {length: [] for length in lengths}
            for at in range(rounds):  # round by round, so that a busy minute does not hit one length alone
                for length in lengths:
                    note(f"round {at + 1} of {rounds}: {length} tokens")
                    timings[length].append(model.call(timed, length, tokens))
            peak = model.call(_peak)
    except ChildEnded as error:
        raise UserError(ENDED.format(artifact)) from error
    note("memory bandwidth")
    bandwidth, decode_bytes = read_bandwidth(), _decode_bytes(artifact)
    ceiling = bandwidth / decode_bytes if decode_bytes else None
    return Bench(
        model=loaded.info.name,
        profile=loaded.info.profile,
        provider=loaded.info.provider,
        reason=loaded.info.reason,
        threads=loaded.info.threads,
        rounds=rounds,
        tokens=tokens,
        load_seconds=loaded.seconds,
        load_bytes=loaded.resident,
        peak_bytes=peak,
        artifact_bytes=sum(path.stat().st_size for path in artifact.iterdir()),
        bandwidth=bandwidth,
        decode_bytes=decode_bytes,
        points=tuple(_point(length, found, ceiling) for length, found in timings.items()),
    )


def table(found: Bench) -> Table:
    """The points, for a terminal."""
    shown = Table("prompt", "first token, s", "prefill, tokens/s", "decode, tokens/s", "of ceiling")
    for point in found.points:
        share = "" if point.ceiling_share is None else f"{point.ceiling_share:.0%}"
        shown.add_row(
            str(point.context),
            f"{point.first_token_seconds:.3f}",
            f"{point.prefill_rate:.1f}",
            f"{point.decode_rate:.1f}",
            share,
        )
    return shown


def summary(found: Bench) -> str:
    """The rest, a line for each thing."""
    ceiling = "not known: the artifact has no report, make one with qwen-export verify"
    if found.decode_bytes:
        rate = found.bandwidth / found.decode_bytes
        ceiling = f"{rate:.1f} tokens/s, for {found.decode_bytes / 1e6:.1f} MB of weights for each token"
    memory = f"{found.load_bytes / 1e6:.0f} MB resident after loading, {found.peak_bytes / 1e6:.0f} at most"
    return "\n".join(
        (
            f"provider   {found.reason}",
            f"threads    {found.threads}",
            f"loading    {found.load_seconds:.2f} s",
            f"memory     {memory}; {found.artifact_bytes / 1e6:.0f} MB of files",
            f"bandwidth  {found.bandwidth / 1e9:.1f} GB/s read by all CPUs together",
            f"ceiling    {ceiling}",
        )
    )


def check_plot(path: Path) -> None:
    """Whether `plot` can draw into `path`, before minutes are spent on measuring.

    Raises:
        UserError: matplotlib is missing, or `path` is no file that it could write.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise UserError("--plot needs matplotlib: pip install 'qwen-edge[plot]'") from error
    known = Figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in known or path.is_dir():
        raise UserError(f"no plot can be written to {path}: name a file, such as speed.png")
    if not path.parent.is_dir():
        raise UserError(f"no folder {path.parent} for the plot: make it first")


def plot(found: Bench, path: Path) -> None:
    """Draw prefill, decode and the first token over the length of the prompt; PNG, or as the suffix says.

    Raises:
        UserError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    lengths = [point.context for point in found.points]
    panels = {
        "Prefill, tokens/s": [point.prefill_rate for point in found.points],
        "Decode, tokens/s": [point.decode_rate for point in found.points],
        "First token, s": [point.first_token_seconds for point in found.points],
    }
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    figure.suptitle(f"{found.model}, {found.profile}, on {found.provider}", fontsize=10)
    for at, (title, values) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(panels), at)
        axes.plot(lengths, values, "o-", color="#3b6ea5")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("tokens of prompt")
        axes.spines[["top", "right"]].set_visible(False)
        if title.startswith("Decode") and found.decode_bytes:
            ceiling = found.bandwidth / found.decode_bytes
            axes.axhline(ceiling, color="#a33", linestyle="--", linewidth=1, label="memory bandwidth")
            axes.legend(frameon=False, fontsize=8)
        axes.set_ylim(bottom=0)
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write the plot {path}: {error}") from error


def fitting(contexts: Sequence[int] | None, room: int) -> list[int]:
    """Lengths of prompt, in order.

    Raises:
        UserError: one does not fit.
    """
    if room < 1:
        raise UserError("so many tokens after a prompt do not fit the context: choose fewer --tokens")
    if contexts is None:
        fitting = [length for length in DEFAULT_CONTEXTS if length <= room]
        if fitting:
            return fitting
        contexts = (room,)
    for length in contexts:
        if not 1 <= length <= room:
            raise UserError(
                f"a prompt of {length} tokens is not possible: choose --contexts from 1 to {room}"
            )
    return sorted(set(contexts))


def _point(length: int, timings: Sequence[Timing], ceiling: float | None) -> Point:
    first = statistics.median(timing.first for timing in timings)
    rate = 1 / statistics.median(second for timing in timings for second in timing.next)
    return Point(length, first, length / first, rate, rate / ceiling if ceiling else None)


def _decode_bytes(artifact: Path) -> int | None:
    try:
        return int(json.loads((artifact / _REPORT).read_text(encoding="utf-8"))["decode_bytes"])
    except (OSError, ValueError, KeyError, TypeError):  # exported with --no-verify
        return None


def timed(model: Model, length: int, tokens: int) -> Timing:
    """A prompt of `length` tokens, and `tokens` after it."""
    ids = model.encode(_TEXT * (length + tokens))[: length + tokens]
    times = [time.perf_counter()]
    times += [time.perf_counter() for _ in model.pace(ids, length)]
    seconds = [later - earlier for earlier, later in itertools.pairwise(times)]
    return Timing(seconds[0], tuple(seconds[1:]))


def _peak(model: Model) -> int:
    """The most bytes that were ever resident in this process."""
    memory: Any = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):  # Windows
        return int(memory.peak_wset)
    try:
        # Not getrusage's figure, which a child inherits from its parent.
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except OSError:  # macOS, where a child begins anew
        import resource

        return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
