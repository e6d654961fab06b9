"""How a release's programs are started: by the device's Python, from the release's packages and no others.

Nothing of the user's or the system's packages is found, no start-up file of them runs, and compiled copies
beside the sources are neither read nor written: what was checked is what runs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from qwen_launcher.bundle import PYTHON_PROGRAM
from qwen_launcher.installed import Release

# -I would leave out the folder of compiled copies too, which only the environment tells a worker process.
_FLAGS = ("-S", "-s", "-P")
_START = "import sys; sys.path.append(sys.argv.pop(1)); from qwen_runtime.kiosk.program import main; main()"


def command(release: Release, *arguments: str) -> list[str]:
    """The command line of the release's `qwen-run`, for the Python that the release brings or this one."""
    own = release.root / PYTHON_PROGRAM
    return [
        str(own) if own.is_file() else sys.executable,
        *_FLAGS,
        "-c",
        _START,
        str(release.site),
        *arguments,
    ]


def environment(compiled: Path | None = None, target: Path | None = None) -> Mapping[str, str]:
    """Ours without what changes Python.

    Args:
        compiled: a folder that nobody else writes to, for compiled copies; None: there are none.
        target: where the kiosk is installed, for commands that would else be told.
    """
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith("PYTHON")}
    kept["PYTHONIOENCODING"] = "utf-8"
    kept["PYTHONPYCACHEPREFIX"] = str(compiled or Path(os.devnull, "none"))
    if compiled is None:
        kept["PYTHONDONTWRITEBYTECODE"] = "1"
    if target is not None:
        kept["QWEN_EDGE_KIOSK"] = str(target)
    return kept
