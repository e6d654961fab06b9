"""Deprecated: import from `qwen_common.errors`."""

from __future__ import annotations

import warnings

from qwen_common.errors import (
    BELOW_THE_BAR,
    INTERNAL_ERROR,
    INTERRUPTED,
    READER_GONE,
    USER_ERROR,
    UserError,
    reported,
)

__all__ = [
    "BELOW_THE_BAR",
    "INTERNAL_ERROR",
    "INTERRUPTED",
    "READER_GONE",
    "USER_ERROR",
    "UserError",
    "reported",
]

warnings.warn("qwen_profiles.errors is now qwen_common.errors", DeprecationWarning, stacklevel=2)
