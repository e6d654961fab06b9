"""A repository in a registry that speaks the OCI distribution API, version 1."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlencode, urljoin, urlsplit

from qwen_common.errors import UserError, one_line
from qwen_common.manifest import FileEntry

from qwen_runtime.fetch import BLOCK, fetch
from qwen_runtime.registry.authorization import Authorization, login
from qwen_runtime.registry.credentials import find
from qwen_runtime.registry.image import INDEX_TYPES, MOST_BYTES, TYPE
from qwen_runtime.registry.reference import Reference
from qwen_runtime.web import Refused, Web

PAUSES = (1.0, 5.0, 15.0)  # seconds before each further try
_STORES = 600.0  # seconds that a registry may take to put a blob away
_CODES = 80  # characters of a registry's own word for an error


class Registry:
    """Args:
    note: told a line where the registry does not answer and is asked again.
    push: whether it will be written to.
    plain_http: without TLS, also to other machines.
    """

    def __init__(
        self,
        reference: Reference,
        note: Callable[[str], None],
        push: bool = False,
        plain_http: bool = False,
    ) -> None:
        self.reference = reference
        url = reference.url(plain_http)
        scope = f"repository:{reference.name}:{'pull,push' if push else 'pull'}"
        authorization = Authorization(url, scope, lambda: find(reference.repository))
        accept = {"Accept": ", ".join((TYPE, *INDEX_TYPES))}
        self._web = Web(url, PAUSES, [authorization], accept, reference.is_here, note)

    def manifest(self) -> tuple[bytes, str]:
        """The manifest that the reference names, and its digest.

        Raises:
            UserError: there is none, other bytes came than its digest says, or no answer.
        """
        wanted = self.reference
        with self._asked():
            try:
                data = self._web.read(f"manifests/{wanted.version}", MOST_BYTES)
            except FileNotFoundError as error:
                raise UserError(f"{wanted} is not there: look at the name and the tag") from error
        digest = digest_of(data)
        if wanted.digest not in (None, digest):
            raise UserError(f"{wanted.repository} sent something else, {digest}: see to the registry")
        return data, digest

    def fetch(self, entry: FileEntry, to: Path, note: Callable[[int], None]) -> None:
        """Write a blob to `to`, after what is there of it already.

        Args:
            note: told how many bytes came.

        Raises:
            UserError: it is not there, or other bytes came twice.
        """
        blob = f"sha256:{entry['sha256']}"
        with self._asked():
            try:
                whole = fetch(self._web, f"blobs/{blob}", entry, to, note)
            except FileNotFoundError as error:
                raise UserError(f"{self.reference.repository} has lost {blob}: push it again") from error
        if not whole:
            raise UserError(
                f"{self.reference.repository} sent something else for {blob}: see to the registry"
            )

    def has(self, entry: FileEntry) -> bool:
        with self._asked():
            try:
                self._web.ask(self._web.address(f"blobs/sha256:{entry['sha256']}"), "HEAD").close()
            except Refused as error:
                if error.status == HTTPStatus.NOT_FOUND:
                    return False
                raise
        return True

    def upload(self, content: BinaryIO, entry: FileEntry, note: Callable[[int], None]) -> None:
        """Send a blob, in one request, from the file's beginning; a block of it in memory at a time.

        Args:
            note: told how many bytes of it are sent.

        Raises:
            UserError: the registry refuses it, or does not answer after several tries.
        """
        tries = iter(self._web.pauses)
        while True:
            begun = self._web.address("blobs/uploads/")
            with self._asked():
                with self._web.ask(begun, "POST", body=b"") as answer:
                    location = answer.headers.get("Location", "")
                to = _with_digest(begun, location, entry)
                headers = {"Content-Type": "application/octet-stream", "Content-Length": str(entry["size"])}
                try:
                    self._web.ask(to, "PUT", headers, _Sent(content, note), _STORES, ()).close()
                    return
                except UserError as error:
                    refused = isinstance(error, Refused) and error.status != HTTPStatus.NOT_FOUND
                    if refused or (pause := next(tries, None)) is None:
                        raise
            time.sleep(pause)

    def put(self, manifest: bytes) -> None:
        """Give the reference's tag to a manifest whose blobs are there.

        Raises:
            UserError: the registry refuses it, or does not answer.
        """
        with self._asked():
            url = self._web.address(f"manifests/{self.reference.tag}")
            with self._web.ask(url, "PUT", {"Content-Type": TYPE}, manifest) as answer:
                stored = answer.headers.get("Docker-Content-Digest")
        if stored not in (None, digest_of(manifest)):
            raise UserError(f"{self.reference.repository} stored something else: see to the registry")

    @contextmanager
    def _asked(self) -> Iterator[None]:
        try:
            yield
        except Refused as error:
            name, word = self.reference.repository, _word(error)
            if error.status == HTTPStatus.UNAUTHORIZED:
                raise UserError(f"{name} wants a login{word}: {login(self._web.url)}") from error
            if error.status == HTTPStatus.FORBIDDEN:
                raise UserError(f"{name} does not allow this login that{word}: ask its owner") from error
            raise UserError(
                f"{name} answers {error.status}{word}: see to the name and the registry"
            ) from error


class _Sent:
    """A file that says how far it has been read, in large blocks whatever is asked for."""

    def __init__(self, file: BinaryIO, note: Callable[[int], None]) -> None:
        self._file, self._note = file, note

    def read(self, size: int = -1, /) -> bytes:
        block = self._file.read(BLOCK)
        self._note(self._file.tell())
        return block

    def seek(self, offset: int, /) -> int:
        return self._file.seek(offset)


def _with_digest(begun: str, location: str, entry: FileEntry) -> str:
    """Where the registry wants the blob whose upload has begun.

    Raises:
        UserError: what it says is no address.
    """
    try:
        where = urlsplit(urljoin(begun, location))
    except ValueError as error:
        raise UserError(f"{begun} says no address to send to ({error}): see to the registry") from error
    query = urlencode({"digest": f"sha256:{entry['sha256']}"})
    return where._replace(query=f"{where.query}&{query}" if where.query else query).geturl()


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _word(error: Refused) -> str:
    """The registry's own code for it, such as ` (NAME_UNKNOWN)`."""
    try:
        codes = [str(one["code"]) for one in json.loads(error.said)["errors"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    return f" ({one_line(', '.join(codes)[:_CODES])})" if codes else ""
