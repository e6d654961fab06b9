"""A signed bundle: one list of every file, one signature over the list.

    bundle.json      what it is, and the size and SHA-256 of every other file
    bundle.json.sig  Ed25519 signature of bundle.json's bytes, base64 (RFC 8032)
    artifact/        the exported model
    site/            every Python package that it runs on, unpacked
    launcher.pyz     this package, which checks and starts the rest
    python/          on Windows, where a bundle carries its own: CPython
    README.txt, ...  scripts and notices

Nothing in the folder is trusted before both are checked. An installed version has the same files.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, cast

from qwen_common.errors import UserError, one_line
from qwen_common.files import parse_json, sha256
from qwen_common.manifest import FileEntry
from qwen_common.shape import first_fault
from qwen_common.system import misfit

from qwen_launcher import ed25519

FORMAT_VERSION = 2
CONTENTS = "bundle.json"
SIGNATURE = "bundle.json.sig"
ARTIFACT = "artifact"
SITE = "site"
LAUNCHER = "launcher.pyz"
PYTHON = "python"  # of Windows bundles that carry one
PYTHON_PROGRAM = f"{PYTHON}/python.exe"
# Python's own copies of what it compiled. Whatever is in them is not read: see `qwen_launcher.program`.
COMPILED = "__pycache__"
MOST_BYTES = 16 * 1024 * 1024  # of bundle.json, of which nothing is known before it was read
_MOST_SIGNATURE_BYTES = 1024
_MOST_KEY_BYTES = 64 * 1024
# The letters of PEP 440; `qwen_runtime.kiosk.versions` knows the rest.
VERSION = re.compile(r"[0-9A-Za-z][0-9A-Za-z.!+_-]{0,63}")
_ADVICE = "make the bundle again"

Seen = Mapping[str, list[int]]  # by file: what the system said of it when its bytes were last compared


class SelfTest(TypedDict):
    """A prompt, and the ids that must follow it."""

    prompt: str
    tokens: list[int]


class _Later(TypedDict, total=False):
    """`needs`: the oldest system that it runs on, see `qwen_common.system`."""

    needs: dict[str, str]


class Contents(_Later):
    """bundle.json. `python` is a version of CPython, such as 3.12; `version` the bundle's own."""

    format_version: int
    name: str
    version: str
    platform: str
    python: str
    provider: str
    self_test: SelfTest
    files: dict[str, FileEntry]


@dataclass(frozen=True)
class Bundle:
    """A bundle whose signature holds; `check` compares its files with the signed list.

    Attributes:
        root: its folder.
        contents: bundle.json.
        signed: the bytes of bundle.json, and of its signature.
    """

    root: Path
    contents: Contents
    signed: tuple[bytes, bytes]

    @classmethod
    def open(cls, root: Path, public_key: Path) -> Bundle:
        """Read the list of files and check its signature.

        Args:
            public_key: PEM file of the Ed25519 key that `qwen-export keygen` made.

        Raises:
            UserError: not a bundle, another key signed it, or the list changed since.
        """
        for name in (CONTENTS, SIGNATURE):
            if not (root / name).is_file() or (root / name).is_symlink():
                raise UserError(f"{root} has no {name}: it is not a bundle, or was copied in part")
        data = read_bounded(root / CONTENTS, MOST_BYTES)
        return cls.read(data, read_bounded(root / SIGNATURE, _MOST_SIGNATURE_BYTES), public_key, root)

    @classmethod
    def read(cls, data: bytes, signature: bytes, public_key: Path, root: Path) -> Bundle:
        """As `open`, of bytes that were read elsewhere."""
        check_signature(data, signature, public_key, root / CONTENTS)
        contents = parse_json(data, root / CONTENTS, _ADVICE)
        if contents.get("format_version") != FORMAT_VERSION:
            raise UserError(
                f"{root} has bundle format {contents.get('format_version')}, this qwen-edge reads "
                f"{FORMAT_VERSION}: make the bundle with the same qwen-edge"
            )
        if (fault := first_fault(contents, Contents)) is not None:
            raise UserError(f"{root / CONTENTS} has no valid '{fault}': {_ADVICE}")
        version = contents["version"]
        if not VERSION.fullmatch(version):  # a folder is named by it
            shown = one_line(version[:64])
            raise UserError(f"'{shown}' is not a version: write numbers with dots between them")
        for name in contents["files"]:
            if not _stays_inside(name):
                raise UserError(
                    f"{root / CONTENTS} names a file outside the folder, {one_line(name)}: {_ADVICE}"
                )
        return cls(root, cast(Contents, contents), (data, signature))

    def check_fit(self) -> None:
        """Raises:
        UserError: this machine, or the Python that runs, is not what the bundle was made for.
        """
        made = self.contents
        python = None if PYTHON_PROGRAM in made["files"] else made["python"]
        if fault := misfit(made["platform"], python, made.get("needs", {})):
            raise UserError(fault)

    def check(
        self, seen: Seen | None = None, within: str = "", note: Callable[[int], None] | None = None
    ) -> dict[str, list[int]]:
        """Compare every file's size and SHA-256 with the signed list.

        Args:
            seen: files of which the system still says this are not read again; what this returned before.
            within: compare no others than those whose path begins so; all must be there in any case.
            note: told how many bytes were compared since the last time.

        Raises:
            UserError: a file is missing, not in the list, or has other bytes; names the first one.
        """
        expected = self.contents["files"]
        found = set(files_in(self.root)) - {CONTENTS, SIGNATURE}
        if missing := sorted(expected.keys() - found):
            raise UserError(f"{missing[0]} is missing from {self.root}: copy the bundle again")
        if extra := sorted(found - expected.keys()):
            raise UserError(f"{extra[0]} does not belong in {self.root}: remove it, or copy the bundle again")
        now = {}
        for name, entry in sorted(expected.items(), key=lambda item: item[1]["size"]):
            if not name.startswith(within):
                continue
            path = self.root / name
            now[name] = look_of(path)
            known = seen is not None and seen.get(name) == now[name]
            if now[name][0] != entry["size"] or not (known or sha256(path) == entry["sha256"]):
                raise UserError(f"{name} in {self.root} changed since it was signed: copy the bundle again")
            if note is not None:
                note(entry["size"])
        return now


