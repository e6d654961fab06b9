"""Updates from a store, in a folder and through a web server that breaks off, fails, sends on or lies."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from qwen_common.errors import UserError
from qwen_export.bundle.publish import publish
from qwen_runtime.kiosk.install import Installation
from qwen_runtime.kiosk.sources import store
from qwen_runtime.web import Web, is_url

from tests.support.small_kiosk import WEIGHTS, new_key, small_bundle
from tests.support.web_store import web_store

UPDATE = [sys.executable, "-c", "from qwen_runtime.cli import main; main()", "update"]


def quiet(text: str) -> None:
    """Nobody to tell."""


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return new_key(tmp_path_factory.mktemp("key"))


@pytest.fixture
def folder(key: Path, tmp_path: Path) -> Path:
    """A store with 1.1 for every device and 1.2 for the early ones; 1.2 has other weights."""
    for version, ring, weights in (("1.1", "all", 0), ("1.2", "early", 1)):
        bundle = small_bundle(tmp_path / version, key, version, weights, SAYS=version)
        publish(bundle, tmp_path / "store", key.with_suffix(".pub"), [ring], quiet)
    return tmp_path / "store"


@pytest.fixture
def kiosk(key: Path, tmp_path: Path) -> Installation:
    installation = Installation(tmp_path / "kiosk")
    installation.install(small_bundle(tmp_path / "1.0", key, "1.0"), key.with_suffix(".pub"), quiet)
    return installation


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen_runtime.web._PAUSES", (0.01, 0.01))
    monkeypatch.setattr("qwen_runtime.kiosk.sources.Web", lambda url: Web(url, (0.01, 0.01)))


@pytest.mark.parametrize("ring,version", [("all", "1.1"), ("early", "1.2"), ("unheard of", "1.1")])
def test_each_ring_takes_its_version(folder: Path, kiosk: Installation, ring: str, version: str) -> None:
    kiosk.install(store(str(folder), ring), None, quiet)
    assert kiosk.current is not None and kiosk.current.name == version


def test_only_what_changed_is_sent(folder: Path, kiosk: Installation) -> None:
    with web_store(folder) as web:
        change = kiosk.install(store(web.url, "all"), None, quiet)
        assert change.moved is not None and change.moved.reused > 300_000
        assert change.moved.fetched < 20_000 and web.sent < 60_000
        before = web.sent
        kiosk.install(store(web.url + "/", "all"), None, quiet)
        assert web.sent - before < 100  # rings.json alone
    kiosk.check(kiosk.current or pytest.fail(), full=True)


def test_a_connection_that_breaks_off_is_gone_on_with(folder: Path, kiosk: Installation) -> None:
    with web_store(folder) as web:
        web.cuts, web.fails = 6, 2
        kiosk.install(store(web.url, "early"), None, quiet)
        assert any(asked for _, asked in web.asked)
        assert web.sent < 400_000
    kiosk.check(kiosk.current or pytest.fail(), full=True)


def test_an_interrupted_update_goes_on_when_it_is_started_again(folder: Path, kiosk: Installation) -> None:
    with web_store(folder) as web:
        web.budget = 150_000
        with pytest.raises(UserError, match="cannot be read"):
            kiosk.install(store(web.url, "early"), None, quiet)
        partial = next(kiosk.releases.glob(".partial-*")) / WEIGHTS
        have = partial.stat().st_size
        assert 0 < have < 300_000 and kiosk.current is not None and kiosk.current.name == "1.0"
        web.budget, web.sent = 1 << 40, 0
        kiosk.install(store(web.url, "early"), None, quiet)
        assert f"bytes={have}-" in [asked for _, asked in web.asked]
        assert web.sent < 300_000
        assert not list(kiosk.releases.glob(".*"))


def test_a_server_without_ranges(folder: Path, kiosk: Installation) -> None:
    with web_store(folder) as web:
        web.ranges, web.cuts = False, 2
        kiosk.install(store(web.url, "early"), None, quiet)
    kiosk.check(kiosk.current or pytest.fail(), full=True)


@pytest.mark.parametrize("size", [100, 300_000, 900_000])
def test_a_store_that_lies_changes_nothing(folder: Path, kiosk: Installation, size: int) -> None:
    for path in (folder / "objects").rglob("*"):
        if path.is_file() and path.stat().st_size == 300_000:
            path.write_bytes(bytes(size))
    with (
        web_store(folder) as web,
        pytest.raises(UserError, match=r"model\.onnx\.data is not as it was signed"),
    ):
        kiosk.install(store(web.url, "early"), None, quiet)
    assert kiosk.current is not None and kiosk.current.name == "1.0"


@pytest.mark.parametrize(
    "rings,message",
    [
        ({}, "has no version for the ring 'all'"),
        ({"all": "../../1.1"}, "has no version for the ring"),
        ({"all": "1\0"}, "has no version for the ring"),
        ({"all": "1\ud800"}, "has no version for the ring"),
        ({"all": "1" * 5000}, "has no version for the ring"),
        ({"all": 1}, "has no version for the ring"),
        ({"all": "9.9"}, "no bundle is there"),
        ([], "is not a JSON object"),
        (None, "publish a bundle there"),
    ],
)
def test_stores_that_are_none(folder: Path, kiosk: Installation, rings: object, message: str) -> None:
    (folder / "rings.json").unlink()
    if rings is not None:
        (folder / "rings.json").write_text(json.dumps(rings))
    with web_store(folder) as web:
        for where in (web.url, str(folder)):
            with pytest.raises(UserError, match=message):
                kiosk.install(store(where, "all"), None, quiet)


def test_a_store_cannot_bring_an_older_version(folder: Path, kiosk: Installation) -> None:
    kiosk.install(store(str(folder), "early"), None, quiet)
    with pytest.raises(UserError, match=r"version 1\.1 is older than 1\.2"):
        kiosk.install(store(str(folder), "all"), None, quiet)


def test_no_other_scheme_is_followed(folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "rings.json").write_text('{"all": "1.1"}')
    assert not is_url(f"file://{secret}") and not is_url("ftp://x/y") and is_url("https://x/y")
    with web_store(folder) as web:
        web.moved = f"file://{secret}"
        with pytest.raises(UserError):
            store(web.url, "all")
        with web_store(folder) as other:
            web.moved = other.url
            store(web.url, "all").signed()
            assert other.sent > 0


@contextmanager
def answering(*parts: bytes, pause: float = 0) -> Iterator[str]:
    """The URL of a server that sends these bytes to everybody."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def run() -> None:
            while True:
                with suppress(OSError):
                    connection = listening.accept()[0]
                    connection.recv(65536)
                    for part in parts:
                        connection.sendall(part)
                        time.sleep(pause)
                    connection.close()
                if listening.fileno() < 0:
                    return

        threading.Thread(target=run, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)


