"""Which names the server answers to, and which other sites' pages may use it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from qwen_common.errors import UserError, one_line
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from qwen_runtime.serve.errors import ApiError

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
_NAME = re.compile(r"(\*\.)?[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\]")
_HOST = re.compile(r"(?P<name>\[[^\[\]]*\]|[^:\[\]/@\s]{1,253})(:[0-9]{0,5})?")
_EVERY = "*"


@dataclass(frozen=True)
class Access:
    """Attributes:
    hosts: names that requests may be addressed to; `*.NAME` is every name below one. None allows all. Without
        the check a web site could point its own name at this machine and read the answers.
    origins: of pages that may read the answers, as browsers write them; "*" is every one.
    """

    hosts: Sequence[str] | None = None
    origins: Sequence[str] = ()

    def middleware(self) -> list[Middleware]:
        found = []
        if self.origins:
            # Headers come back also with an error, so that a page can tell its user.
            cors = Middleware(
                CORSMiddleware,
                allow_origins=self.origins,
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                allow_private_network=True,
                expose_headers=["Retry-After"],
            )
            found.append(cors)
        return found if self.hosts is None else [*found, Middleware(_Hosts, hosts=self.hosts)]


class _Hosts:
    """As Starlette's TrustedHostMiddleware, with an error as clients expect them."""

    def __init__(self, app: ASGIApp, hosts: Sequence[str]) -> None:
        self._app = app
        self._hosts = [host.lower() for host in hosts]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        found = _HOST.fullmatch(Headers(scope=scope).get("host", "")) if scope["type"] == "http" else None
        if scope["type"] != "http" or (found and self._answers_to(found["name"].lower())):
            await self._app(scope, receive, send)
            return
        known = found and _NAME.fullmatch(found["name"])
        message = "the request has no Host header, or one that is none: send the server's name"
        if found and known:
            message = (
                f"this server does not answer to the name {found['name']}: ask it by its address, or start "
                f"it with --allowed-host {found['name']}"
            )
        error = ApiError(400, message, code="host_not_allowed")
        await error.response(scope["path"])(scope, receive, send)

    def _answers_to(self, name: str) -> bool:
        return any(
            name == host or (host.startswith("*.") and name.endswith(host[1:])) for host in self._hosts
        )


def access(
    host: str, *, local: bool, allowed_hosts: Sequence[str], origins: Sequence[str], api_key: str | None
) -> Access:
    """Who may use a server that listens on `host`.

    Args:
        local: it is reached from this machine only.
        allowed_hosts: further names, such as that of a proxy with TLS.

    Raises:
        UserError: a name or an origin is none, or every page may use a server without a key.
    """
    for name in allowed_hosts:
        if not _NAME.fullmatch(name):
            raise UserError(
                f"--allowed-host {one_line(name)} is no host name: give one such as chat.example.org, "
                "without https:// and without a port"
            )
    for origin in origins:
        if origin == _EVERY and not api_key:
            raise UserError("--cors-origin * lets every web page in: give an --api-key, or name the origins")
        if origin != _EVERY and not _is_origin(origin):
            raise UserError(
                f"--cors-origin {one_line(origin)} is no origin: give one such as https://chat.example.org, "
                "without a path"
            )
    hosts = [*LOOPBACK, host, *allowed_hosts] if local or allowed_hosts else None
    return Access(hosts, origins)


def _is_origin(text: str) -> bool:
    """As a browser writes it in the header `Origin`: scheme, host and a port that is not the usual one."""
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        return False
    host = parts.hostname or ""
    host = f"[{host}]" if ":" in host else host
    written = f"{parts.scheme}://{host}" + ("" if port is None else f":{port}")
    return bool(parts.scheme and _NAME.fullmatch(host)) and "*" not in host and written == text
