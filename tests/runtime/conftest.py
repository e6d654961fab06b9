"""Fixtures of the runtime's tests."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from qwen_runtime import Model


@pytest.fixture(scope="module")
def model(cpu_artifact: Path) -> Iterator[Model]:
    with Model.load(cpu_artifact) as loaded:
        yield loaded


@pytest.fixture
def copied(cpu_artifact: Path, tmp_path: Path) -> Path:
    """An artifact that may be damaged."""
    return Path(shutil.copytree(cpu_artifact, tmp_path / "copy"))
