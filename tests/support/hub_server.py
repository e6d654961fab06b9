"""A small server that speaks as much of the Hugging Face hub's API as its own client needs for a model.

It gives the files of a folder and, without Xet, takes commits into it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_CHUNK = 256 * 1024


class HubServer:
    """One model repository, made of the files of a folder.

    Attributes:
        repo: its id.
        revisions: names of its one commit.
        token: without it, the repository is not found; None: it is public.
        fetched: bytes sent of each file.
        cuts: by file, after how many bytes of an answer the connection ends, one entry for each answer.
        watch: called before every piece that is sent.
        exists: whether the repository does.
        visibility: what it was made with.
        commits: what each commit did: `KEY path`.
    """

    def __init__(self, folder: Path, repo: str) -> None:
        self.folder, self.repo = folder, repo
        self.revisions = {"main", "v1", COMMIT}
        self.token: str | None = None
        self.fetched: dict[str, int] = {}
        self.cuts: dict[str, list[int]] = {}
        self.watch: Callable[[], None] = lambda: None
        self.exists = True
        self.visibility: str | None = None
        self.commits: list[list[str]] = []
        self.stored: dict[str, bytes] = {}  # by SHA-256
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @contextmanager
    def serving(self) -> Iterator[HubServer]:
        self._thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None: ...

        def do_HEAD(self) -> None:
            self._answer(send=False)

        def do_GET(self) -> None:
            self._answer(send=True)

        def _answer(self, send: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
                return self._error(401, "RepoNotFound")
            if not hub.exists:
                return self._error(404, "RepoNotFound")
            if found := re.fullmatch(rf"/api/models/{hub.repo}(?:/(revision|tree)/([^/]+))?", path):
                if (found[2] or "main") not in hub.revisions:
                    return self._error(404, "RevisionNotFound")
                return self._json(self._tree() if found[1] == "tree" else self._info())
            if found := re.fullmatch(rf"/{hub.repo}/resolve/([^/]+)/(.+)", path):
                if found[1] not in hub.revisions:
                    return self._error(404, "RevisionNotFound")
                file = hub.folder / found[2]
                return self._file(file, send) if file.is_file() else self._error(404, "EntryNotFound")
            return self._error(404, "RepoNotFound")

        def do_PUT(self) -> None:
            hub.stored[self.path.rpartition("/")[2]] = self._body()
            self._json({})

        def do_POST(self) -> None:
            body = self._body()
            if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
                return self._error(401, "RepoNotFound")
            path = urlsplit(self.path).path
            if path == "/api/repos/create":
                hub.exists, hub.visibility = True, json.loads(body)["visibility"]
                self._json({"url": f"{hub.url}/{hub.repo}"})
            elif path == "/api/validate-yaml":
                self._json({"errors": [], "warnings": []})
            elif not hub.exists:
                self._error(404, "RepoNotFound")
            elif path == f"/api/models/{hub.repo}/preupload/main":
                self._json({"files": [self._upload_mode(file) for file in json.loads(body)["files"]]})
            elif path == f"/{hub.repo}.git/info/lfs/objects/batch":
                objects = [
                    {
                        **found,
                        "actions": {"upload": {"href": f"{hub.url}/store/{found['oid']}", "header": {}}},
                    }
                    for found in json.loads(body)["objects"]
                ]
                self._json({"transfer": "basic", "objects": objects})
            elif path == f"/api/models/{hub.repo}/commit/main":
                hub.commits.append([self._commit(**json.loads(line)) for line in body.splitlines()])
                self._json({"commitUrl": f"{hub.url}/{hub.repo}/commit/{COMMIT}", "commitOid": COMMIT})
            else:
                self._error(404, "EntryNotFound")

        def _upload_mode(self, file: dict[str, Any]) -> object:
            present = hub.folder / file["path"]
            large = file["path"].endswith(".data")
            oid = None
            if present.is_file():
                content = present.read_bytes()
                blob = b"blob %d\0" % len(content) + content
                oid = (hashlib.sha256(content) if large else hashlib.sha1(blob)).hexdigest()
            mode = "lfs" if large else "regular"
            return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}

        def _commit(self, key: str, value: dict[str, Any]) -> str:
            if key == "file":
                (hub.folder / value["path"]).write_bytes(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                (hub.folder / value["path"]).write_bytes(hub.stored[value["oid"]])
            elif key == "deletedFile":
                (hub.folder / value["path"]).unlink()
            return f"{key} {value.get('path') or value['summary']}"

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def _files(self) -> list[Path]:
            return sorted(path for path in hub.folder.iterdir() if path.is_file())

        def _info(self) -> object:
            siblings = [{"rfilename": path.name, "size": path.stat().st_size} for path in self._files()]
            return {"id": hub.repo, "sha": COMMIT, "siblings": siblings}

        def _tree(self) -> object:
            return [
                {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": _etag(path)}
                for path in self._files()
            ]

        def _json(self, content: object) -> None:
            body = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _error(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _file(self, path: Path, send: bool) -> None:
            content = path.read_bytes()
            size, start, stop = len(content), 0, len(content)
            if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                start = int(asked[1])
                stop = min(size, int(asked[2]) + 1) if asked[2] else size
            self.send_response(206 if asked else 200)
            if asked:
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{_etag(path)}"')
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(stop - start))
            self.end_headers()
            if not send:
                return
            whole = stop - start > size // 2  # of a shard, no answer with its header
            end = start + hub.cuts[path.name].pop(0) if whole and hub.cuts.get(path.name) else stop
            for place in range(start, min(end, stop), _CHUNK):
                hub.watch()
                part = content[place : min(place + _CHUNK, end, stop)]
                self.wfile.write(part)
                hub.fetched[path.name] = hub.fetched.get(path.name, 0) + len(part)
            if end < stop:
                self.close_connection = True

    return Handler


def _etag(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:40]
