"""Names that the server answers to, other sites' pages, keys."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from qwen_common.errors import UserError
from qwen_runtime.serve.access import access

from tests.support.servers import Server, request, serving

PAGE = "https://app.example.org"
KEY = {"Authorization": "Bearer sesame"}
PREFLIGHT = {"Access-Control-Request-Method": "POST"}


@pytest.fixture(scope="module")
def behind_a_proxy(cpu_artifact: Path) -> Iterator[Server]:
    names = ("--allowed-host", "chat.example.org", "--allowed-host", "*.local")
    with serving(cpu_artifact, *names, "--cors-origin", PAGE, "--api-key", "sesame") as server:
        yield server


def test_names_that_are_allowed(behind_a_proxy: Server) -> None:
    for name, status in {
        "chat.example.org": 200,
        "Chat.Example.org:8443": 200,
        "kiosk.local": 200,
        "localhost": 200,
        "evil.example": 400,
        "example.org": 400,
    }.items():
        assert request(behind_a_proxy, "GET", "/health", Host=name)[0] == status, name


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/api/chat", "/", "/nothing"])
def test_errors_are_those_of_the_api(behind_a_proxy: Server, path: str) -> None:
    """In its shape, with what to do."""
    cases: list[tuple[str, str, dict[str, str], int, str]] = [
        ("POST", path, {"Host": "evil.example:80"}, 400, "start it with --allowed-host evil.example"),
        ("POST", path, {"Host": "a b"}, 400, "send the server's name"),
    ]
    below = path.rsplit("/", 1)[0] + "/nothing"
    cases.append(("POST", below, KEY, 405 if below == "/nothing" else 404, ": "))
    if path.startswith(("/v1", "/api")):
        cases += [
            ("POST", path, {}, 401, "Authorization: Bearer KEY"),
            ("DELETE", path, KEY, 405, f"{path} takes no DELETE: send POST"),
            ("POST", path, {**KEY, "Content-Type": "text/plain", "Origin": PAGE}, 415, "Content-Type: appl"),
            ("POST", path, KEY, 400, ""),
        ]
    for method, where, headers, status, says in cases:
        found, answered, body = request(behind_a_proxy, method, where, b"{", **headers)
        assert found == status and answered["content-type"] == "application/json", (method, where, found)
        error = json.loads(body)["error"]
        if where.startswith("/v1/messages"):
            assert json.loads(body)["type"] == "error" and error["type"]
        message = error if path.startswith("/api") else error["message"]
        assert says in message and message and "\n" not in message


def test_pages_of_other_sites(behind_a_proxy: Server) -> None:
    """The browser asks first, without the key; and it must be able to read errors too."""
    path = "/v1/chat/completions"
    asked = {**PREFLIGHT, "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os"}
    status, headers, _ = request(behind_a_proxy, "OPTIONS", path, Origin=PAGE, **asked)
    assert status == 200 and headers["access-control-allow-origin"] == PAGE
    assert "authorization" in headers["access-control-allow-headers"]
    assert "POST" in headers["access-control-allow-methods"]
    status, headers, body = request(behind_a_proxy, "GET", "/v1/models", Origin=PAGE)
    assert status == 401 and headers["access-control-allow-origin"] == PAGE
    assert json.loads(body)["error"]["code"] == "invalid_api_key"
    key = {"Authorization": "Bearer sesame"}
    status, headers, _ = request(behind_a_proxy, "GET", "/v1/models", Origin=PAGE, **key)
    assert status == 200 and headers["access-control-allow-origin"] == PAGE
    status, headers, _ = request(behind_a_proxy, "OPTIONS", path, Origin="https://evil.example", **asked)
    assert status == 400 and "access-control-allow-origin" not in headers


@pytest.mark.parametrize(
    "given,status",
    [
        ("Bearer sesame", 200),
        ("bearer sesame", 200),
        ("BEARER  sesame ", 200),
        ("Bearer Sesame", 401),
        ("Bearersesame", 401),
        ("Basic sesame", 401),
        ("sesame", 401),
    ],
)
def test_key_in_any_writing_of_its_scheme(behind_a_proxy: Server, given: str, status: int) -> None:
    assert request(behind_a_proxy, "GET", "/v1/models", Authorization=given)[0] == status


@pytest.mark.parametrize(
    "hosts,origins,message",
    [
        (["https://chat.example.org"], [], "no host name"),
        (["chat.example.org:8443"], [], "no host name"),
        (["chat.*.org"], [], "no host name"),
        (["*"], [], "no host name"),
        ([], ["app.example.org"], "no origin"),
        ([], ["https://app.example.org/"], "no origin"),
        ([], ["https://App.example.org"], "no origin"),
        ([], ["https://app.example.org:x"], "no origin"),
        ([], ["null"], "no origin"),
        ([], ["*"], "give an --api-key"),
    ],
)
def test_names_that_are_none(hosts: list[str], origins: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        access("127.0.0.1", local=True, allowed_hosts=hosts, origins=origins, api_key=None)


def test_who_is_let_in() -> None:
    open_ = access("0.0.0.0", local=False, allowed_hosts=[], origins=["*"], api_key="k")
    assert open_.hosts is None and list(open_.origins) == ["*"]
    named = access("0.0.0.0", local=False, allowed_hosts=["box"], origins=[], api_key="k")
    assert named.hosts and "box" in named.hosts and "localhost" in named.hosts
    ported = access("::1", local=True, allowed_hosts=["[::2]"], origins=["http://[::1]:3000"], api_key=None)
    assert list(ported.origins) == ["http://[::1]:3000"]
