"""Whether this machine, and the Python that runs, are those that a bundle was made for.

Standard library alone, for it is asked before anything of the bundle can run.
"""

from __future__ import annotations

import os
import platform
import sys
import sysconfig
from collections.abc import Mapping

_NAMES = {"linux": "linux", "win32": "win", "darwin": "macos"}
_GLIBC = "CS_GNU_LIBC_VERSION"
MSVC_RUNTIME, _MSVC_VERSION = "msvcp140.dll", "14"
_NEWER = "use a newer system, or make the bundle with older packages"
_ADVICE = {
    "glibc": _NEWER,
    "macos": _NEWER,
    MSVC_RUNTIME: "install Microsoft's Visual C++ Redistributable, or make the bundle with --carry-msvc",
}


def this_platform() -> str:
    """As `qwen-export bundle --platform` calls it, where it is one of those: such as `linux_x86_64`.

    On Windows that is Python's own machine, which is what its packages must be for.
    """
    if sys.platform == "win32":
        machine = sysconfig.get_platform().rpartition("-")[2]
    else:
        machine = platform.machine()
    return f"{_NAMES.get(sys.platform, sys.platform)}_{machine.lower()}"


def this_python() -> str:
    """Such as `CPython 3.12`; with a `t` where it has no global lock, and so packages of its own."""
    free = "t" if sysconfig.get_config_var("Py_GIL_DISABLED") else ""
    return f"{platform.python_implementation()} {sys.version_info.major}.{sys.version_info.minor}{free}"


def system_versions() -> dict[str, str]:
    """What wheels may need: {"glibc": "2.36"}, {"macos": "14.5"}, {"msvcp140.dll": "14"}, or {}."""
    if sys.platform == "darwin":
        return {"macos": platform.mac_ver()[0]}
    if sys.platform == "win32":
        found = os.path.isfile(os.path.join(os.environ.get("SYSTEMROOT", ""), "System32", MSVC_RUNTIME))
        return {MSVC_RUNTIME: _MSVC_VERSION} if found else {}
    if _GLIBC in getattr(os, "confstr_names", {}):
        name, _, version = (os.confstr(_GLIBC) or "").partition(" ")
        return {name: version} if version else {}
    return {}


def misfit(made_for: str, python: str | None, needs: Mapping[str, str]) -> str | None:
    """Why a bundle cannot run here, with what to do; None: it can.

    Args:
        made_for: a platform.
        python: version of CPython, such as 3.12; None: whichever starts it.
        needs: the oldest system that it runs on, as `system_versions` has it.
    """
    if made_for != this_platform():
        return f"the bundle is for {made_for}, and this is {this_platform()}: make one for it"
    if python is not None and f"CPython {python}" != this_python():
        return f"the bundle is for CPython {python}, and this is {this_python()}: install the former"
    here = system_versions()
    for system, version in needs.items():
        advice = _ADVICE.get(system, _NEWER)
        if system not in here:
            return f"the bundle needs {system} {version}, and this system has none: {advice}"
        if _numbers(here[system]) < _numbers(version):
            return f"the bundle needs {system} {version}, and this system has {here[system]}: {advice}"
    return None


def _numbers(version: str) -> list[int]:
    return [int(part) if part.isdecimal() else 0 for part in version.split(".")]
