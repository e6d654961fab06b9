"""Fixtures for every test.

What takes long to import is imported where it is used, so that a test of a parser starts at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# No hub is asked for anything, and transformers' fallbacks to plain PyTorch are what is wanted here.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# PyTorch's threads and NumPy's (OpenBLAS) wait for each other in busy loops: on models this small that takes
# more time than it saves, and ten times as much where something else runs too. ONNX Runtime has its own.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from benchmarks.support.checkpoints import TINY
from tests.support.exported import Exported
from tests.support.wine import Windows, install

if TYPE_CHECKING:
    from tests.support.adapters import Adapted


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exported]:
    artifacts = Exported(tmp_path_factory.mktemp("exported"))
    yield artifacts
    artifacts.check()


@pytest.fixture(scope="session")
def cpu_artifact(exported: Exported) -> Path:
    """The trained dense checkpoint, exported as it ships for the CPU."""
    from qwen_profiles.schema import load_profile

    return exported(TINY, load_profile("cpu"))


@pytest.fixture(scope="session")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    """A random dense checkpoint with adapters; not to be written to."""
    from tests.support.adapters import make_adapted

    return make_adapted(tmp_path_factory.mktemp("adapted"))


@pytest.fixture(scope="session")
def windows(tmp_path_factory: pytest.TempPathFactory) -> Windows:
    """Windows' Python with DirectML, for tests that are skipped unless `tests.support.wine.AVAILABLE`."""
    return install(tmp_path_factory.mktemp("windows"))
