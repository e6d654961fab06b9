"""Wheels unpacked for another platform, so that a device needs no pip and each file that runs is signed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from qwen_common.errors import UserError

from qwen_export.bundle.platforms import Platform
from qwen_export.bundle.wheels import Wheel

# Console scripts, whose first line names a Python of this machine.
_UNUSED = ("bin", "Scripts")


def unpack(
    wheels: Iterable[Wheel], hashes: Mapping[str, str], platform: Platform, python: str, folder: Path
) -> None:
    """Put the packages of `wheels` into `folder`, as pip would on `platform`.

    Args:
        hashes: SHA-256 by wheel file name.
        python: version of CPython there, such as 3.12.

    Raises:
        UserError: pip refuses one of them.
    """
    wheels = list(wheels)
    requirements = folder.with_name("requirements.txt")
    lines = (f"{item.name}=={item.version} --hash=sha256:{hashes[item.path.name]}\n" for item in wheels)
    requirements.write_bytes("".join(lines).encode())
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    command += ["--require-hashes", "--find-links", str(wheels[0].path.parent), "-r", str(requirements)]
    command += ["--target", str(folder), "--only-binary", ":all:", "--implementation", "cp"]
    # What a wheel says of Python is compared with the one that runs pip, in spite of --python-version. The
    # download has compared it with the target's.
    command += ["--python-version", python, "--ignore-requires-python", "--disable-pip-version-check"]
    for tag in platform.tags:
        command += ["--platform", tag]
    result = subprocess.run(command, capture_output=True, text=True)
    requirements.unlink()
    if result.returncode:
        raise UserError(f"pip could not unpack the wheels: {' '.join(result.stderr.split())[-300:]}")
    for name in _UNUSED:
        shutil.rmtree(folder / name, ignore_errors=True)
