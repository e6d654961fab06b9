"""The command `qwen-export`: one module for each of its commands.

What a command needs is imported when it runs, so that --help and what is mistyped are answered at once.
"""

from __future__ import annotations

from qwen_export.cli.program import main

__all__ = ["main"]
