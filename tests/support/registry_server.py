"""A small registry that speaks the OCI distribution API, and does what registries and networks may do."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

TYPE = "application/vnd.oci.image.manifest.v1+json"


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


class RegistryServer(ThreadingHTTPServer):
    """One repository, and a second address that hands out blobs to whoever asks, as a cloud's storage does.

    Attributes:
        blobs: by digest.
        manifests: by tag and by digest.
        login: what has to be shown, `user:password`, for a token or (`basic`) by itself; None: nothing.
        pull_free: whether tokens to pull are for everybody.
        identity: a token for which the token server gives others.
        realm: another address of the token server than its own.
        location: another address for uploads than its own.
        lifetime: requests that a token is good for.
        redirects: whether blobs are had at the second address.
        fails: statuses that are still answered, whatever is asked.
        cuts: answers with a blob, and uploads, that still break off in the middle.
        ranges: whether it knows them.
        asked: method and path of each request.
        shown: the Authorization of each request to the second address.
        tokens: how many were given.
    """

    def __init__(self, name: str = "team/tiny") -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.name = name
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[str, bytes] = {}
        self.login: str | None = None
        self.basic = self.pull_free = self.redirects = False
        self.identity = ""
        self.lifetime = 1000
        self.realm = self.location = ""
        self.fails: list[int] = []
        self.retry_after = ""
        self.cuts = 0
        self.ranges = True
        self.asked: list[str] = []
        self.shown: list[str | None] = []
        self.bytes_in = self.bytes_out = self.tokens = 0
        self.good: dict[str, tuple[str, int]] = {}  # by token: what it is for, and how often still
        self.sessions: set[str] = set()
        self.storage = _Storage(self)

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server_port}"

    @property
    def repository(self) -> str:
        return f"oci://{self.host}/{self.name}"

    def put(self, tag: str, layers: list[tuple[Any, bytes]], **changes: Any) -> str:
        """Store a manifest whose layers have these titles and bytes; returns its digest."""
        described = []
        for title, data in layers:
            self.blobs[digest_of(data)] = data
            notes = {} if title is None else {"annotations": {"org.opencontainers.image.title": title}}
            described.append(
                {"mediaType": "application/octet-stream", "digest": digest_of(data), "size": len(data)}
                | notes
            )
        config = {"mediaType": "application/vnd.oci.empty.v1+json", "digest": digest_of(b"{}"), "size": 2}
        content = {"schemaVersion": 2, "mediaType": TYPE, "config": config, "layers": described} | changes
        return self.put_manifest(tag, json.dumps(content).encode())

    def put_manifest(self, tag: str, data: bytes) -> str:
        self.manifests[tag] = self.manifests[digest_of(data)] = data
        return digest_of(data)

    @contextmanager
    def serving(self) -> Iterator[RegistryServer]:
        servers = (self, self.storage)
        for server in servers:
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield self
        finally:
            for server in servers:
                server.shutdown()
                server.server_close()


@contextmanager
def registry_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RegistryServer]:
    """A registry and nobody's logins; `folder` is where Docker's may be put."""
    for name in ("REGISTRY_AUTH_FILE", "XDG_RUNTIME_DIR", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DOCKER_CONFIG", str(folder))
    monkeypatch.setattr("qwen_runtime.registry.registry.PAUSES", (0.01, 0.01))
    with RegistryServer().serving() as server:
        yield server


class _Storage(ThreadingHTTPServer):
    def __init__(self, registry: RegistryServer) -> None:
        super().__init__(("127.0.0.1", 0), _Blob)
        self.registry = registry


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(
        self, status: int, data: bytes = b"", headers: Mapping[str, str] = {}, cut: bool = False
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.close_connection = True

    def blob(self, registry: RegistryServer, digest: str) -> None:
        data = registry.blobs.get(digest)
        if data is None:
            return self.answer(404, b'{"errors": [{"code": "BLOB_UNKNOWN", "message": "gone"}]}')
        status = 200
        if (found := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))) and registry.ranges:
            if int(found[1]) >= len(data):
                return self.answer(416)
            data, status = data[int(found[1]) :], 206
        cut = registry.cuts > 0 and len(data) > 1000 and self.command == "GET"
        registry.cuts -= cut
        registry.bytes_out += len(data) if self.command == "GET" else 0
        return self.answer(status, data, cut=cut)

    def log_message(self, *_: object) -> None:
        """Nothing."""


class _Blob(_Handler):
    server: _Storage

    def do_GET(self) -> None:
        registry = self.server.registry
        registry.shown.append(self.headers.get("Authorization"))
        query = parse_qs(urlsplit(self.path).query)
        if query.get("Signature") != ["s3cret"]:
            return self.answer(403)
        return self.blob(registry, urlsplit(self.path).path.removeprefix("/"))

    do_HEAD = do_GET


class _Answer(_Handler):
    server: RegistryServer

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if url.path == "/token":
            return self._token(parse_qs(url.query))
        if not self._admitted():
            return None
        kind, _, what = url.path.removeprefix(f"/v2/{self.server.name}/").partition("/")
        if kind == "manifests":
            data = self.server.manifests.get(what)
            if data is None:
                return self.answer(404, b'{"errors": [{"code": "MANIFEST_UNKNOWN"}]}')
            return self.answer(200, data, {"Content-Type": TYPE, "Docker-Content-Digest": digest_of(data)})
        if kind != "blobs":
            return self.answer(404, b'{"errors": [{"code": "NAME_UNKNOWN"}]}')
        if self.server.redirects:
            where = f"http://127.0.0.1:{self.server.storage.server_port}/{what}?Signature=s3cret"
            return self.answer(307, headers={"Location": where})
        return self.blob(self.server, what)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if urlsplit(self.path).path == "/token":
            return self._exchange(parse_qs(body.decode()))
        if not self._admitted():
            return None
        session = secrets.token_hex(8)
        self.server.sessions.add(session)
        own = f"/v2/{self.server.name}/blobs/uploads/{session}?_state=x"
        return self.answer(202, headers={"Location": self.server.location or own})

    def do_PUT(self) -> None:
        size = int(self.headers["Content-Length"])
        if self.server.cuts > 0 and size > 1000:
            self.server.cuts -= 1
            self.rfile.read(size // 2)
            self.close_connection = True
            self.connection.close()
            return None
        data = self.rfile.read(size)
        self.server.bytes_in += size
        if not self._admitted():
            return None
        url = urlsplit(self.path)
        last = url.path.rpartition("/")[2]
        if "/manifests/" in url.path:
            self.server.put_manifest(last, data)
            return self.answer(201, headers={"Docker-Content-Digest": digest_of(data)})
        query = parse_qs(url.query)
        if last not in self.server.sessions or query.get("_state") != ["x"]:
            return self.answer(404, b'{"errors": [{"code": "BLOB_UPLOAD_UNKNOWN"}]}')
        self.server.sessions.remove(last)
        if query["digest"] != [digest_of(data)]:
            return self.answer(400, b'{"errors": [{"code": "DIGEST_INVALID"}]}')
        self.server.blobs[digest_of(data)] = data
        return self.answer(201)

    def _admitted(self) -> bool:
        """Whether the request may go on; else it is answered."""
        server = self.server
        server.asked.append(f"{self.command} {urlsplit(self.path).path}")
        if server.fails:
            headers = {"Retry-After": server.retry_after} if server.retry_after else {}
            self.answer(server.fails.pop(0), b"busy", headers)
            return False
        if server.login is None:
            return True
        shown = self.headers.get("Authorization", "")
        if server.basic:
            if shown == f"Basic {base64.b64encode(server.login.encode()).decode()}":
                return True
            self.answer(401, headers={"WWW-Authenticate": 'Basic realm="here"'})
            return False
        actions = "pull" if self.command in ("GET", "HEAD") else "pull,push"
        granted, left = server.good.get(shown.removeprefix("Bearer "), ("", 0))
        if left and set(actions.split(",")) <= set(granted.split(",")):
            server.good[shown.removeprefix("Bearer ")] = (granted, left - 1)
            return True
        scope = f"repository:{server.name}:{actions}"
        realm = server.realm or f"http://{server.host}/token"
        challenge = f'Bearer realm="{realm}",service="here, there",scope="{scope}"'
        self.answer(401, b'{"errors": [{"code": "UNAUTHORIZED"}]}', {"WWW-Authenticate": challenge})
        return False

    def _token(self, query: dict[str, list[str]]) -> None:
        server = self.server
        actions = query["scope"][0].rpartition(":")[2]
        basic = base64.b64encode((server.login or "").encode()).decode()
        shown = self.headers.get("Authorization")
        if query.get("service") != ["here, there"]:
            return self.answer(400)
        if shown == f"Basic {basic}" or (shown is None and server.pull_free and actions == "pull"):
            return self._give(actions, "token")
        return self.answer(401)

    def _exchange(self, form: dict[str, list[str]]) -> None:
        if form["grant_type"] != ["refresh_token"] or form["refresh_token"] != [self.server.identity]:
            return self.answer(401)
        return self._give(form["scope"][0].rpartition(":")[2], "access_token")

    def _give(self, actions: str, name: str) -> None:
        token = secrets.token_urlsafe(16)
        self.server.tokens += 1
        self.server.good[token] = (actions, self.server.lifetime)
        self.answer(200, json.dumps({name: token, "expires_in": 60}).encode())
