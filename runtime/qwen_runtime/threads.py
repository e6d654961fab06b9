"""With how many threads an artifact computes on the CPU, on which cores, and how they wait.

What counts first: what was asked for (`--threads`, `Model.load`), then ONNX Runtime's environment variable,
then the artifact, which has it from its profile. Left alone, ONNX Runtime starts a thread for every physical
core of the machine and pins it there, also on cores that the process may not use (1.32, measured): where it
may not use all of them, the number is told.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwen_common.errors import UserError, one_line

from qwen_runtime.cores import Cores, find_cores

VARIABLE = "ORT_INTRA_OP_NUM_THREADS"  # ONNX Runtime's; to it this counts where a session asks for 0
PERFORMANCE = "performance"
MOST = 1024
MOST_SPIN = 10_000  # microseconds, from which ONNX Runtime warns
FORMS = f"a number, 0 for every physical core, or {PERFORMANCE}, each also with :yield or :50us"
_WAITING = re.compile(r"(?P<threads>[^:]*)(:(yield|(?P<us>[0-9]{1,5})us))?", re.ASCII)
_COUNT, _AFFINITIES = "intra_op_num_threads", "session.intra_op_thread_affinities"
_SPINNING, _SPIN_US = "session.intra_op.allow_spinning", "session.intra_op.spin_duration_us"


@dataclass(frozen=True)
class Asked:
    """What somebody asks for.

    Attributes:
        count: of threads, or "performance": one for each P core.
        spin_us: microseconds for which threads that wait keep their cores busy; None: as the artifact says.
    """

    count: int | str
    spin_us: int | None = None

    @classmethod
    def parse(cls, text: str) -> Asked:
        """`4`, `performance`, `4:yield` or `4:50us`.

        Raises:
            UserError: it is nothing like it.
        """
        found = _WAITING.fullmatch(text)
        name = found["threads"] if found else ""
        count = name if name == PERFORMANCE else _number(name)
        spin_us = int(found["us"] or 0) if found and ":" in text else None
        if count is None or (spin_us or 0) > MOST_SPIN:
            raise UserError(f"no number of threads '{one_line(text[:40])}': give {FORMS}")
        return cls(count, spin_us)


@dataclass(frozen=True)
class Threads:
    """What it came to.

    Attributes:
        count: threads of a product, the one that calls included.
        processors: where they lie, a thread on each, the first of which is the caller's and not pinned; none:
            the system places them.
        spin_us: microseconds for which those that wait keep their cores busy; None: the library's own choice.
        why: what decided it.
        left: whether the library's own choice is the same, and is left to it.
    """

    count: int
    processors: tuple[int, ...]
    spin_us: int | None
    why: str
    left: bool = False
    performance: bool = False

    def __str__(self) -> str:
        text = f"{self.count} thread{'s' if self.count > 1 else ''}, {self.why}"
        if self.processors:
            text += f", on processors {', '.join(map(str, self.processors))}"
        if self.spin_us is None:
            return text
        return f"{text}, yielding {f'after {self.spin_us} us' if self.spin_us else 'while they wait'}"

    @property
    def usual(self) -> bool:
        """Whether it is what there is to expect."""
        return self.left and self.spin_us is None

    @property
    def session_options(self) -> dict[str, int | str]:
        """Of ONNX Runtime, as genai_config.json writes them."""
        options: dict[str, int | str] = {_COUNT: 0 if self.left else self.count}
        options[_SPINNING] = "0" if self.spin_us == 0 else "1"
        if self.spin_us:
            options[_SPIN_US] = str(self.spin_us)
        if len(self.processors) > 1:
            # Of each thread but the caller's, counted from 1.
            options[_AFFINITIES] = ";".join(str(processor + 1) for processor in self.processors[1:])
        return options

    @property
    def openvino(self) -> dict[str, int | str]:
        """Properties of OpenVINO's CPU device; it has no word for the way of waiting."""
        options: dict[str, int | str] = {} if self.left else {"INFERENCE_NUM_THREADS": self.count}
        return options | ({"SCHEDULING_CORE_TYPE": "PCORE_ONLY"} if self.performance else {})


def apply(options: Any, threads: Threads | None) -> None:
    """Set them on an onnxruntime.SessionOptions; None: leave it as it is."""
    for name, value in ({} if threads is None else threads.session_options).items():
        if name == _COUNT:
            options.intra_op_num_threads = value
        else:
            options.add_session_config_entry(name, value)


def decide(
    asked: int | str | None,
    settings: Mapping[str, Any],
    environment: Mapping[str, str] | None = None,
    cores: Cores | None = None,
) -> Threads:
    """Args:
        asked: as `Asked.parse` reads it; None: nothing.
        settings: the artifact's, of which `threads` and `spin_us` count.
        environment, cores: of another machine.

    Raises:
        UserError: what was asked for, or the environment variable, is no number of threads.
    """
    environment = os.environ if environment is None else environment
    cores = find_cores() if cores is None else cores
    given = environment.get(VARIABLE, "").strip()
    wish, source = _wish(asked, given, settings)
    told = settings.get("spin_us")
    spin_us = wish.spin_us
    if spin_us is None and type(told) is int and 0 <= told <= MOST_SPIN:
        spin_us = told
    if wish.count == PERFORMANCE:
        return _on_performance(cores, spin_us, source)
    if wish.count:
        count = int(wish.count)
        # A device may have fewer cores than the one that the artifact was made for.
        return Threads(min(count, cores.most) if source == _ARTIFACT else count, (), spin_us, source)
    whole = not cores.restricted and cores.most == len(cores.usable)
    left = whole and given in ("", "0")
    limit = "as many as this process may use" if not whole else "one for each physical core"
    return Threads(cores.most, (), spin_us, limit, left)


_ASKED, _VARIABLE, _ARTIFACT = "asked for", f"by {VARIABLE}", "by the artifact"


def _wish(asked: int | str | None, given: str, settings: Mapping[str, Any]) -> tuple[Asked, str]:
    if asked is not None:
        return Asked.parse(str(asked)), _ASKED
    if given not in ("", "0"):
        if (count := _number(given)) is None:
            raise UserError(f"{VARIABLE} is '{one_line(given[:40])}': set a number of threads, or unset it")
        return Asked(count), _VARIABLE
    wanted = settings.get("threads", 0)
    if wanted == PERFORMANCE or (type(wanted) is int and 0 <= wanted <= MOST):
        return Asked(wanted), _ARTIFACT
    return Asked(0), _ARTIFACT


def _number(text: str) -> int | None:
    """None: it is none, or too large a one."""
    if not (text.isascii() and text.isdigit()) or len(text) > len(str(MOST)) or int(text) > MOST:
        return None
    return int(text)


def _on_performance(cores: Cores, spin_us: int | None, source: str) -> Threads:
    count = cores.at_most(len(cores.performance))
    why = f"{source}: " + ("the P cores" if cores.hybrid else "all cores are alike")
    processors = cores.performance[:count] if cores.numbered else ()
    return Threads(count, processors, spin_us, why, performance=True)
