"""Execution providers that Windows itself offers: Windows ML's catalogue, through PyPI's `windowsml`.

Windows 11 (24H2 and newer) downloads them once for all programs. States are those of Microsoft's "Install
execution providers with Windows ML": what is not present is to be downloaded, what is not ready is on the
machine and this process has yet to be given it, what is ready can be registered. Only `download` downloads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from qwen_common.errors import UserError
from qwen_common.providers import Provider

PACKAGE = "windowsml"
READY, NOT_READY, NOT_PRESENT = "ready", "not ready", "not present"
_STATES = {"Ready": READY, "NotReady": NOT_READY, "NotPresent": NOT_PRESENT}


@dataclass(frozen=True)
class SystemProvider:
    """One entry of the catalogue.

    Attributes:
        name: ONNX Runtime's name of it; letters may be large where ONNX Runtime's are small.
        state: `READY`, `NOT_READY` or `NOT_PRESENT`.
    """

    name: str
    version: str
    state: str


def is_installed() -> bool:
    """Whether `windowsml` is there, and Windows has a catalogue for it."""
    return _catalogue() is not None


def system_providers() -> list[SystemProvider]:
    """What the catalogue offers for this machine; [] where there is no catalogue."""
    return [SystemProvider(entry.name, entry.version, _state(entry)) for entry in _entries()]


def offered(provider: Provider) -> SystemProvider | None:
    """The catalogue's entry for `provider`."""
    entry = _entry(provider)
    return None if entry is None else SystemProvider(entry.name, entry.version, _state(entry))


def library(provider: Provider) -> str | None:
    """Path of the library of a provider that is on this machine, made ready; None where it is not."""
    entry = _entry(provider)
    if entry is None or _state(entry) == NOT_PRESENT:
        return None
    if _state(entry) == NOT_READY:
        entry.ensure_ready()
    return str(entry.library_path)


def download(provider: Provider, progress: Callable[[float], None]) -> None:
    """Have Windows download and install `provider`.

    Args:
        progress: called with percent (so Microsoft's page; the package's docstring says a fraction), from
            another thread.

    Raises:
        UserError: the catalogue does not offer it here, or Windows could not do it.
    """
    entry = _entry(provider)
    if entry is None:
        missing = "" if is_installed() else f": its catalogue needs Windows 11 24H2 and pip install {PACKAGE}"
        raise UserError(f"Windows does not offer {provider.title} here{missing}")
    try:
        with entry.ensure_ready_async(on_progress=progress) as operation:
            operation.wait()
    except OSError as error:
        raise UserError(f"Windows could not install {provider.title}: {error}") from error


def _entry(provider: Provider) -> Any:
    wanted = provider.onnxruntime_name.casefold()
    return next((entry for entry in _entries() if entry.name.casefold() == wanted), None)


def _state(entry: Any) -> str:
    return _STATES[entry.ready_state.name]


def _entries() -> list[Any]:
    catalogue = _catalogue()
    return [] if catalogue is None else catalogue.find_all_providers()


@cache
def _catalogue() -> Any:
    """Open for as long as this process runs: what it hands out must not outlive it."""
    try:
        from windowsml import EpCatalog

        return EpCatalog()
    except (ImportError, OSError):  # not Windows, or one without a catalogue
        return None
