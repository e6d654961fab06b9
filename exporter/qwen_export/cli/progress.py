"""A progress bar on the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from qwen_export.cli.console import PlainConsole
from qwen_export.progress import Progress as ExportProgress


class _Bar:
    """How far a long task is, on stderr so that stdout stays clean for --json."""

    def __init__(self, console: PlainConsole, bar: Progress, title: str) -> None:
        self._console, self._bar = console, bar
        self._task = bar.add_task(title, total=None)

    def note(self, message: str) -> None:
        self._console.print(message)

    def start(self, total: int) -> None:
        self._bar.update(self._task, total=total, completed=0)

    def advance(self, count: int) -> None:
        self._bar.advance(self._task, count)


BYTES: tuple[ProgressColumn, ...] = (DownloadColumn(), TransferSpeedColumn())
STEPS: tuple[ProgressColumn, ...] = (MofNCompleteColumn(),)


@contextmanager
def progress_bar(show: bool, title: str, columns: tuple[ProgressColumn, ...]) -> Iterator[ExportProgress]:
    console = PlainConsole(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        *columns,
        TimeRemainingColumn(),
        console=console,
        disable=not show,
    )
    with bar:
        yield _Bar(console, bar, title)
