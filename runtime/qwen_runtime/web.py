"""Requests to a web server, tried again; files gone on with where they broke off. Standard library alone."""

from __future__ import annotations

import http.client
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from http.client import HTTPMessage
from typing import IO, Protocol
from urllib.parse import quote, urlsplit

from qwen_common.errors import UserError

_SCHEMES = ("http", "https")
_TIMEOUT = 60.0  # seconds without a byte
_SLOWEST, _WINDOW = 1000, 300.0  # bytes in a second, on average over so many seconds
_PAUSES = (1.0, 5.0, 15.0)  # seconds before each further try
_LONGEST_PAUSE = 60.0  # that a server may ask for
_BLOCK = 1024 * 1024
_PASSING = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS)
_NO_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST")  # OpenSSL's words, by its version
_LOGIN = re.compile(r"//[^/@]*@")
_SAID = 64 * 1024  # bytes of a refusal that are read


def is_url(text: str) -> bool:
    return "://" in text and text.partition("://")[0].lower() in _SCHEMES


class Refused(UserError):
    """A server's answer that stays the same, however often it is asked.

    Attributes:
        status: its code.
        said: what came with it, shortened.
    """

    def __init__(self, message: str, status: int, said: bytes) -> None:
        super().__init__(message)
        self.status = status
        self.said = said