def python_digest(files: Mapping[str, FileEntry]) -> str:
    """SHA-256 of the Python that a bundle carries: of a line "SHA-256  name" for each of its files.

    Windows' scripts compute it too, before they run that Python: nothing else could check it then.
    """
    inside = {
        name.removeprefix(f"{PYTHON}/"): entry["sha256"]
        for name, entry in files.items()
        if name.startswith(f"{PYTHON}/")
    }
    lines = "".join(f"{inside[name]}  {name}\n" for name in sorted(inside))
    return hashlib.sha256(lines.encode()).hexdigest()


def look_of(path: Path) -> list[int]:
    """What the system says of a file: something else once it was written, whoever sets its time back."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def check_signature(data: bytes, signature: bytes, public_key: Path, what: Path) -> None:
    """Check an Ed25519 signature in base64.

    Raises:
        UserError: the key cannot be read, or did not sign exactly these bytes.
    """
    key = public_key_of(public_key)
    try:
        decoded = base64.b64decode(signature.strip(), validate=True)
    except (ValueError, binascii.Error):
        decoded = b""
    if not ed25519.verify(key, data, decoded):
        raise UserError(
            f"the signature of {what} does not fit {public_key.name}: "
            "the bundle changed, or another key signed it"
        )


def public_key_of(path: Path) -> bytes:
    """The key in a PEM file.

    Raises:
        UserError: it cannot be read, or is no public Ed25519 key.
    """
    try:
        key = ed25519.read_public_key(read_bounded(path, _MOST_KEY_BYTES))
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror}): give the public key that qwen-export keygen made"
        ) from error
    if key is None:
        raise UserError(f"{path} is not a public key of Ed25519: give the one that qwen-export keygen made")
    return key


def files_in(root: Path) -> Iterator[str]:
    """Paths of all files under `root`, relative, with forward slashes, but for Python's compiled copies.

    Raises:
        UserError: something there is neither a file nor a folder, such as a link out of it.
    """
    folders = [""]  # and no recursion: they may be nested more deeply than Python's stack
    while folders:
        folder = folders.pop()
        with os.scandir(root / folder) as entries:
            for entry in entries:
                path = f"{folder}{entry.name}"
                if entry.is_dir(follow_symlinks=False):
                    if entry.name != COMPILED:
                        folders.append(f"{path}/")
                elif entry.is_file(follow_symlinks=False):
                    yield path
                else:
                    raise UserError(
                        f"{root / path} is a link or a device: remove it, or copy the bundle again"
                    )


def _stays_inside(name: str) -> bool:
    parts = name.split("/")
    return not any(part in ("", ".", "..") for part in parts) and not any(sign in name for sign in "\\:\0")


def at_once(path: str, flags: int) -> int:
    """An opener for `open` that waits for nobody to write to a pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def read_bounded(path: Path, most: int) -> bytes:
    """A file's bytes. What lies there may be anything: a pipe that nobody writes to, a device without an end.

    Raises:
        UserError: it is no file, or larger than `most`.
    """
    with open(path, "rb", opener=at_once) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise UserError(f"{path} is not a file: {_ADVICE}")
        data = file.read(most + 1)
    if len(data) > most:
        raise UserError(f"{path} is larger than {most} bytes: {_ADVICE}")
    return data
