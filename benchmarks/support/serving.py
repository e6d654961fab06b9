"""`qwen-run serve` as a process that a benchmark starts, watches, and takes the model's process from."""

from __future__ import annotations

import contextlib
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

_SAMPLE = 2.0  # seconds between looks at the memory
_WARM_UP = 60.0  # seconds before memory is expected to be flat


@dataclass(frozen=True)
class Sample:
    """What the server held `seconds` after the watch began: resident bytes of both processes, open files."""

    seconds: float
    server: int
    model: int
    files: int


@contextlib.contextmanager
def served(artifact: Path, options: list[str]) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The address and the process of a server, which is stopped at the end."""
    command = "import sys; from qwen_runtime.cli import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", command, "serve", str(artifact), "--port", "0", *options],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        lines = process.stdout or ()
        yield next(found[1] for line in lines if (found := re.match(r"listening on (\S+)", line))), process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


def watch(
    pid: int, clients: list[threading.Thread], kill_every: float | None, until: float
) -> tuple[list[Sample], int]:
    """Samples while `clients` are at work, and how often the model's process was killed.

    Args:
        kill_every: seconds between two kills.
        until: when it ends all the same, by `time.monotonic`.
    """
    server, begun, rng = psutil.Process(pid), time.monotonic(), random.Random(0)
    samples, kills, last = [], 0, begun
    while any(client.is_alive() for client in clients) and time.monotonic() < until:
        time.sleep(_SAMPLE * rng.uniform(0.9, 1.1))
        now = time.monotonic()
        sizes = {child: size for child in server.children() if (size := _model_size(child))}
        largest = max(sizes.values(), default=0)
        samples.append(Sample(now - begun, server.memory_info().rss, largest, server.num_fds()))
        if kill_every and largest and now - last > kill_every:
            max(sizes, key=sizes.__getitem__).kill()
            kills, last = kills + 1, now
    return samples, kills


def _model_size(process: psutil.Process) -> int:
    """Resident bytes of a model's process; 0 of any other, such as multiprocessing's own."""
    try:
        return process.memory_info().rss if "spawn_main" in " ".join(process.cmdline()) else 0
    except psutil.NoSuchProcess:
        return 0


def print_flatness(samples: list[Sample]) -> None:
    """Medians after the warm-up, in the middle and in the last third, and the most that was seen."""
    warm = [sample for sample in samples if sample.seconds > _WARM_UP] or samples
    third = max(1, len(warm) // 3)
    columns: list[tuple[str, Callable[[Sample], float]]] = [
        ("server, MB", lambda sample: sample.server / 1e6),
        ("model, MB", lambda sample: sample.model / 1e6),
        ("open files", lambda sample: sample.files),
    ]
    for name, column in columns:
        values = [value for sample in warm if (value := column(sample))] or [0.0]  # none while it is asleep
        early, late = statistics.median(values[:third]), statistics.median(values[-third:])
        middle = statistics.median(values[third:-third] or values)
        print(
            f"{name}: after warm-up {early:.0f}, in the middle {middle:.0f}, in the last third {late:.0f}, "
            f"at most {max(values):.0f}"
        )
