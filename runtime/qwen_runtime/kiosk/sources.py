"""Where a new version comes from: a bundle's folder, or a store that `qwen-export publish` filled.

    STORE/rings.json                 {"all": "1.1", "early": "1.2"}: the version for each ring of devices
    STORE/versions/NAME/bundle.json  and bundle.json.sig
    STORE/objects/ab/abcdef...       every file of every version, by its SHA-256

A store is a folder, such as a network share, or a web server that hands one out. Whoever holds it can keep an
update back. They cannot change one: the list is signed, and every file is compared with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qwen_common.errors import UserError, one_line
from qwen_common.files import parse_json
from qwen_common.manifest import FileEntry
from qwen_launcher.bundle import CONTENTS, MOST_BYTES, SIGNATURE, VERSION, at_once, read_bounded

from qwen_runtime.fetch import Place, blocks_of, fetch
from qwen_runtime.web import Web, is_url

RINGS = "rings.json"
RING = "all"  # for devices of which nothing else was said
_SMALL = 64 * 1024


class Folder:
    """A folder that can be read like a web server."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def read(self, path: str, most: int) -> bytes:
        return read_bounded(self.root / path, most)

    @contextmanager
    def open(self, path: str, offset: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        with open(self.root / path, "rb", opener=at_once) as file:
            if offset:
                file.seek(offset)
            yield offset, blocks_of(file)


class Source:
    """One version, wherever it is.

    Args:
        where: for messages.
        contents: path of its bundle.json.
        path: of a file of it, by its name and its entry in the list.
        resumes: whether what an interrupted copy left is worth keeping.
        version: where it is known before the list is read.
    """

    def __init__(
        self,
        where: Path,
        place: Place,
        contents: str,
        path: Callable[[str, FileEntry], str],
        resumes: bool,
        version: str | None = None,
    ) -> None:
        self.where = where
        self.version = version
        self._place = place
        self._contents = contents
        self._path = path
        self.resumes = resumes

    def signed(self) -> tuple[bytes, bytes]:
        """bundle.json and its signature, neither of them checked."""
        folder = self._contents.removesuffix(CONTENTS)
        return self._place.read(self._contents, MOST_BYTES), self._place.read(f"{folder}{SIGNATURE}", _SMALL)

    def fetch(self, name: str, entry: FileEntry, to: Path, note: Callable[[int], None]) -> None:
        """Write a file of the list to `to`, after what is there of it already.

        Args:
            note: told how many bytes came.

        Raises:
            UserError: other bytes came than were signed; nothing of them is left.
        """
        if not fetch(self._place, self._path(name, entry), entry, to, note):
            raise UserError(f"{one_line(name)} is not as it was signed: copy the bundle there again")


def bundle_folder(folder: Path) -> Source:
    """An unpacked bundle, such as a stick's."""
    return Source(folder, Folder(folder), CONTENTS, lambda name, entry: name, resumes=False)


def store(where: str, ring: str) -> Source:
    """The version that a ring takes of the store at a URL or in a folder.

    Raises:
        UserError: no store is there, or it has nothing for the ring.
    """
    place: Place = Web(where) if is_url(where) else Folder(Path(where))
    try:
        rings = parse_json(place.read(RINGS, _SMALL), Path(RINGS), f"publish a bundle to {where}")
    except FileNotFoundError as error:
        raise UserError(f"{where} has no {RINGS}: publish a bundle there with qwen-export publish") from error
    version = rings.get(ring, rings.get(RING))
    if not isinstance(version, str) or not VERSION.fullmatch(version):
        raise UserError(f"{where} has no version for the ring '{ring}': publish one with --ring {ring}")
    folder = f"versions/{version}"
    return Source(Path(folder), place, f"{folder}/{CONTENTS}", object_path, resumes=True, version=version)


def object_path(name: str, entry: FileEntry) -> str:
    """Where a store has a file, whatever it is called."""
    return f"objects/{entry['sha256'][:2]}/{entry['sha256']}"
