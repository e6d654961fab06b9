"""A new version beside those that are installed: made whole and tried before `current` names it.

Whatever stops an install, a working version stays in use. See `qwen_launcher.installed` for what is where.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from filelock import FileLock, Timeout
from qwen_common.errors import UserError
from qwen_common.files import replace
from qwen_launcher.bundle import LAUNCHER, PYTHON_PROGRAM, Bundle, public_key_of, python_digest
from qwen_launcher.command import check_scripts
from qwen_launcher.installed import Installed, Release
from qwen_launcher.program import command, environment

from qwen_runtime.kiosk.sources import Source, bundle_folder
from qwen_runtime.kiosk.staging import Moved, stage
from qwen_runtime.kiosk.versions import version_key

_BESIDE = (
    LAUNCHER,
    "start.sh",
    "start.ps1",
    "qwen-run",
    "qwen-run.ps1",
    "qwen-edge.service",
    "task.xml",
    "README.txt",
)
_TASK, _TASK_TARGET = "task.xml", rb"C:\qwen-edge"
_ALREADY = "version {} is in use already: nothing to do"
_PARTIAL = ".partial-"
_REPLACED = ".replaced-"


@dataclass(frozen=True)
class Change:
    """What an install did.

    Attributes:
        before: version that was in use; None: nothing was.
        after: version in use now.
        moved: None where that was there already.
        seconds: how long it took.
    """

    before: str | None
    after: str
    moved: Moved | None
    seconds: float


class Installation(Installed):
    """The versions in one folder, and how they change."""

    def install(
        self,
        bundle: Path | Source,
        public_key: Path | None,
        note: Callable[[str], None],
        older: bool = False,
    ) -> Change:
        """Check a bundle, install it beside what is there, try it, and switch to it.

        Args:
            bundle: an unpacked bundle's folder, or where else it is.
            public_key: None takes the one of the first install; another one than that is refused.
            note: told what is being done.
            older: allow a version older than the one in use.

        Raises:
            UserError: the bundle or its key is refused, the disk is full, or the self-test fails; what was in
                use stays so.
        """
        started = time.monotonic()
        source = bundle_folder(bundle) if isinstance(bundle, Path) else bundle
        key = self._trusted(public_key)
        if source.version is not None and self._serves(source.version):
            note(_ALREADY.format(source.version))  # and nothing more was asked of the store
            return Change(source.version, source.version, None, time.monotonic() - started)
        signed = self._signed(source, key)
        signed.check_fit()
        with readable_for_all():
            self.target.mkdir(parents=True, exist_ok=True)
        self._refuse_folder_of_another()
        with readable_for_all(), self._locked():
            in_use = self._in_use()
            moved = self._install(signed, source, key, note, older)
        name = signed.contents["version"]
        already = moved is None and in_use == name
        first = f"version {name} is in use"
        note(_ALREADY.format(name) if already else _told(name) if in_use else first)
        return Change(in_use, name, moved, time.monotonic() - started)

    def roll_back(self, note: Callable[[str], None] = lambda _: None) -> Release:
        """Use the last good version again.

        Raises:
            UserError: there is none, or its files changed.
        """
        with readable_for_all(), self._locked():
            current = self.current
            fault = UserError(f"{self.target} has no version to go back to: install a bundle")
            for release in self.candidates():
                if release != current:
                    try:
                        self.check(release, full=True)
                    except UserError as error:
                        fault = error
                        continue
                    self._point(release, current)
                    note(_told(release.name))
                    return release
        raise fault

    def _trusted(self, public_key: Path | None) -> Path:
        try:
            known = self.keys()
        except UserError:
            if public_key is None:
                raise UserError(
                    "give the public key with --key: nothing is installed yet that has one"
                ) from None
            public_key_of(public_key)
            return public_key
        if public_key is not None and public_key_of(public_key) not in map(public_key_of, known):
            raise UserError(f"{public_key} is not the key of {self.target}: update with the key it has")
        return public_key or known[0]

    def _signed(self, source: Source, key: Path) -> Bundle:
        try:
            data, signature = source.signed()
        except FileNotFoundError as error:
            raise UserError(f"no bundle is there: {error.filename or error} is missing") from error
        return Bundle.read(data, signature, key, source.where)

    def _serves(self, version: str) -> bool:
        """Whether it is in use and whole, as far as a start looks."""
        current = self.current
        if current is None or current.name != version:
            return False
        try:
            self.check(current)
            check_scripts(self)
        except UserError:
            return False
        return True

    def _in_use(self) -> str | None:
        return self.current.name if self.current else None

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Nobody but the owner can open the lock's file, let alone hold it."""
        path = self.target / "lock"
        with suppress(FileNotFoundError):
            path.chmod(0o600)
        try:
            with FileLock(path, timeout=0, mode=0o600):
                yield
        except Timeout as error:
            raise UserError(f"another install is changing {self.target}: wait for it to end") from error

    def _refuse_folder_of_another(self) -> None:
        """Root installs nothing into a folder whose owner could change what runs.

        Raises:
            UserError: the folder is another user's.
        """
        if os.name == "posix" and os.geteuid() == 0:
            status = self.target.stat()
            if status.st_uid != 0:
                raise UserError(
                    f"{self.target} belongs to user {status.st_uid}, who could change what runs: "
                    "choose another folder, or make it root's with chown"
                )
            if status.st_mode & 0o022:
                self.target.chmod(status.st_mode & 0o7755)

    def _install(
        self, bundle: Bundle, source: Source, key: Path, note: Callable[[str], None], older: bool
    ) -> Moved | None:
        name, version = bundle.contents["version"], version_key(bundle.contents["version"])
        newer = [found for found in self._versions() if version_key(found) > version]
        if newer and not older:
            raise UserError(
                f"version {name} is older than {newer[0]}, which is in use: give --older to go back to it"
            )
        release = Release(self.releases / name)
        if self._is_whole(release, bundle):
            self._switch(release, key)
            return None
        partial = Release(self.releases / f"{_PARTIAL}{name}")
        self._remove_others(partial)
        try:
            moved = self._make(partial, bundle, source, note)
            self._put(partial, release)
        except BaseException as error:
            if not source.resumes or isinstance(error, _DoesNotWork):
                shutil.rmtree(partial.root, ignore_errors=True)
            raise
        self._trust(key)
        self.check(release)  # and remember it, so that a start need not read it all
        self._switch(release, key)
        return moved

    def _versions(self) -> list[str]:
        """The version in use; where nothing says which, every one that is here."""
        current = self.current
        found = [current] if current and current.root.is_dir() else self.candidates()
        names = []
        for release in found:
            with suppress(UserError):
                version_key(release.name)
                names.append(release.name)
        return names

    def _is_whole(self, release: Release, bundle: Bundle) -> bool:
        """Whether this version is here and undamaged.

        Raises:
            UserError: another one of the same name is.
        """
        try:
            found = self.open(release)
        except (UserError, OSError):
            return False
        if found.signed[0] != bundle.signed[0]:
            raise UserError(
                f"another version {release.name} is installed: give the bundle a version of its own"
            )
        try:
            self.check(release, full=True)
        except UserError:
            return False
        return True

    def _make(self, partial: Release, bundle: Bundle, source: Source, note: Callable[[str], None]) -> Moved:
        try:
            others = []
            for release in self.candidates():
                with suppress(UserError):
                    others.append(self.open(release))
            moved = stage(partial.root, bundle, source, others, note)
            note("trying it")
            _try(partial)
            if os.name == "posix":
                os.sync()  # its bytes are on the disk before its name is
        except FileNotFoundError as error:
            raise UserError(f"{error.filename or error} is missing: copy the bundle there again") from error
        except OSError as error:
            raise UserError(
                f"{error.strerror}: {error.filename or self.target}: free space or permit it"
            ) from error
        return moved

    def _put(self, partial: Release, release: Release) -> None:
        """Give a finished version its name, in place of a damaged one of that name."""
        replaced = self.releases / f"{_REPLACED}{release.name}"
        if os.path.lexists(release.root):
            os.rename(release.root, replaced)
        os.rename(partial.root, release.root)
        self.forget(release)
        shutil.rmtree(replaced, ignore_errors=True)

    def _switch(self, release: Release, key: Path) -> None:
        """Only the last step changes what is in use."""
        self._trust(key)
        for name in _BESIDE:
            if (release.root / name).exists():
                data = beside(name, (release.root / name).read_bytes(), self.target)
                replace(self.target / name, data)
                if data.startswith(b"#!"):  # which a stick's file system may not have kept
                    (self.target / name).chmod(0o755)
        good = self._last_good(release)
        self._list_pythons([found for found in (release, good) if found])
        self._point(release, good)
        kept = {found.name for found in (release, good) if found}
        for path in self.releases.iterdir():
            if path.name not in kept:
                self.forget(Release(path))
                shutil.rmtree(path, ignore_errors=True)

    def _list_pythons(self, releases: Sequence[Release]) -> None:
        """For Windows' scripts: which Python of a version they may run."""
        found: dict[str, None] = {}
        for release in releases:
            files = self.open(release).contents["files"]
            if PYTHON_PROGRAM in files:
                found[python_digest(files)] = None
        if found:
            replace(self.target / "pythons.txt", "".join(f"{digest}\n" for digest in found).encode())

    def _trust(self, key: Path) -> None:
        data = key.read_bytes()
        for path in (self.key, self.second_key):
            if not _is_key(path, public_key_of(key)):
                replace(path, data)

    def _last_good(self, new: Release) -> Release | None:
        """What to go back to from `new`: a version that served well, the one in use, or any that is whole."""
        served = [release for release in (self.good, self.current, self.previous) if release]
        for release in dict.fromkeys([*served, *self.candidates()]):
            if release != new:
                with suppress(UserError):
                    self.check(release)
                    return release
        return None

    def _point(self, release: Release, previous: Release | None) -> None:
        if previous is not None:
            replace(self.target / "previous", previous.name.encode())
        replace(self.target / "current", release.name.encode())

    def _remove_others(self, partial: Release) -> None:
        """What interrupted installs of other versions left."""
        if self.releases.is_dir():
            for path in self.releases.iterdir():
                if path.name.startswith((_PARTIAL, _REPLACED)) and path != partial.root:
                    shutil.rmtree(path, ignore_errors=True)


