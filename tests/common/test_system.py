"""Whether a bundle fits this machine: answered before anything of it runs."""

from __future__ import annotations

import platform
import sys

import pytest
from qwen_common import system
from qwen_common.system import misfit, system_versions, this_platform, this_python

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


def test_this_machine() -> None:
    assert this_platform().endswith(platform.machine().lower())
    assert this_python() == f"CPython {PYTHON}"
    assert misfit(this_platform(), PYTHON, system_versions()) is None


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_the_glibc_is_what_the_library_says() -> None:
    assert system_versions() == {"glibc": platform.libc_ver()[1]}


@pytest.mark.parametrize(
    "here,needs,message",
    [
        ({"glibc": "2.36"}, {"glibc": "2.36"}, None),
        ({"glibc": "2.36"}, {"glibc": "2.5"}, None),
        ({"glibc": "2.28"}, {"glibc": "2.34"}, "needs glibc 2.34, and this system has 2.28: use a newer"),
        ({}, {"glibc": "2.17"}, "needs glibc 2.17, and this system has none"),
        ({"macos": "14.5"}, {"macos": "14.0"}, None),
        ({"macos": "13.6.1"}, {"macos": "14.0"}, "needs macos 14.0, and this system has 13.6.1"),
        ({"glibc": "2.36"}, {}, None),
    ],
)
def test_systems(
    here: dict[str, str], needs: dict[str, str], message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system, "system_versions", lambda: here)
    found = misfit(this_platform(), PYTHON, needs)
    assert message in found if message and found else found is message


def test_others() -> None:
    other = "win_arm64" if this_platform() == "win_amd64" else "win_amd64"
    assert (
        misfit(other, PYTHON, {})
        == f"the bundle is for {other}, and this is {this_platform()}: make one for it"
    )
    assert "is for CPython 3.10, and this is CPython" in (misfit(this_platform(), "3.10", {}) or "")


def test_a_python_without_its_lock_has_packages_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_config_var", lambda name: 1)
    assert "and this is CPython" in (misfit(this_platform(), PYTHON, {}) or "")
