"""Where the library of a plug-in provider lies on this machine, and its registration with ONNX Runtime."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from qwen_common.providers import Provider

from qwen_runtime import windows_ml

_registered: set[str] = set()  # keys of providers, of this process


def is_here(provider: Provider) -> bool:
    """Whether a plug-in's library is on this machine. Loads and downloads nothing."""
    if _named(provider) or _has_package(provider) or _beside_onnxruntime(provider):
        return True
    entry = windows_ml.offered(provider) if provider.in_catalogue else None
    return entry is not None and entry.state != windows_ml.NOT_PRESENT


def library(provider: Provider) -> str:
    """Path of a plug-in's library: the user's own, the package's, beside ONNX Runtime, the system's.

    Raises:
        FileNotFoundError: none of them is here.
    """
    found = _named(provider) or _of_package(provider) or _beside_onnxruntime(provider)
    if found is None and provider.in_catalogue:
        found = windows_ml.library(provider)
    if found is None:
        raise FileNotFoundError(f"no library of {provider.title} is on this machine")
    return found


def register(provider: Provider, og: Any) -> None:
    """Give a plug-in's library to ONNX Runtime GenAI, once."""
    if provider.plugin is not None and provider.key not in _registered:
        og.register_execution_provider_library(provider.onnxruntime_name, library(provider))
        _registered.add(provider.key)


def devices(provider: Provider) -> list[Any]:
    """What a plug-in that is here finds to run on: onnxruntime's OrtEpDevice each."""
    import onnxruntime

    def found() -> list[Any]:
        return [d for d in onnxruntime.get_ep_devices() if d.ep_name == provider.onnxruntime_name]

    if not found():
        onnxruntime.register_execution_provider_library(provider.onnxruntime_name, library(provider))
    return found()


def _named(provider: Provider) -> str | None:
    return os.environ.get(provider.variable) if provider.variable else None


def _has_package(provider: Provider) -> bool:
    return provider.plugin is not None and find_spec(provider.plugin.partition(":")[0]) is not None


def _of_package(provider: Provider) -> str | None:
    return str(resolve_name(provider.plugin)()) if provider.plugin and _has_package(provider) else None


def _beside_onnxruntime(provider: Provider) -> str | None:
    name, onnxruntime = provider.beside_onnxruntime.get(sys.platform), find_spec("onnxruntime")
    if name is None or onnxruntime is None or onnxruntime.origin is None:
        return None
    path = Path(onnxruntime.origin).parent / "capi" / name
    return str(path) if path.is_file() else None
