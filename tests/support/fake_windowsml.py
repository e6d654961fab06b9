"""Stands for PyPI's `windowsml` 2.5.96, which can be imported on Windows only.

Names, states and behaviour are those of its wheel for win_amd64: `EpReadyState`, and of `EpCatalog`,
`ExecutionProvider` and `AsyncOperation` what is used here. `CATALOGUE` is what this Windows offers.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum

CATALOGUE: list[ExecutionProvider] = []


class EpReadyState(IntEnum):
    Ready = 0
    NotReady = 1
    NotPresent = 2


class AsyncOperation:
    def __init__(self, provider: ExecutionProvider, on_progress: Callable[[float], None] | None) -> None:
        self._provider, self._on_progress = provider, on_progress

    def wait(self) -> None:
        if self._on_progress is not None:
            self._on_progress(100.0)
        self._provider.ensure_ready()

    def __enter__(self) -> AsyncOperation:
        return self

    def __exit__(self, *args: object) -> None:
        pass


class ExecutionProvider:
    """`calls` are those of the methods that may download."""

    def __init__(self, name: str, state: EpReadyState, fails: bool = False) -> None:
        self.name, self.version, self.ready_state = name, "1.8.69.0", state
        self.calls: list[str] = []
        self._fails = fails

    @property
    def library_path(self) -> str:
        return f"C:\\WindowsApps\\{self.name}.dll" if self.ready_state == EpReadyState.Ready else ""

    def ensure_ready(self) -> None:
        self.calls.append("ensure_ready")
        if self._fails:
            raise OSError(-2147023838, "The service cannot be started")
        self.ready_state = EpReadyState.Ready

    def ensure_ready_async(
        self,
        on_complete: Callable[[], None] | None = None,
        on_progress: Callable[[float], None] | None = None,
    ) -> AsyncOperation:
        return AsyncOperation(self, on_progress)


class EpCatalog:
    def find_all_providers(self) -> list[ExecutionProvider]:
        return list(CATALOGUE)

    def close(self) -> None:
        pass
