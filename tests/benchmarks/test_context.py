"""Places far into a context are measured for artifacts with caches of both kinds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from qwen_profiles.schema import load_profile

from benchmarks import context
from benchmarks.support.checkpoints import TINY
from tests.support.exported import Exported


def test_artifacts_take_turns_at_every_place(
    cpu_artifact: Path, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifacts = [str(cpu_artifact), str(exported(TINY, load_profile("cpu", ["cache_dtype=int8"])))]
    file = tmp_path / "context.json"
    options = ["--past", "40", "300", "--chunks", "16", "--rounds", "10", "--json", str(file)]
    monkeypatch.setattr("sys.argv", ["context", *artifacts, *options])
    context.main()
    found = json.loads(file.read_text())
    assert [(one["past"], one["tokens"]) for one in found] == [(40, 1), (40, 16), (300, 1), (300, 16)]
    for one in found:
        speeds = one["tokens_per_second"]
        assert list(speeds) == artifacts
        assert {len(values) for values in speeds.values()} == {10 if one["tokens"] == 1 else 2}
        assert min(min(values) for values in speeds.values()) > 0
