"""A signed bundle: one list of every file, one signature over the list.

    bundle.json      what it is, and the size and SHA-256 of every other file
    bundle.json.sig  Ed25519 signature of bundle.json's bytes, base64 (RFC 8032)

Nothing in the folder is trusted before both are checked.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypedDict, cast

from packaging.version import InvalidVersion, Version
from qwen_common.errors import UserError, one_line
from qwen_common.files import parse_json, sha256
from qwen_common.manifest import FileEntry
from qwen_common.shape import first_fault

FORMAT_VERSION = 1
CONTENTS = "bundle.json"
SIGNATURE = "bundle.json.sig"
ARTIFACT = "artifact"
WHEELS = "wheels"
REQUIREMENTS = "requirements.txt"
MOST_BYTES = 16 * 1024 * 1024  # of bundle.json, of which nothing is known before it was read
_MOST_SIGNATURE = 1024
_LONGEST_VERSION = 64
_ADVICE = "make the bundle again"


class SelfTest(TypedDict):
    """A prompt, and the ids that must follow it."""

    prompt: str
    tokens: list[int]


class Contents(TypedDict):
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
    """

    root: Path
    contents: Contents

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
        data = _read(root / CONTENTS, MOST_BYTES)
        check_signature(data, _read(root / SIGNATURE, _MOST_SIGNATURE), public_key, root / CONTENTS)
        contents = parse_json(data, root / CONTENTS, _ADVICE)
        if contents.get("format_version") != FORMAT_VERSION:
            raise UserError(
                f"{root} has bundle format {contents.get('format_version')}, this qwen-edge reads "
                f"{FORMAT_VERSION}: make the bundle with the same qwen-edge"
            )
        if (fault := first_fault(contents, Contents)) is not None:
            raise UserError(f"{root / CONTENTS} has no valid '{fault}': {_ADVICE}")
        version_key(contents["version"])  # a folder is named by it
        return cls(root, cast(Contents, contents))

    @property
    def version(self) -> Version:
        return version_key(self.contents["version"])

    def check(self) -> None:
        """Compare every file's size and SHA-256 with the signed list.

        Raises:
            UserError: a file is missing, not in the list, or has other bytes; names the first one.
        """
        expected = self.contents["files"]
        found = {path for path in files_in(self.root)} - {CONTENTS, SIGNATURE}
        if missing := sorted(expected.keys() - found):
            raise UserError(f"{missing[0]} is missing from {self.root}: copy the bundle again")
        if extra := sorted(found - expected.keys()):
            raise UserError(f"{extra[0]} does not belong in {self.root}: remove it, or copy the bundle again")
        for name, entry in sorted(expected.items(), key=lambda item: item[1]["size"]):
            path = self.root / name
            if path.stat().st_size != entry["size"] or sha256(path) != entry["sha256"]:
                raise UserError(f"{name} in {self.root} changed since it was signed: copy the bundle again")


def version_key(version: str) -> Version:
    """What orders versions (PEP 440).

    Raises:
        UserError: it is not a version, or has white space or a length that no release's folder is named with.
    """
    try:
        if version.strip() == version and len(version) <= _LONGEST_VERSION:
            return Version(version)
    except InvalidVersion:
        pass
    shown = one_line(version[:_LONGEST_VERSION])
    raise UserError(f"'{shown}' is not a version: write numbers with dots between them")


def _read(path: Path, most: int) -> bytes:
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise UserError(f"{path} is larger than {most} bytes: {_ADVICE}")
    return data


def check_signature(data: bytes, signature: bytes, public_key: Path, what: Path) -> None:
    """Check an Ed25519 signature in base64.

    Raises:
        UserError: the key cannot be read, or did not sign exactly these bytes.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(public_key.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{public_key} is not a public key: give the one that qwen-export keygen made"
        ) from error
    if not isinstance(key, Ed25519PublicKey):
        raise UserError(f"{public_key} is not an Ed25519 key: give the one that qwen-export keygen made")
    try:
        key.verify(base64.b64decode(signature, validate=True), data)
    except (InvalidSignature, ValueError) as error:
        raise UserError(
            f"the signature of {what} does not fit {public_key.name}: "
            "the bundle changed, or another key signed it"
        ) from error


def files_in(root: Path) -> Iterator[str]:
    """Paths of all files under `root`, relative, with forward slashes.

    Raises:
        UserError: something there is neither a file nor a folder, such as a link out of it.
    """
    for folder, folders, names in os.walk(root):
        for name in [*folders, *names]:
            path = Path(folder, name)
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise UserError(f"{path} is a link or a device: remove it, or copy the bundle again")
        for name in names:
            yield PurePosixPath(*Path(folder, name).relative_to(root).parts).as_posix()
