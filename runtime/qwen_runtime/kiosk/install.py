"""Versions installed side by side on the device, one of them in use.

    TARGET/current          name of the release in use, replaced in one step
    TARGET/previous         name of the last good one before it
    TARGET/key.pub          the key that every bundle must be signed with
    TARGET/releases/NAME/   bundle/ as it was signed, venv/ with its wheels, installed.json

A release is made whole and tried before `current` names it, so whatever stops an install, a working version
stays in use.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from qwen_common.errors import UserError
from qwen_common.files import read_json, replace, sha256

from qwen_runtime.kiosk.bundle import ARTIFACT, REQUIREMENTS, WHEELS, Bundle

_LAUNCHERS = ("start.sh", "start.ps1", "qwen-edge.service", "task.xml", "README.txt")
_RECORD = "installed.json"


@dataclass(frozen=True)
class Release:
    """One installed version."""

    root: Path

    @property
    def bundle(self) -> Path:
        return self.root / "bundle"

    @property
    def artifact(self) -> Path:
        return self.bundle / ARTIFACT

    @property
    def command(self) -> Path:
        """Its own qwen-run."""
        folder, suffix = ("Scripts", ".exe") if os.name == "nt" else ("bin", "")
        return self.root / "venv" / folder / f"qwen-run{suffix}"

    def check(self, public_key: Path, full: bool) -> None:
        """Compare with what was installed: size and time of every file, and with `full` its bytes.

        A file whose time differs is hashed in any case.

        Raises:
            UserError: the signature does not hold, or a file is missing, new or changed; names the first one.
        """
        signed = Bundle.open(self.bundle, public_key)
        if not (self.root / _RECORD).is_file():
            raise UserError(f"{self.root} was not installed to its end: install the bundle again")
        record = read_json(self.root / _RECORD, "install the bundle again")
        found = dict(_files(self.root))
        if missing := sorted(record.keys() - found.keys()):
            raise UserError(f"{missing[0]} is missing from {self.root}: install the bundle again")
        if extra := sorted(found.keys() - record.keys()):
            raise UserError(f"{extra[0]} does not belong in {self.root}: install the bundle again")
        for name, path in sorted(found.items()):
            entry = record[name]
            if "link" in entry:
                changed = not path.is_symlink() or os.readlink(path) != entry["link"]
            else:
                status = path.lstat()
                changed = path.is_symlink() or status.st_size != entry["size"]
                if not changed and (full or status.st_mtime_ns != entry["mtime_ns"]):
                    changed = sha256(path) != entry["sha256"]
            if changed:
                raise UserError(f"{name} in {self.root} changed since it was installed: install it again")
        if full:
            signed.check()


class Installation:
    """The versions in one folder.

    Args:
        target: the folder; it need not exist.
    """

    def __init__(self, target: Path) -> None:
        self.target = target

    @property
    def key(self) -> Path:
        return self.target / "key.pub"

    @property
    def current(self) -> Release | None:
        return self._release("current")

    @property
    def previous(self) -> Release | None:
        return self._release("previous")

    def _release(self, pointer: str) -> Release | None:
        try:
            name = (self.target / pointer).read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return None
        if not name or Path(name).name != name:
            raise UserError(f"{self.target / pointer} names no release: install the bundle again")
        return Release(self.target / "releases" / name)

    def install(
        self, bundle_folder: Path, public_key: Path | None, note: Callable[[str], None], older: bool = False
    ) -> Release:
        """Check a bundle, install it beside what is there, try it, and switch to it.

        Args:
            public_key: None takes the one of the first install; another one than that is refused.
            older: allow a version older than the one in use.

        Raises:
            UserError: the bundle or its key is refused, the disk is full, or the self-test fails; what was in
                use stays so.
        """
        public_key = self._trusted(public_key)
        bundle = Bundle.open(bundle_folder, public_key)
        self.target.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.target / "lock", timeout=0):
                return self._install(bundle, public_key, note, older)
        except Timeout as error:
            raise UserError(f"another install is changing {self.target}: wait for it to end") from error

    def _trusted(self, public_key: Path | None) -> Path:
        if not self.key.exists():
            if public_key is None:
                raise UserError("give the public key with --key: nothing is installed yet that has one")
            return public_key
        if public_key is not None and public_key.read_bytes() != self.key.read_bytes():
            raise UserError(f"{public_key} is not the key of {self.target}: update with the key it has")
        return self.key

    def _install(self, bundle: Bundle, public_key: Path, note: Callable[[str], None], older: bool) -> Release:
        name = str(bundle.contents["version"])
        current = self.current
        if current is not None:
            in_use = Bundle.open(current.bundle, public_key)
            if bundle.version < in_use.version and not older:
                raise UserError(
                    f"version {name} is older than {in_use.contents['version']}, which is in use: "
                    "give --older to go back to it"
                )
            if bundle.version == in_use.version:
                raise UserError(f"version {name} is in use already: nothing to do")
        note("checking every file")
        bundle.check()
        release = Release(self.target / "releases" / name)
        shutil.rmtree(release.root, ignore_errors=True)
        try:
            self._make(release, bundle, public_key, note)
        except BaseException:
            shutil.rmtree(release.root, ignore_errors=True)
            raise
        self._switch(release, current, public_key)
        note(f"version {name} is in use")
        return release

    def _make(self, release: Release, bundle: Bundle, public_key: Path, note: Callable[[str], None]) -> None:
        try:
            needed = sum(entry["size"] for entry in bundle.contents["files"].values())
            free = shutil.disk_usage(self.target).free
            if free < 1.5 * needed:  # unpacked wheels
                raise UserError(
                    f"the version needs {1.5 * needed / 1e9:.1f} GB and {self.target} has "
                    f"{free / 1e9:.1f} free: free some space"
                )
            note("copying")
            shutil.copytree(bundle.root, release.bundle)
            Bundle.open(release.bundle, public_key).check()
            note("installing its programs")
            _make_environment(release)
            note("trying it")
            _run([str(release.command), "self-test", str(release.root)], "the new version does not work")
            record = {path: _entry(file) for path, file in _files(release.root)}
            replace(release.root / _RECORD, json.dumps(record).encode())
        except OSError as error:
            raise UserError(
                f"{error.strerror}: {error.filename or self.target}: free space or permit it"
            ) from error

    def _switch(self, release: Release, old: Release | None, public_key: Path) -> None:
        """Only the last step changes what is in use."""
        if not self.key.exists():
            replace(self.key, public_key.read_bytes())
        for name in _LAUNCHERS:
            if (release.bundle / name).exists():
                shutil.copy2(release.bundle / name, self.target / name)
        if old is not None:
            replace(self.target / "previous", old.root.name.encode())
        replace(self.target / "current", release.root.name.encode())
        kept = {release.root.name, old.root.name if old else ""}
        for path in (self.target / "releases").iterdir():
            if path.name not in kept:
                shutil.rmtree(path, ignore_errors=True)

    def roll_back(self) -> Release:
        """Use the last good version again.

        Raises:
            UserError: there is none, or its files changed.
        """
        previous, current = self.previous, self.current
        if previous is None or current is None or previous.root == current.root:
            raise UserError(f"{self.target} has no version to go back to: install a bundle")
        previous.check(self.key, full=True)
        replace(self.target / "current", previous.root.name.encode())
        return previous


def _make_environment(release: Release) -> None:
    environment = release.root / "venv"
    _run([sys.executable, "-m", "venv", str(environment)], "cannot make a Python environment")
    python = release.command.with_name("python.exe" if os.name == "nt" else "python")
    command = [str(python), "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--require-hashes"]
    command += ["--find-links", str(release.bundle / WHEELS), "-r", str(release.bundle / REQUIREMENTS)]
    _run(command, "pip cannot install the wheels")


def _run(command: list[str], failure: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **_CLEAN})
    if result.returncode:
        lines = (result.stderr or result.stdout).strip().splitlines() or ["no message"]
        raise UserError(f"{failure}: {lines[-1].removeprefix('error: ')}")


# What the device's user set for other programs, and files that would not be in the record.
_CLEAN = {"PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1", "PIP_CONFIG_FILE": os.devnull}


def _files(root: Path) -> list[tuple[str, Path]]:
    """Every file and link of a release with its path in it, but for the record itself."""
    found = []
    for folder, folders, names in os.walk(root):
        links = [name for name in folders if Path(folder, name).is_symlink()]
        for name in [*names, *links]:
            path = Path(folder, name)
            found.append((path.relative_to(root).as_posix(), path))
    return [(name, path) for name, path in found if name != _RECORD]


def _entry(path: Path) -> dict[str, object]:
    if path.is_symlink():
        return {"link": os.readlink(path)}
    status = path.stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": sha256(path)}
