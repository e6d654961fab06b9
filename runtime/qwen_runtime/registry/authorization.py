"""What a registry wants to see before it answers: a token of its token server, or a password.

The registry says so with a 401 (RFC 9110, section 11.6.1; Docker's token authentication, also with OAuth2).
It is asked again once for each request, so that a token that has run out is replaced. What is shown to a
registry is shown to no other host that it sends on to.
"""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.client import HTTPMessage
from typing import IO, Any
from urllib.parse import urlencode, urlsplit

from qwen_common.errors import UserError

from qwen_runtime.loopback import is_loopback
from qwen_runtime.registry.credentials import Credentials
from qwen_runtime.web import check_next, is_url, shown

_MOST = 1024 * 1024  # bytes of a token server's answer
_TOKEN = re.compile(r"[\x21-\x7e]+")
_CLIENT = "qwen-edge"


class Authorization(urllib.request.BaseHandler):
    """Args:
    url: of the registry.
    scope: what is wanted, where the registry does not say it.
    find: the credentials, looked for when they are asked for.
    """

    def __init__(self, url: str, scope: str, find: Callable[[], Credentials | None]) -> None:
        self._url, self._scope, self._find = url, scope, find
        self._header: str | None = None
        self._answering = False

    def http_request(self, request: urllib.request.Request) -> urllib.request.Request:
        ours = _origin(request.full_url) == _origin(self._url)
        if ours and self._header is not None and not request.has_header("Authorization"):
            request.add_unredirected_header("Authorization", self._header)
        return request

    https_request = http_request

    def http_error_401(
        self,
        request: urllib.request.Request,
        answer: IO[bytes],
        code: int,
        message: str,
        headers: HTTPMessage,
    ) -> Any:
        if self._answering or _origin(request.full_url) != _origin(self._url):
            return None  # it is the error that it looks like
        self._answering, self._header = True, None
        try:
            self._header = self._proof(headers.get_all("WWW-Authenticate") or [])
            if self._header is None:
                return None
            answer.close()
            request.remove_header("Authorization")
            if request.data is not None and not isinstance(request.data, bytes):
                request.data.seek(0)  # type: ignore[union-attr]
            return self.parent.open(request, timeout=request.timeout)
        finally:
            self._answering = False

    def _proof(self, challenges: Sequence[str]) -> str | None:
        """The header that answers one of them; None: nothing that is known here would."""
        asked = {}
        for challenge in challenges:
            scheme, _, rest = challenge.strip().partition(" ")
            parts = (part.partition("=") for part in urllib.request.parse_http_list(rest))
            asked[scheme.lower()] = {name.lower(): value.strip('"') for name, _, value in parts}
        credentials = self._find()
        if "bearer" in asked:
            token = credentials.bearer if credentials else ""
            return f"Bearer {_checked(token or self._token(asked['bearer'], credentials), self._url)}"
        if "basic" in asked and credentials is not None and credentials.basic:
            return f"Basic {credentials.basic}"
        return None

    def _token(self, asked: dict[str, str], credentials: Credentials | None) -> Any:
        """A new one of the token server that the registry names."""
        realm = asked.get("realm", "")
        if not is_url(realm):
            raise UserError(
                f"{urlsplit(self._url).netloc} names no server for its tokens: see to the registry"
            )
        check_next(self._url, realm)
        to, ours = urlsplit(realm), urlsplit(self._url)
        if to.scheme == "http" and is_loopback(ours.netloc) and not is_loopback(to.netloc):
            raise UserError(f"{shown(realm)} is no place for a password: it has no TLS, see to the registry")
        wanted = {"client_id": _CLIENT, "scope": asked.get("scope") or self._scope}
        if service := asked.get("service"):
            wanted["service"] = service
        if credentials is not None and credentials.identity:
            form = {"grant_type": "refresh_token", "refresh_token": credentials.identity, **wanted}
            request = urllib.request.Request(realm, urlencode(form).encode())
        else:
            request = urllib.request.Request(f"{realm}{'&' if '?' in realm else '?'}{urlencode(wanted)}")
            if credentials is not None and credentials.basic:
                request.add_unredirected_header("Authorization", f"Basic {credentials.basic}")
        try:
            with self.parent.open(request, timeout=60) as answer:
                found = json.loads(answer.read(_MOST))
        except urllib.error.HTTPError as error:
            if error.code in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
                who = f"the login of {credentials.source}" if credentials else "anybody without a login"
                raise UserError(f"{shown(realm)} refuses {who}: {login(self._url)}") from error
            if error.code < 500 and error.code != HTTPStatus.TOO_MANY_REQUESTS:
                raise UserError(
                    f"{shown(realm)} gives no token but {error.code} {error.reason}: see to the registry"
                ) from error
            raise urllib.error.URLError(f"{shown(realm)} answers {error.code}") from error
        except urllib.error.URLError as error:
            raise urllib.error.URLError(f"{shown(realm)}: {error.reason}") from error
        except (ValueError, RecursionError):
            found = None
        return (found.get("token") or found.get("access_token")) if isinstance(found, dict) else None


def login(url: str) -> str:
    """What to do about it."""
    host = urlsplit(url).netloc
    return f"run docker login {host}, or name a file with credentials in REGISTRY_AUTH_FILE"


def _checked(token: Any, url: str) -> str:
    """Before it is put into a header, where anything else would be shown in an error."""
    if not isinstance(token, str) or not _TOKEN.fullmatch(token):
        raise UserError(f"the token for {urlsplit(url).netloc} is none: {login(url)}")
    return token


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc.lower()
