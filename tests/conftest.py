"""Fixtures for every test."""

import os
from pathlib import Path

# No hub is asked for anything, and transformers' fallbacks to plain PyTorch are what is wanted here.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
from qwen_profiles.schema import load_profile

from benchmarks.support.artifacts import make_artifact
from benchmarks.support.checkpoints import TINY


@pytest.fixture(scope="session")
def cpu_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained checkpoint, exported as it ships. Tests that change it work on a copy."""
    return make_artifact(
        TINY, load_profile("cpu"), tmp_path_factory.mktemp("artifact") / "cpu", all_logits=False
    )
