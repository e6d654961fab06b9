"""A server whose supervisor was killed: the next supervisor finds it, ends it and takes its place.

The server ends by itself when its supervisor does (`qwen_runtime.kiosk.program`); this is for one that hangs.
On Windows, where a process cannot be told to end from outside, the former is all there is.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from qwen_common.errors import UserError

from qwen_launcher.installed import Installed, read_state

_GRACE = 35.0  # seconds: `serve` lets running answers finish


def note(installed: Installed, server: int, release: str) -> None:
    """Write down who runs, for whoever comes next and for `verify`."""
    running = {"boot": _boot(), "supervisor": os.getpid(), "server": server, "release": release}
    installed.remember(_file(installed), running)


def serving(installed: Installed) -> str | None:
    """The release that a running kiosk answers with."""
    found = _noted(installed)
    return found.get("release") if _is_ours(found.get("supervisor"), installed.target) else None


def end_orphan(installed: Installed, grace: float = _GRACE) -> bool:
    """End the server of a supervisor that is no more; says whether there was one.

    Raises:
        UserError: its supervisor still runs.
    """
    found = _noted(installed)
    supervisor, server = found.get("supervisor"), found.get("server")
    if supervisor != os.getpid() and _is_ours(supervisor, installed.target):
        raise UserError(f"{installed.target} is served by process {supervisor} already: end that first")
    if sys.platform == "win32" or not isinstance(server, int) or not _is_ours(server, installed.target):
        return False
    with suppress(ProcessLookupError):
        os.killpg(server, signal.SIGTERM)
        end = time.monotonic() + grace
        while time.monotonic() < end and _is_ours(server, installed.target):
            time.sleep(0.1)
        os.killpg(server, signal.SIGKILL)
        while _is_ours(server, installed.target):  # until it has left the port
            time.sleep(0.1)
    return True


def _file(installed: Installed) -> Path:
    return installed.state / "running.json"


def _noted(installed: Installed) -> dict[str, Any]:
    """What was noted since the machine started: its numbers begin again, and are much the same each time."""
    found = read_state(_file(installed))
    return found if found.get("boot") == _boot() else {}


def _boot() -> str:
    """Another text for each start of the machine, on Linux."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _is_ours(process: object, target: Path) -> bool:
    """Whether a process of this number runs something of the installation: numbers are used again."""
    if type(process) is not int or process < 2:
        return False
    if sys.platform == "win32":
        return False
    try:
        line = Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ")
    except OSError:
        if sys.platform == "linux":
            return False
        command = ["ps", "-o", "command=", "-p", str(process)]
        line = subprocess.run(command, capture_output=True, check=False).stdout
    return os.fsencode(target) in line
