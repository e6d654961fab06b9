"""The wheels that a program needs on another platform, downloaded here.

pip picks wheels for a platform but evaluates environment markers for the one it runs on, so the requirements
that only the target has (`; sys_platform == "win32"`) are found from the wheels' own metadata and added.
"""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PathDistribution
from pathlib import Path, PurePath

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from qwen_common.errors import UserError
from qwen_common.providers import PROVIDERS

from qwen_export.bundle.platforms import Platform


@dataclass(frozen=True)
class Wheel:
    """One wheel file and what it says of itself."""

    path: Path

    @property
    def distribution(self) -> PathDistribution:
        archive = zipfile.ZipFile(self.path)
        folder = next(
            name.partition("/")[0] for name in archive.namelist() if name.endswith(".dist-info/METADATA")
        )
        return PathDistribution(zipfile.Path(archive, f"{folder}/"))

    def text(self, path: PurePath) -> str:
        """A file of it. Distribution.read_text finds none of those beside .dist-info in an archive.

        The RECORD of a wheel that was built on Windows may have backslashes, which the archive has not.
        """
        with zipfile.ZipFile(self.path) as archive:
            return archive.read(path.as_posix().replace("\\", "/")).decode(errors="replace")

    @property
    def name(self) -> str:
        return canonicalize_name(self.path.name.split("-")[0])

    @property
    def version(self) -> str:
        return self.path.name.split("-")[1]

    @property
    def tags(self) -> list[str]:
        """Platforms that it is for; each of them will do."""
        return self.path.stem.split("-")[-1].split(".")

    def needs(self, environment: Mapping[str, str], extras: Iterable[str]) -> list[Requirement]:
        """Its requirements in `environment`, those of `extras` among them."""
        requirements = [Requirement(text) for text in self.distribution.requires or []]
        environments = [dict(environment, extra=extra) for extra in ("", *extras)]
        return [
            item
            for item in requirements
            if item.marker is None or any(item.marker.evaluate(each) for each in environments)
        ]


def replacements(providers: Iterable[str], system: str) -> tuple[dict[str, str], list[str]]:
    """Packages for all of an artifact's execution providers that a platform can have.

    Args:
        providers: their keys, in the order in which they are tried.
        system: the platform's sys.platform.

    Returns:
        As `Provider.replaces`, and the titles of providers that want another package in a place that one
        before them has taken.
    """
    replaced: dict[str, str] = {}
    left_out = []
    for provider in (PROVIDERS[key] for key in providers if key in PROVIDERS):
        if provider.systems is not None and system not in provider.systems:
            continue
        if any(replaced.get(name, wanted) != wanted for name, wanted in provider.replaces.items()):
            left_out.append(provider.title)
        else:
            replaced |= provider.replaces
    return replaced, left_out


def download(
    root: Path,
    extras: Iterable[str],
    replaced: Mapping[str, str],
    platform: Platform,
    python: str,
    folder: Path,
) -> list[Wheel]:
    """Put everything that the wheel `root` needs on `platform` beside it; its own name is asked of no index.

    Args:
        extras: of the root.
        replaced: distributions that are not wanted, with the requirement to take instead ("" for none).
        python: version of CPython there, such as 3.12.

    Raises:
        UserError: pip finds no wheel of something for that platform and Python.
    """
    environment = {
        **platform.markers,
        "python_version": python,
        "python_full_version": f"{python}.0",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }
    own = Wheel(root)
    wanted = [item for item in _own_needs(own, environment, extras) if item.name not in replaced]
    wanted += [Requirement(text) for text in replaced.values() if text]
    while True:
        _pip_download([_plain(item) for item in wanted], platform, python, folder)
        wheels = {wheel.name: wheel for wheel in map(Wheel, folder.glob("*.whl")) if wheel.path != root}
        if own.name in wheels:
            raise UserError(f"a package asks an index for {own.name}, which is this program: leave it out")
        reached, missing = _closure(wanted, wheels, environment)
        if not missing:
            break
        wanted += missing
    for name in wheels.keys() - reached:  # what only this machine would need
        wheels.pop(name).path.unlink()
    return sorted([*wheels.values(), Wheel(root)], key=lambda wheel: wheel.name)


def _own_needs(own: Wheel, environment: Mapping[str, str], extras: Iterable[str]) -> list[Requirement]:
    """What the root needs with `extras`, and with those of its own that they name."""
    names = set(extras)
    while True:
        needed = own.needs(environment, sorted(names))
        more = {extra for item in needed if canonicalize_name(item.name) == own.name for extra in item.extras}
        if more <= names:
            return [item for item in needed if canonicalize_name(item.name) != own.name]
        names |= more


def system_needed(wheels: Iterable[Wheel]) -> dict[str, str]:
    """The oldest system that all of `wheels` run on: {"glibc": "2.28"}, {"macos": "14.0"}, or {}.

    manylinux's tags name the glibc (PEP 600, whose older ones are aliases), macosx's the system.
    """
    needed: dict[str, tuple[int, ...]] = {}
    for wheel in wheels:
        for system, pattern in _SYSTEMS.items():
            found = [match for tag in wheel.tags if (match := pattern.fullmatch(_ALIASES.sub(_alias, tag)))]
            if found:
                oldest = min((int(match[1]), int(match[2])) for match in found)
                needed[system] = max(needed.get(system, oldest), oldest)
    return {system: ".".join(map(str, version)) for system, version in needed.items()}


_SYSTEMS = {
    "glibc": re.compile(r"manylinux_(\d+)_(\d+)_\w+"),
    "macos": re.compile(r"macosx_(\d+)_(\d+)_\w+"),
}
_ALIASES = re.compile(r"^(manylinux1|manylinux2010|manylinux2014)(?=_)")
_OLDER = {"manylinux1": "2_5", "manylinux2010": "2_12", "manylinux2014": "2_17"}


def _alias(match: re.Match[str]) -> str:
    return f"manylinux_{_OLDER[match[1]]}"


def _closure(
    wanted: Iterable[Requirement], wheels: Mapping[str, Wheel], environment: Mapping[str, str]
) -> tuple[set[str], list[Requirement]]:
    """Names of the wheels that are needed, and requirements that none of them meets."""
    reached: dict[str, set[str]] = {}
    missing: list[Requirement] = []
    queue = list(wanted)
    while queue:
        item = queue.pop()
        name = canonicalize_name(item.name)
        if name not in wheels:
            missing.append(item)
        elif name not in reached or not item.extras <= reached[name]:
            reached[name] = reached.get(name, set()) | item.extras
            queue += wheels[name].needs(environment, reached[name])
    return set(reached), missing


def _plain(item: Requirement) -> str:
    """The requirement without its marker, which has been evaluated for the target."""
    item = Requirement(str(item))
    item.marker = None
    return str(item)


def _pip_download(requirements: list[str], platform: Platform, python: str, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(folder)]
    command += ["--only-binary", ":all:", "--implementation", "cp", "--python-version", python]
    for tag in platform.tags:
        command += ["--platform", tag]
    result = subprocess.run([*command, *requirements], capture_output=True, text=True)
    if result.returncode:
        errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
        raise UserError(
            f"pip could not get the wheels: {(errors or [result.stderr.strip()])[-1]}: "
            "check the network, the platform and --python"
        )
