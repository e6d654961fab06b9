"""The libraries that run a model, behind one protocol."""

from __future__ import annotations

import warnings
from typing import Any


def __getattr__(name: str) -> Any:
    if name != "Guidance":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn("import Guidance from qwen_runtime", DeprecationWarning, stacklevel=2)
    from qwen_runtime.guidance import Guidance

    return Guidance
