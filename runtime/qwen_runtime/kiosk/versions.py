"""Versions of bundles, in their order."""

from __future__ import annotations

from packaging.version import InvalidVersion, Version
from qwen_common.errors import UserError, one_line
from qwen_launcher.bundle import VERSION


def version_key(version: str) -> Version:
    """What orders versions (PEP 440).

    Raises:
        UserError: it is not a version, or has white space or a length that no release's folder is named with.
    """
    try:
        if VERSION.fullmatch(version):
            return Version(version)
    except InvalidVersion:
        pass
    raise UserError(f"'{one_line(version[:64])}' is not a version: write numbers with dots between them")