class Body(Protocol):
    """Bytes to send, which may have to be sent again."""

    def read(self, size: int = -1, /) -> bytes: ...

    def seek(self, offset: int, /) -> int: ...


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
        check_next(req.full_url, newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def check_next(url: str, following: str) -> None:
    """Raises:
    UserError: a server must not send on from one URL to the other: no web server's, or no longer https.
    """
    scheme = urlsplit(following).scheme
    if scheme not in _SCHEMES or (urlsplit(url).scheme == "https" and scheme != "https"):
        raise UserError(f"{shown(url)} sends on to {shown(following)}: only https may follow https")


def shown(url: str) -> str:
    """For a message: without a login, and without its query, where servers put what admits whoever has it."""
    return _LOGIN.sub("//", url.partition("?")[0])


class Web:
    """The files below a URL.

    Args:
        pauses: seconds to wait before each further try.
        handlers: what else looks at requests and answers.
        headers: of every request.
        direct: whether no proxy is asked, whatever the environment says.
        note: told a line before each further try.
    """

    def __init__(
        self,
        url: str,
        pauses: tuple[float, ...] = _PAUSES,
        handlers: Sequence[urllib.request.BaseHandler] = (),
        headers: Mapping[str, str] = {},
        direct: bool = False,
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._note = note
        self.url = url.rstrip("/")
        self.pauses = pauses
        self._headers = {"Accept-Encoding": "identity", **headers}
        # No handler for file: and ftp: URLs, whoever asks for one.
        self._opener = urllib.request.OpenerDirector()
        for handler in (
            urllib.request.ProxyHandler({} if direct else None),
            urllib.request.HTTPHandler(),
            urllib.request.HTTPSHandler(),
            urllib.request.HTTPDefaultErrorHandler(),
            urllib.request.HTTPErrorProcessor(),
            _SameSchemes(),
            *handlers,
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
                        f"{shown(self.url)}/{path} has more than {most} bytes: it is not what it should be"
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

    def ask(
        self,
        url: str,
        method: str = "GET",
        headers: Mapping[str, str] = {},
        body: bytes | Body | None = None,
        timeout: float = _TIMEOUT,
        pauses: tuple[float, ...] | None = None,
    ) -> http.client.HTTPResponse:
        """The answer of a server to one request, whose headers have come.

        Args:
            url: whole, as in what another answer told.
            body: what is sent; where it is no bytes, the headers say its Content-Length.
            timeout: seconds without a byte.
            pauses: other ones than those of all requests.

        Raises:
            Refused: its answer is an error, and would be one again.
            UserError: it does not answer.
        """
        tries = iter(self.pauses if pauses is None else pauses)
        while True:
            if body is not None and not isinstance(body, bytes):
                body.seek(0)
            try:
                check_next(self.url, url)
                request = urllib.request.Request(
                    url,
                    data=body,
                    headers={**self._headers, **headers},
                    method=method,
                )
                answer: http.client.HTTPResponse = self._opener.open(request, timeout=timeout)
                return answer
            except urllib.error.HTTPError as error:
                if error.code < 500 and error.code not in _PASSING:
                    raise Refused(
                        f"{shown(url)} answers {error.code} {error.reason}: see to the web server",
                        error.code,
                        _said(error),
                    ) from error
                self._wait(tries, url, error)
            except (OSError, http.client.HTTPException) as error:
                self._wait(tries, url, error)
            except ValueError as error:  # an address that is none, ours or the one that we were sent on to
                raise UserError(f"{shown(url)} cannot be asked for ({error}): see to its address") from error

    def address(self, path: str) -> str:
        return f"{self.url}/{quote(path, safe='/:')}"

    def _blocks(self, path: str, answer: http.client.HTTPResponse, at: int) -> Iterator[bytes]:
        """The blocks from there on, over as many connections as it takes."""
        tries = iter(self.pauses)
        known = 0  # bytes that come again, from a server without ranges
        began, came = time.monotonic(), 0
        while True:
            try:
                while block := answer.read1(_BLOCK):
                    came += len(block)
                    if (spent := time.monotonic() - began) > _WINDOW:
                        if came < _SLOWEST * spent:  # a byte a minute would hold the update for ever
                            raise UserError(f"{shown(self.url)}/{path} comes too slowly: try again later")
                        began, came = time.monotonic(), 0
                    known, block = max(0, known - len(block)), block[known:]
                    at += len(block)
                    tries = iter(self.pauses) if block else tries
                    yield block
                if not answer.length:  # what its headers said would still come
                    return
                raise http.client.IncompleteRead(b"")
            except (OSError, http.client.HTTPException) as error:
                self._wait(tries, self.address(path), error)
            answer.close()
            answer = self._answer(path, at)
            known = 0 if answer.status == HTTPStatus.PARTIAL_CONTENT else at

    def _answer(self, path: str, offset: int) -> http.client.HTTPResponse:
        url = self.address(path)
        try:
            return self.ask(url, headers={"Range": f"bytes={offset}-"} if offset else {})
        except Refused as error:
            if error.status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and offset:
                return self._answer(path, 0)  # what is here is no beginning of it
            if error.status == HTTPStatus.NOT_FOUND:
                raise FileNotFoundError(url) from error
            raise

    def _wait(self, tries: Iterator[float], url: str, error: Exception) -> None:
        reason = getattr(error, "reason", None) or error
        if isinstance(reason, ssl.SSLCertVerificationError):  # which no further try would change
            raise UserError(
                f"{shown(url)} has a certificate that is not trusted ({reason.verify_message}): name the "
                "file of its authority in SSL_CERT_FILE"
            ) from error
        if isinstance(reason, ssl.SSLError) and reason.reason in _NO_TLS:
            raise UserError(f"{shown(url)} does not speak TLS: plain HTTP has to be asked for") from error
        pause = next(tries, None)
        if pause is None:
            raise UserError(
                f"{shown(url)} cannot be read ({reason}): try again later, and it goes on from there"
            ) from error
        if (
            isinstance(error, urllib.error.HTTPError)
            and (asked := error.headers.get("Retry-After", "")).isdecimal()
        ):
            pause = max(pause, min(float(asked), _LONGEST_PAUSE))
        self._note(f"{urlsplit(shown(url)).netloc} does not answer ({reason}): asked again in {pause:.0f} s")
        time.sleep(pause)


def _said(error: urllib.error.HTTPError) -> bytes:
    try:
        return error.read(_SAID)
    except (OSError, http.client.HTTPException):
        return b""
