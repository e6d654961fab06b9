"""Where the console script `qwen-export` begins."""

from __future__ import annotations

from qwen_export.cli import main

__all__ = ["main"]
