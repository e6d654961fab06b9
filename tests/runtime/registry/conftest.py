"""A registry on this machine, and nobody's logins."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.registry_server import RegistryServer, registry_alone


@pytest.fixture(autouse=True)
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RegistryServer]:
    with registry_alone(tmp_path / "docker", monkeypatch) as server:
        yield server
