"""`qwen-run` on real DirectML, by Windows' Python on Wine: docs/testing.md."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from qwen_profiles.schema import load_profile

from benchmarks.support.checkpoints import EVALUATION, TINY, TINY_MOE, TINY_VL
from tests.checkpoints.drawings import drawing
from tests.support.exported import Exported
from tests.support.wine import AVAILABLE, REASON, Windows

pytestmark = [pytest.mark.slow, pytest.mark.directml, pytest.mark.skipif(not AVAILABLE, reason=REASON)]
CHECKPOINTS = {"dense": TINY, "experts": TINY_MOE, "images": TINY_VL, "a long prompt": TINY}
OPTIONS = ("--temperature", "0", "--max-tokens", "16", "--json", "--provider")


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_the_profile_as_shipped_answers_as_on_the_cpu(
    exported: Exported, windows: Windows, kind: str, tmp_path: Path
) -> None:
    """One folder: the fused graph here and there on the CPU, the portable one there on DirectML."""
    artifact, question = exported(CHECKPOINTS[kind], load_profile("strix-halo")), ["What is an iterator?"]
    if kind == "a long prompt":  # which goes through the graph in pieces of 128 tokens
        question = [EVALUATION.read_text(encoding="utf-8")[:2100]]
    if kind == "images":
        picture, path = drawing(7), tmp_path / "picture.png"
        picture.image.save(path)
        question = [picture.question, "--image", str(path)]
    answer = answered_here([artifact, *question, *OPTIONS, "cpu"])
    for provider in ("dml", "cpu"):
        done = windows.qwen_run(artifact, *question, *OPTIONS, provider)
        assert done.returncode == 0, done.stderr[-2000:]
        found = json.loads(done.stdout.splitlines()[-1])
        assert found["provider"] == provider and len(found["text"]) > 8
        assert found["text"] == answer["text"] and found["usage"] == answer["usage"]
        assert ("with the portable graph" in done.stderr) == (provider == "dml")


def test_a_cpu_artifact_answers_on_that_onnxruntime(exported: Exported, windows: Windows) -> None:
    """Who installs DirectML's onnxruntime, 1.30, has no other one for artifacts of CPU profiles."""
    asked = [exported(TINY, load_profile("cpu")), "What is an iterator?", *OPTIONS, "cpu"]
    answer, done = answered_here(asked), windows.qwen_run(*asked)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["text"] == answer["text"] and found["usage"] == answer["usage"]


def test_experts_of_a_cpu_artifact_need_a_newer_one(exported: Exported, windows: Windows) -> None:
    artifact = exported(TINY_MOE, load_profile("cpu"))
    assert json.loads((artifact / "manifest.json").read_text())["onnxruntime"] == ">=1.31"
    done = windows.qwen_run(artifact, "What is an iterator?", *OPTIONS, "cpu")
    assert done.returncode == 2
    assert "needs onnxruntime >=1.31: install it, or export with a profile for older ones" in done.stderr


def answered_here(arguments: Sequence[str | Path]) -> dict[str, Any]:
    here = [sys.executable, "-c", "from qwen_runtime.cli import main; main()", *arguments]
    return dict(json.loads(subprocess.check_output(here)))


def test_devices_where_powershell_says_nothing(windows: Windows) -> None:
    done = windows.qwen_run("devices", "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["system"] == "win32" and found["devices"] == []
    assert next(item for item in found["providers"] if item["name"] == "cpu")["usable"]
