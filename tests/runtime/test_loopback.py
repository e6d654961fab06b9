"""Hosts of this machine alone, as servers and registries are named."""

from __future__ import annotations

import pytest
from qwen_runtime.loopback import is_loopback

HERE = "localhost", "localhost:5000", "127.0.0.1", "127.8.9.1:80", "::1", "[::1]", "[::1]:5000"
ELSEWHERE = (
    "0.0.0.0",
    "::",
    "[2001:db8::1]:80",
    "2001:db8::1",
    "registry.example:5000",
    "localhost.example",
    "",
)


@pytest.mark.parametrize("host", HERE)
def test_here(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ELSEWHERE)
def test_elsewhere(host: str) -> None:
    assert not is_loopback(host)