@contextmanager
def readable_for_all() -> Iterator[None]:
    """What is written meanwhile others can read and not change, whatever the caller's umask is.

    The service is another user than root, who updates.
    """
    before = os.umask(0o022)
    try:
        yield
    finally:
        os.umask(before)


def beside(name: str, data: bytes, target: Path) -> bytes:
    """A bundle's file as it is put beside the versions: Windows' task carries the folder's own path.

    systemd's unit finds it by itself.
    """
    if name != _TASK:
        return data
    return data.replace(_TASK_TARGET, escape(str(target)).encode())


def _told(name: str) -> str:
    return f"version {name} is in use: a kiosk that runs changes to it within seconds"


def _is_key(path: Path, key: bytes) -> bool:
    try:
        return public_key_of(path) == key
    except UserError:
        return False


class _DoesNotWork(UserError):
    """Every file is as it was signed, and the version does not answer as it did where it was made."""


def _try(release: Release) -> None:
    line = command(release, "self-test", str(release.root))
    result = subprocess.run(line, capture_output=True, env=environment(), check=False)
    if result.returncode:
        text = (result.stderr or result.stdout).decode("utf-8", "replace").strip()
        last = (text.splitlines() or ["no message"])[-1]
        raise _DoesNotWork(f"the new version does not work: {last.removeprefix('error: ')}")
