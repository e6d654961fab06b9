"""Fixtures of the server's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.servers import Server, serving


@pytest.fixture(scope="module")
def server(cpu_artifact: Path) -> Iterator[Server]:
    with serving(cpu_artifact) as running:
        yield running
