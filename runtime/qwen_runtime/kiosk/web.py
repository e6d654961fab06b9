"""Files of a web server: tried again, and gone on with where they broke off. The standard library alone."""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.client import HTTPMessage
from typing import IO
from urllib.parse import quote, urlsplit

from qwen_common.errors import UserError

_SCHEMES = ("http", "https")
_TIMEOUT = 60.0  # seconds without a byte
_SLOWEST, _WINDOW = 1000, 300.0  # bytes in a second, on average over so many seconds
_PAUSES = (1.0, 5.0, 15.0)  # seconds before each further try
_BLOCK = 1024 * 1024
_PASSING = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS)


def is_url(text: str) -> bool:
    return "://" in text and text.partition("://")[0].lower() in _SCHEMES


class _SameSchemes(urllib.request.HTTPRedirectHandler):
    """A redirection leads to a web server again, and from https to https only."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        scheme = urlsplit(newurl).scheme
        if scheme not in _SCHEMES or (req.type == "https" and scheme != "https"):
            raise UserError(f"{req.full_url} sends on to {newurl}: only https may follow https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class Web:
    """The files below a URL.

    Args:
        pauses: seconds to wait before each further try.
    """

    def __init__(self, url: str, pauses: tuple[float, ...] = _PAUSES) -> None:
        self._url = url.rstrip("/")
        self._pauses = pauses
        # No handler for file: and ftp: URLs, whoever asks for one.
        self._opener = urllib.request.OpenerDirector()
        for handler in (
            urllib.request.ProxyHandler(),
            urllib.request.HTTPHandler(),
            urllib.request.HTTPSHandler(),
            urllib.request.HTTPDefaultErrorHandler(),
            urllib.request.HTTPErrorProcessor(),
            _SameSchemes(),
        ):
            self._opener.add_handler(handler)

    def read(self, path: str, most: int) -> bytes:
        """A file of at most `most` bytes.

        Raises:
            FileNotFoundError: the server has none.
            UserError: it does not answer as it should, or the file is larger.
        """
        with self.open(path, 0) as (_, blocks):
            data = b""
            for block in blocks:
                data += block
                if len(data) > most:
                    raise UserError(
                        f"{self._url}/{path} has more than {most} bytes: it is not what it should be"
                    )
        return data

    @contextmanager
    def open(self, path: str, offset: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        """A file's blocks, and the offset at which they begin: `offset`, or 0 where there are no ranges.

        Raises:
            FileNotFoundError: the server has none.
            UserError: it does not answer as it should.
        """
        with self._answer(path, offset) as answer:
            begins = offset if answer.status == HTTPStatus.PARTIAL_CONTENT else 0
            yield begins, self._blocks(path, answer, begins)

    def _blocks(self, path: str, answer: http.client.HTTPResponse, at: int) -> Iterator[bytes]:
        """The blocks from there on, over as many connections as it takes."""
        tries = iter(self._pauses)
        known = 0  # bytes that come again, from a server without ranges
        began, came = time.monotonic(), 0
        while True:
            try:
                while block := answer.read1(_BLOCK):
                    came += len(block)
                    if (spent := time.monotonic() - began) > _WINDOW:
                        if came < _SLOWEST * spent:  # a byte a minute would hold the update for ever
                            raise UserError(f"{self._url}/{path} comes too slowly: try again later")
                        began, came = time.monotonic(), 0
                    known, block = max(0, known - len(block)), block[known:]
                    at += len(block)
                    tries = iter(self._pauses) if block else tries
                    yield block
                if not answer.length:  # what its headers said would still come
                    return
                raise http.client.IncompleteRead(b"")
            except (OSError, http.client.HTTPException) as error:
                self._wait(tries, path, error)
            answer.close()
            answer = self._answer(path, at)
            known = 0 if answer.status == HTTPStatus.PARTIAL_CONTENT else at

    def _answer(self, path: str, offset: int) -> http.client.HTTPResponse:
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={offset}-"} if offset else {})
        tries = iter(self._pauses)
        while True:
            try:
                request = urllib.request.Request(f"{self._url}/{quote(path)}", headers=headers)
                answer: http.client.HTTPResponse = self._opener.open(request, timeout=_TIMEOUT)
                return answer
            except urllib.error.HTTPError as error:
                if error.code == HTTPStatus.NOT_FOUND:
                    raise FileNotFoundError(f"{self._url}/{path}") from error
                if error.code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and offset:
                    del headers["Range"]  # what is here is no beginning of it
                    offset = 0
                    continue
                if error.code < 500 and error.code not in _PASSING:
                    raise UserError(
                        f"{self._url}/{path} answers {error.code} {error.reason}: see to the web server"
                    ) from error
                self._wait(tries, path, error)
            except (OSError, http.client.HTTPException) as error:
                self._wait(tries, path, error)
            except ValueError as error:  # an address that is none, ours or the one that we were sent on to
                raise UserError(
                    f"{self._url}/{path} cannot be asked for ({error}): see to its address"
                ) from error

    def _wait(self, tries: Iterator[float], path: str, error: Exception) -> None:
        pause = next(tries, None)
        if pause is None:
            reason = getattr(error, "reason", None) or error
            raise UserError(
                f"{self._url}/{path} cannot be read ({reason}): try again later, and it goes on from there"
            ) from error
        time.sleep(pause)
