"""The versions that are installed in a folder, and which of them may serve.

    TARGET/current          name of the version in use, replaced in one step
    TARGET/previous         name of the last good one before it
    TARGET/key.pub          the key that every bundle must be signed with; key.copy.pub is the same again
    TARGET/releases/NAME/   a bundle as it was signed, and nothing else
    TARGET/state/           what the running kiosk and the checks note down; all of it may be lost
    TARGET/launcher.pyz     and the scripts: those of the version that was installed last

A file here may be damaged in whatever way: it is then as if it were not there.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_common.errors import UserError
from qwen_common.files import as_json, parse_json, partial

from qwen_launcher.bundle import (
    ARTIFACT,
    MOST_BYTES,
    SITE,
    VERSION,
    Bundle,
    Seen,
    public_key_of,
    read_bounded,
)

_MOST_NAME_BYTES = 200


@dataclass(frozen=True)
class Release:
    """One installed version."""

    root: Path

    @property
    def name(self) -> str:
        return self.root.name

    @property
    def artifact(self) -> Path:
        return self.root / ARTIFACT

    @property
    def site(self) -> Path:
        return self.root / SITE


class Installed:
    """The versions in one folder.

    Args:
        target: the folder; it need not exist.
    """

    def __init__(self, target: Path) -> None:
        self.target = Path(os.path.abspath(target))
        self.key = self.target / "key.pub"
        self.second_key = self.target / "key.copy.pub"
        self.state = self.target / "state"
        self.releases = self.target / "releases"

    @property
    def current(self) -> Release | None:
        return self._named(self.target / "current")

    @property
    def previous(self) -> Release | None:
        return self._named(self.target / "previous")

    @property
    def good(self) -> Release | None:
        """The one that last served well."""
        return self._named(self.state / "good")

    def candidates(self) -> Iterator[Release]:
        """The release in use, the last good ones, and whatever else is there, the newest first."""
        found = [release for release in (self.current, self.good, self.previous) if release]
        for release in dict.fromkeys([*found, *self._others()]):
            if os.path.isdir(release.root):  # whatever the disk answers
                yield release

    def keys(self) -> list[Path]:
        """Files of the key that are not damaged.

        Raises:
            UserError: there is none.
        """
        found = []
        for path in (self.key, self.second_key):
            with suppress(UserError):
                public_key_of(path)
                found.append(path)
        if not found:
            raise UserError(f"{self.key} is missing or damaged: copy the public key there again")
        return found

    def open(self, release: Release) -> Bundle:
        """Its list of files, whose signature holds.

        Raises:
            UserError: as `Bundle.open`, and where nothing of the name is there.
        """
        keys = self.keys()
        for key in keys[:-1]:  # one of the two may be damaged and still look like a key
            with suppress(UserError):
                return Bundle.open(release.root, key)
        return Bundle.open(release.root, keys[-1])

    def check(
        self, release: Release, full: bool = False, note: Callable[[int], None] | None = None
    ) -> Bundle:
        """Compare every file of a release, its programs among them, with the signed list.

        Args:
            full: read every byte. Else a file is not read again while its size, its times and its place on
                the disk are those of the last time.
            note: as for `Bundle.check`.

        Raises:
            UserError: the signature does not hold, or a file is missing, new or changed; names the first one.
        """
        try:
            signed = self.open(release)
            seen = {} if full else self._seen(release)
            now = signed.check(seen, note=note)
        except OSError as error:
            raise UserError(
                f"cannot read {error.filename or release.root} ({error.strerror}): install the bundle again"
            ) from error
        if now != seen:
            self.remember(self._seen_file(release), now)
        return signed

    def remember(self, path: Path, content: Any) -> None:
        """Write a file of `state`; without room or permission for it, not."""
        data = as_json(content) if path.suffix == ".json" else str(content).encode()
        with suppress(OSError):
            self.state.mkdir(exist_ok=True)
            # The folder may be the service's, and root may be who writes: no link is followed.
            partial(path).unlink(missing_ok=True)
            with open(partial(path), "xb") as file:
                file.write(data)
            os.replace(partial(path), path)

    def forget(self, release: Release) -> None:
        with suppress(OSError):
            self._seen_file(release).unlink()

    def _seen_file(self, release: Release) -> Path:
        return self.state / f"checked-{release.name}.json"

    def _seen(self, release: Release) -> Seen:
        seen = read_state(self._seen_file(release))
        if sys.platform == "win32":  # where a file's times can all be set back: programs are read every time
            return {name: look for name, look in seen.items() if name.startswith(f"{ARTIFACT}/")}
        return seen

    def _named(self, pointer: Path) -> Release | None:
        """The release that a file names; None where it names none."""
        try:
            name = read_bounded(pointer, _MOST_NAME_BYTES).decode("ascii").strip()
        except (OSError, UserError, ValueError):
            return None
        return Release(self.releases / name) if VERSION.fullmatch(name) else None

    def _others(self) -> list[Release]:
        try:
            with os.scandir(self.releases) as entries:
                found = [
                    (entry.stat(follow_symlinks=False).st_mtime, entry.name)
                    for entry in entries
                    if VERSION.fullmatch(entry.name)
                ]
        except OSError:
            return []
        return [Release(self.releases / name) for _, name in sorted(found, reverse=True)]


def read_state(path: Path) -> dict[str, Any]:
    """A JSON object of `state`; empty where it is missing or damaged."""
    try:
        return parse_json(read_bounded(path, MOST_BYTES), path, "")
    except (OSError, UserError):
        return {}
