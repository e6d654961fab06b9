"""From an artifact to a signed bundle for one platform."""

from __future__ import annotations

import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from qwen_common.errors import UserError, one_line
from qwen_common.files import as_json, sha256
from qwen_common.manifest import MANIFEST, Manifest, file_entry
from qwen_common.providers import PROVIDERS
from qwen_common.system import MSVC_RUNTIME
from qwen_common.version import own_version
from qwen_launcher.bundle import (
    ARTIFACT,
    CONTENTS,
    FORMAT_VERSION,
    LAUNCHER,
    MOST_BYTES,
    PYTHON,
    SIGNATURE,
    SITE,
    files_in,
    python_digest,
)
from qwen_runtime.artifact import Artifact
from qwen_runtime.kiosk.self_test import make_self_test
from qwen_runtime.kiosk.versions import version_key

from qwen_export.bundle import windows_python
from qwen_export.bundle.keys import sign
from qwen_export.bundle.launcher import launcher
from qwen_export.bundle.notices import cpython_part, model_part, wheel_parts, write_notices
from qwen_export.bundle.own_wheel import build_own_wheel
from qwen_export.bundle.platforms import PLATFORMS, Platform
from qwen_export.bundle.rendering import render
from qwen_export.bundle.site import unpack
from qwen_export.bundle.wheels import Wheel, download, replacements, system_needed

_SCRIPTS = {
    True: ("install.ps1", "start.ps1", "qwen-run.ps1", "task.xml"),
    False: ("install.sh", "start.sh", "qwen-run", "qwen-edge.service"),
}

_FIRST_YEAR = 2026
_MSVC = {"msvc-runtime": "msvc-runtime>=14.40,<15"}
_PYTHON = re.compile(r"3\.[1-9][0-9]")


@dataclass(frozen=True)
class Device:
    """What a bundle is for, and what it brings along for Windows.

    Attributes:
        platform: a key of `PLATFORMS`.
        python: version of CPython on it, such as 3.12.
        carry_python: bring CPython along, see `windows_python`.
        carry_msvc: bring Microsoft's Visual C++ runtime along, from PyPI's msvc-runtime. Who has a licence of
            Visual Studio may give it away with a program.
    """

    platform: str
    python: str
    carry_python: bool = False
    carry_msvc: bool = False


