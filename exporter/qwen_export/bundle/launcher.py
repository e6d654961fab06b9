"""A bundle's launcher: qwen_launcher and qwen_common in one file that the device's Python runs."""

from __future__ import annotations

import io
import zipfile
from importlib.resources import files

_PACKAGES = ("qwen_common", "qwen_launcher")
_START = "from qwen_launcher.command import main\n\nmain()\n"
_DATE = (1980, 1, 1, 0, 0, 0)  # the same sources give the same bytes


def launcher() -> bytes:
    """A zip archive of sources that Python runs (PEP 441)."""
    sources = {"__main__.py": _START.encode()}
    for package in _PACKAGES:
        for source in files(package).iterdir():
            if source.name.endswith(".py"):
                sources[f"{package}/{source.name}"] = source.read_bytes()
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as file:
        for name, source_bytes in sorted(sources.items()):
            file.writestr(zipfile.ZipInfo(name, _DATE), source_bytes)
    return archive.getvalue()
