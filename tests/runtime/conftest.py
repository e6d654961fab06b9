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


@pytest.fixture(scope="session")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shows hidden states: in float32, with the trained head, read in chunks of 16 tokens."""
    from safetensors.torch import load_file

    from benchmarks.support.artifacts import float_profile, make_artifact
    from benchmarks.support.checkpoints import TINY, TRAINED_HEAD
    from benchmarks.support.mtp import with_head

    folder = tmp_path_factory.mktemp("hidden")
    checkpoint = with_head(TINY, load_file(TRAINED_HEAD), folder / "tiny-dense")
    profile = float_profile("fused", prefill_chunk=16).model_copy(update={"mtp": True})
    return make_artifact(checkpoint, profile, folder / "out", False)