OK, FOUND = b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n"


@pytest.mark.parametrize(
    "answer",
    [
        b"hello\r\n\r\n",
        OK + b"a: b\r\n" * 200,
        OK + b"Content-Length: -5\r\n\r\nabc",
        OK + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n{}",
        FOUND + b"\r\n",
        FOUND + b"Location: http://[::1\r\n\r\n",
        FOUND + b"Location: http://127.0.0.1:99999/\r\n\r\n",
        FOUND + b"Location: //x\x00y/\r\n\r\n",
        FOUND + b"Location: /rings.json\r\n\r\n",
        b"HTTP/1.1 999 x\r\n\r\n",
        b"HTTP/1.1 204 x\r\n\r\n",
    ],
)
def test_answers_that_are_none(answer: bytes) -> None:
    with answering(answer) as url, pytest.raises(UserError):
        store(url, "all")


def test_a_server_that_sends_a_byte_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen_runtime.web._WINDOW", 0.3)
    parts = [OK + b"Content-Length: 1000\r\n\r\n", *[b" "] * 1000]
    with answering(*parts, pause=0.05) as url, pytest.raises(UserError, match="comes too slowly"):
        store(url, "all")


@pytest.mark.parametrize("url", ["http://", "http://[", "https://a b", "http://:x/"])
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(UserError):
        store(url, "all")


def test_reports_are_read_by_machines(folder: Path, kiosk: Installation) -> None:
    variables = {**os.environ, "QWEN_EDGE_KIOSK": str(kiosk.target)}
    with web_store(folder) as web:
        command = [*UPDATE, "--from", web.url, "--ring", "early", "--json"]
        reports = []
        for _ in range(2):
            done = subprocess.run(command, env=variables, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            reports.append(json.loads(done.stdout))
        assert reports[0] == reports[0] | {"ok": True, "before": "1.0", "after": "1.2", "ring": "early"}
        assert reports[0]["moved"].keys() == {"fetched", "reused", "linked", "total"}
        assert reports[0]["moved"]["fetched"] > 300_000
        assert reports[1] == reports[1] | {"ok": True, "before": "1.2", "after": "1.2", "moved": None}
        web.fails = 0
        (folder / "rings.json").write_text('{"early": "1.1"}')
        done = subprocess.run(command, env=variables, capture_output=True, text=True)
    report = json.loads(done.stdout)
    assert done.returncode == 2 and report == report | {"ok": False, "version": "1.2"}
    assert "is older" in report["error"]
    assert json.loads((kiosk.state / "update.json").read_text()) == report


def test_publishing(folder: Path, key: Path, tmp_path: Path) -> None:
    """Twice is once; what is damaged in the store is mended; another bundle of a version is refused."""
    public = key.with_suffix(".pub")
    again = publish(tmp_path / "1.1", folder, public, ["early", "all"], quiet)
    assert again.new == 0 and again.rings == {"all": "1.1", "early": "1.1"}
    weights = next(path for path in (folder / "objects").rglob("*") if path.stat().st_size == 300_000)
    weights.write_bytes(bytes(300_000))
    for version in ("1.1", "1.2"):
        publish(tmp_path / version, folder, public, [], quiet)
    for path in (folder / "objects").rglob("*"):
        assert path.is_dir() or __import__("hashlib").sha256(path.read_bytes()).hexdigest() == path.name
    with pytest.raises(UserError, match=r"has another version 1\.1"):
        publish(small_bundle(tmp_path / "other", key, "1.1", SAYS="x"), folder, public, [], quiet)
    (tmp_path / "1.2" / WEIGHTS).write_bytes(b"")
    with pytest.raises(UserError, match="changed since it was signed"):
        publish(tmp_path / "1.2", folder, public, ["all"], quiet)
    assert json.loads((folder / "rings.json").read_text()) == {"all": "1.1", "early": "1.1"}


def test_publishing_twice_at_once(folder: Path, key: Path, tmp_path: Path) -> None:
    """The second would write back the rings that it read before the first's change."""
    noted: list[str] = []

    def meanwhile(text: str) -> None:
        noted.append(text)
        if text == "copying what is new":
            with pytest.raises(UserError, match="another publish is changing"):
                publish(tmp_path / "1.2", folder, key.with_suffix(".pub"), ["all"], quiet)

    done = publish(tmp_path / "1.1", folder, key.with_suffix(".pub"), ["late"], meanwhile)
    assert "copying what is new" in noted and done.rings["late"] == "1.1"