def bundle(
    artifact: Path,
    output: Path,
    device: Device,
    version: str,
    private_key: Path,
    note: Callable[[str], None],
) -> dict[str, Any]:
    """Write a bundle to `output`, a folder or a .zip file; returns its list of contents.

    Args:
        version: numbers with dots between them; a device refuses one that is older than what it has.
        note: told what is being done.

    Raises:
        UserError: the artifact is damaged, the output exists, pip has no wheels for the platform, or the key
            or a version is none.
    """
    version_key(version)
    if not _PYTHON.fullmatch(device.python):
        raise UserError(f"'{one_line(device.python)}' is no version of CPython: write it as 3.12")
    if output.exists():
        raise UserError(f"{output} already exists: choose another place with -o, or remove it")
    sign(b"", private_key)  # a wrong key is known before the work
    platform = PLATFORMS[device.platform]
    if device.carry_python:
        windows_python.check(device.platform, device.python)
    if device.carry_msvc and not platform.windows:
        raise UserError("the Visual C++ runtime is for Windows: leave --carry-msvc off")
    note("checking the artifact")
    source = Artifact.open(artifact, verify=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as name:
        staged = Path(name, "bundle")
        staged.mkdir()
        note("recording the self-test's answer")
        self_test = make_self_test(artifact)
        note("copying the artifact")
        copy_listed(source, staged / ARTIFACT)
        note(f"downloading wheels for {device.platform}, CPython {device.python}")
        provider = source.manifest["provider"]
        wheels = _wheels(device, source.manifest, Path(name, "wheels"), note)
        hashes = {wheel.path.name: sha256(wheel.path) for wheel in wheels}
        note("unpacking them")
        unpack(wheels, hashes, platform, device.python, staged / SITE)
        if device.carry_python:
            note(f"fetching CPython {device.python} for {device.platform}")
            windows_python.carry(device.python, staged)
        note("hashing and signing")
        model = source.manifest["model"]["name"]
        parts = [model_part(source)]
        for wheel in wheels:
            parts += wheel_parts(wheel, hashes[wheel.path.name])
        if not parts[0].text:
            note("the model has no licence file: put its LICENSE beside the checkpoint and export it again")
        if device.carry_python:
            cpython = windows_python.ARCHIVES[device.python].cpython
            parts.append(cpython_part(staged / PYTHON, cpython))
        needs = system_needed(wheels)
        if platform.windows and not device.carry_msvc:
            needs[MSVC_RUNTIME] = "14"
        write_notices(staged, f"qwen-edge kiosk, {model}", version, parts)
        write_scripts(
            staged,
            platform,
            python=device.python,
            model=model,
            devices=_devices(source.manifest),
        )
        facts = {
            "name": model,
            "version": version,
            "platform": device.platform,
            "python": device.python,
            "needs": needs,
            "provider": provider,
            "self_test": self_test,
        }
        contents = seal(staged, facts, private_key)
        if output.suffix == ".zip":
            note("packing")
            pack(staged, Path(name, "bundle.zip"))
            staged = Path(name, "bundle.zip")
        staged.rename(output)
    return contents


def default_version(now: datetime) -> str:
    """The date and time.

    Raises:
        UserError: it is before this program was written, so that every device would have a newer version.
    """
    if now.year < _FIRST_YEAR:
        raise UserError(f"the clock says {now.year}: set it, or give --version")
    return now.strftime("%Y.%m.%d.%H%M%S")


def seal(folder: Path, facts: Mapping[str, Any], private_key: Path) -> dict[str, Any]:
    """Write the list of every file in `folder`, with `facts` about the whole, and sign it; returns it."""
    contents = {
        "format_version": FORMAT_VERSION,
        "qwen_edge": own_version(),
        **facts,
        "files": {name: file_entry(folder / name) for name in sorted(files_in(folder))},
    }
    data = as_json(contents)
    if len(data) > MOST_BYTES:
        raise UserError(f"the list of {folder}'s files is larger than {MOST_BYTES} bytes: leave some out")
    (folder / CONTENTS).write_bytes(data)
    (folder / SIGNATURE).write_bytes(sign(data, private_key))
    return contents


def copy_listed(artifact: Artifact, folder: Path) -> None:
    """What the manifest lists, and nothing that lies beside it."""
    folder.mkdir()
    for name in (MANIFEST, *artifact.manifest["files"]):
        shutil.copyfile(artifact.root / name, folder / name)


def _wheels(device: Device, manifest: Manifest, folder: Path, note: Callable[[str], None]) -> list[Wheel]:
    folder.mkdir()
    platform = PLATFORMS[device.platform]
    own = build_own_wheel(folder)
    replaced, left_out = replacements(
        [manifest["provider"], *manifest["settings"].get("fallbacks", [])], platform.markers["sys_platform"]
    )
    for title in left_out:
        note(f"without {title}: its packages cannot be installed beside those of a provider before it")
    also = _MSVC if device.carry_msvc else {}
    return download(own, ["kiosk"], replaced | also, platform, device.python, folder)


def write_scripts(folder: Path, platform: Platform, **values: object) -> None:
    (folder / LAUNCHER).write_bytes(launcher())
    digest = sha256(folder / LAUNCHER)
    carried = {name: file_entry(folder / name) for name in files_in(folder) if name.startswith(f"{PYTHON}/")}
    for name in ("README.txt", *_SCRIPTS[platform.windows]):
        text = render(
            name,
            windows=platform.windows,
            launcher_sha256=digest,
            python_sha256=python_digest(carried) if carried else "",
            **values,
        )
        newline = "\r\n" if platform.windows else "\n"
        (folder / name).write_bytes(text.replace("\n", newline).encode())
        if text.startswith("#!"):
            (folder / name).chmod(0o755)


def _devices(manifest: Manifest) -> bool:
    """Whether it runs on more than the CPU."""
    provider = PROVIDERS.get(manifest["provider"])
    return manifest.get("device", "cpu") != "cpu" or bool(provider and provider.vendors)


def pack(folder: Path, archive: Path) -> None:
    """Weights are stored as they are: they do not shrink, and a device unpacks faster."""
    # A ZIP has years from 1980 to 2107, and clocks have others.
    with zipfile.ZipFile(archive, "w", allowZip64=True, strict_timestamps=False) as file:
        for name in sorted(files_in(folder)):
            kept = name.startswith(f"{ARTIFACT}/")
            file.write(folder / name, name, zipfile.ZIP_STORED if kept else zipfile.ZIP_DEFLATED)
