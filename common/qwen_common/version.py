"""The version of qwen-edge that runs. pyproject.toml states it, the installed distribution carries it."""

from __future__ import annotations

from importlib.metadata import version

DISTRIBUTION = "qwen-edge"


def own_version() -> str:
    return version(DISTRIBUTION)
