"""A new version's files put together in a folder: those that another version has are taken from there.

A file that is the same in the old version is cloned where the file system can: no room is taken, and a write
to one leaves the other alone. It is copied where there is room, and else linked. A link is one file with two
names: damage to it is damage to both versions, which is said.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qwen_common.errors import UserError
from qwen_common.files import replace, sha256
from qwen_common.manifest import FileEntry
from qwen_launcher.bundle import CONTENTS, SIGNATURE, Bundle, files_in

from qwen_runtime.fetch import tenths
from qwen_runtime.kiosk.sources import Source

_BLOCK = 4096  # what a file system gives out at a time
_FICLONE = 0x40049409  # linux/fs.h
_KEPT_FREE = 16 * 1024 * 1024  # for logs and state

Note = Callable[[str], None]


@dataclass
class Moved:
    """Bytes by where they came from."""

    fetched: int = 0
    reused: int = 0
    linked: int = 0
    total: int = 0


def stage(folder: Path, bundle: Bundle, source: Source, others: Sequence[Bundle], note: Note) -> Moved:
    """Fill `folder` with exactly the files of the bundle, each compared with its SHA-256 on the way.

    Args:
        folder: what is right of its content is kept.
        others: versions that are here already.

    Raises:
        UserError: there is no room for it, or a file of the source is not as it was signed.
    """
    files = bundle.contents["files"]
    folder.mkdir(parents=True, exist_ok=True)
    here = _clean(folder, files)
    known = {
        (entry["size"], entry["sha256"]): other.root / name
        for other in others
        for name, entry in other.contents["files"].items()
    }
    found = {name: known.get((entry["size"], entry["sha256"])) for name, entry in files.items()}
    shared = {name: path for name, path in found.items() if path is not None}
    missing = {name: entry for name, entry in files.items() if name not in here}
    clones = bool(shared) and _can_clone(folder, next(iter(shared.values())))
    new = sum(_room(entry) for name, entry in missing.items() if name not in shared)
    copies = 0 if clones else sum(_room(entry) for name, entry in missing.items() if name in shared)
    new -= sum(_room_of(folder / name) for name in missing)  # what is there of them already
    free = shutil.disk_usage(folder).free - _KEPT_FREE
    if free < new:
        raise UserError(
            f"the version needs {max(0, new + _KEPT_FREE) / 1e9:.2f} GB and {folder.parent} has "
            f"{(free + _KEPT_FREE) / 1e9:.2f} free: free some space"
        )
    link = free < new + copies
    moved = Moved(total=sum(entry["size"] for entry in missing.values()))
    tell = tenths("copying", moved.total, note)
    for name, entry in missing.items():
        to = folder / name
        to.parent.mkdir(parents=True, exist_ok=True)
        if name in shared and _take(shared[name], to, entry, clones, link):
            moved.reused += entry["size"]
            moved.linked += entry["size"] * (link and not clones)
            tell(moved.fetched + moved.reused)
        else:

            def came(count: int) -> None:
                moved.fetched += count
                tell(moved.fetched + moved.reused)

            source.fetch(name, entry, to, came)
    if moved.linked:
        note(
            f"no room for a second copy of {moved.linked / 1e9:.2f} GB that did not change: "
            "both versions have the same file, and damage to it is damage to both"
        )
    for name, data in zip((CONTENTS, SIGNATURE), bundle.signed, strict=True):
        replace(folder / name, data)
    return moved


def _clean(folder: Path, files: Mapping[str, FileEntry]) -> set[str]:
    """Remove what does not belong into the folder; returns what is in it and right."""
    here = set()
    for path in [path for path in folder.rglob("*") if path.is_symlink()]:
        path.unlink()
    for name in list(files_in(folder)):
        path, entry = folder / name, files.get(name)
        size = path.stat().st_size
        if entry is not None and size == entry["size"] and sha256(path) == entry["sha256"]:
            here.add(name)
        elif entry is None or size >= entry["size"] or path.stat().st_nlink > 1:
            path.unlink()
    return here


def _take(other: Path, to: Path, entry: FileEntry, clone: bool, link: bool) -> bool:
    """Whether the other version's file was right and is now here too."""
    with suppress(OSError):
        to.unlink(missing_ok=True)
        if clone:
            _clone(other, to)
        elif link:
            os.link(other, to)
        else:
            shutil.copyfile(other, to)
        if sha256(to) == entry["sha256"]:
            return True
    to.unlink(missing_ok=True)
    return False


def _clone(source: Path, to: Path) -> None:
    """Share a file's blocks until either is written to.

    Raises:
        OSError: the file system cannot.
    """
    if sys.platform != "linux":
        raise OSError
    import fcntl

    with source.open("rb") as one, to.open("wb") as other:
        fcntl.ioctl(other, _FICLONE, one.fileno())


def _can_clone(folder: Path, example: Path) -> bool:
    probe = folder / ".clone"
    try:
        _clone(example, probe)
    except OSError:
        return False
    finally:
        probe.unlink(missing_ok=True)
    return True


def _room(entry: FileEntry) -> int:
    return -(-entry["size"] // _BLOCK) * _BLOCK


def _room_of(path: Path) -> int:
    return -(-path.stat().st_size // _BLOCK) * _BLOCK if path.exists() else 0
