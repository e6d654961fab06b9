"""A file of which size and SHA-256 are known, from a folder or a server: gone on with where it broke off."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO, Protocol

from qwen_common.manifest import FileEntry

BLOCK = 1024 * 1024


class Place(Protocol):
    """Files by their path with forward slashes."""

    def read(self, path: str, most: int) -> bytes:
        """A file of at most `most` bytes."""

    def open(self, path: str, offset: int) -> AbstractContextManager[tuple[int, Iterator[bytes]]]:
        """A file's blocks, and the offset at which they begin: `offset`, or 0 where that cannot be had."""


def fetch(place: Place, path: str, entry: FileEntry, to: Path, note: Callable[[int], None]) -> bool:
    """Write a file to `to`, after what is there of it already.

    Args:
        note: told how many bytes came.

    Returns:
        Whether it is as `entry` says; else nothing of it is left.
    """
    have = to.stat().st_size if to.exists() else 0
    if 0 < have < entry["size"] and _copy(place, path, entry, to, have, note):
        return True
    return _copy(place, path, entry, to, 0, note)


def _copy(
    place: Place, path: str, entry: FileEntry, to: Path, have: int, note: Callable[[int], None]
) -> bool:
    digest = hashlib.sha256()
    with place.open(path, have) as (offset, blocks), to.open("r+b" if offset else "wb") as file:
        for block in blocks_of(file) if offset else ():
            digest.update(block)
        size = offset
        for block in blocks:
            size += len(block)
            if size > entry["size"]:
                break
            file.write(block)
            digest.update(block)
            note(len(block))
    same = size == entry["size"] and digest.hexdigest() == entry["sha256"]
    if not same:
        to.unlink()
    return same


def blocks_of(file: BinaryIO) -> Iterator[bytes]:
    while block := file.read(BLOCK):
        yield block


def tenths(doing: str, total: int, note: Callable[[str], None]) -> Callable[[int], None]:
    """What says a line for every tenth of `total` bytes, when told how many are done."""
    said = -1

    def tell(done: int) -> None:
        nonlocal said
        if (part := 10 * done // max(1, total)) > said:
            said = part
            note(f"{doing}: {10 * part}% of {total / 1e9:.2f} GB")

    return tell
