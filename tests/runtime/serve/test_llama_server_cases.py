"""What llama-server's own tests ask, asked here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.llama_server_cases import CASES, Case, parsed, table
from tests.support.servers import Server, request

DOCS = Path(__file__).parents[3] / "docs" / "server.md"


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.path} {case.what}")
def test_case(server: Server, case: Case) -> None:
    method, body = ("GET", None) if case.body is None else ("POST", json.dumps(case.body).encode())
    status, _, answer = request(server, method, case.path, body)
    found = parsed(answer)
    assert status == case.status, found
    assert case.check(found), found


def test_page_has_the_table() -> None:
    assert table() in DOCS.read_text(encoding="utf-8"), f"put this in {DOCS}:\n\n{table()}"
