"""The platforms that bundles are made for, as pip and PEP 508 call them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Platform:
    """A platform as pip and PEP 508 call it.

    Attributes:
        tags: pip's `--platform`, what the oldest systems run first: of several wheels pip takes the first.
        markers: the environment markers that depend on it.
        windows: which scripts it runs.
    """

    tags: tuple[str, ...]
    markers: Mapping[str, str]

    @property
    def windows(self) -> bool:
        return self.markers["sys_platform"] == "win32"


def _linux(machine: str) -> Platform:
    tags = tuple(f"manylinux_2_{minor}_{machine}" for minor in range(18, 40))
    markers = {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix"}
    return Platform(
        (f"manylinux_2_17_{machine}", f"manylinux2014_{machine}", *tags, f"linux_{machine}"),
        markers | {"platform_machine": machine},
    )


def _windows(tag: str, machine: str) -> Platform:
    markers = {"sys_platform": "win32", "platform_system": "Windows", "os_name": "nt"}
    return Platform((tag,), markers | {"platform_machine": machine})


def _macos() -> Platform:
    markers = {"sys_platform": "darwin", "platform_system": "Darwin", "os_name": "posix"}
    tags = tuple(f"macosx_{major}_0_arm64" for major in range(11, 16))
    return Platform(tags, markers | {"platform_machine": "arm64"})


PLATFORMS = {
    "linux_aarch64": _linux("aarch64"),
    "linux_x86_64": _linux("x86_64"),
    "macos_arm64": _macos(),
    "win_amd64": _windows("win_amd64", "AMD64"),
    "win_arm64": _windows("win_arm64", "ARM64"),
}
