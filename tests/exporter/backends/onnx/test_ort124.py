"""The portable artifact on onnxruntime 1.24.4, the generation that every DirectML build is of.

That version and the current ONNX Runtime GenAI's requirement exclude each other, so it lives in an
environment of its own; QWEN_EDGE_ORT124_PYTHON names its interpreter (see .ci/run and docs/testing.md).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.support.artifacts import directml_profile, float_profile, make_artifact
from benchmarks.support.checkpoints import TINY
from tests.exporter.graph.test_vision import prompt_of
from tests.support.generate_tokens import greedy
from tests.support.random_checkpoints import write_random_checkpoint, write_vision_checkpoint

OLD_PYTHON = os.environ.get("QWEN_EDGE_ORT124_PYTHON")
pytestmark = [
    pytest.mark.ort124,
    pytest.mark.skipif(not OLD_PYTHON, reason="QWEN_EDGE_ORT124_PYTHON does not name an interpreter"),
]


@pytest.mark.parametrize(
    "kind", ["trained, as shipped", "trained, float32", "random, float32", "experts, as shipped"]
)
def test_same_tokens_on_1_24(kind: str, tmp_path: Path) -> None:
    shapes: dict[str, dict[str, int]] = {"random": {}, "experts": {"num_experts": 8}}
    shape = shapes.get(kind.partition(",")[0])
    checkpoint = TINY if shape is None else write_random_checkpoint(tmp_path / "c", vocab_size=2048, **shape)
    profile = directml_profile() if kind.endswith("shipped") else float_profile("portable")
    artifact = make_artifact(checkpoint, profile, tmp_path / "artifact", all_logits=False)
    prompt = np.random.default_rng(5).integers(0, 2000, 150).tolist()
    assert OLD_PYTHON is not None
    old, new = greedy(OLD_PYTHON, artifact, prompt), greedy(sys.executable, artifact, prompt)
    assert old["onnxruntime"].startswith("1.24.")
    assert not new["onnxruntime"].startswith("1.24.")
    assert old["tokens"] == new["tokens"]


@pytest.mark.parametrize("kind", ["as shipped", "float32"])
def test_same_tokens_after_images_on_1_24(kind: str, tmp_path: Path) -> None:
    profile = directml_profile() if kind == "as shipped" else float_profile("portable")
    checkpoint = write_vision_checkpoint(tmp_path / "c")
    artifact = make_artifact(checkpoint, profile, tmp_path / "artifact", all_logits=False)
    prompt, inputs = prompt_of([(18, 20), (4, 10)])
    np.savez(tmp_path / "inputs.npz", **inputs)
    assert OLD_PYTHON is not None
    old, new = (
        greedy(python, artifact, prompt, 24, tmp_path / "inputs.npz")
        for python in (OLD_PYTHON, sys.executable)
    )
    assert old["onnxruntime"].startswith("1.24.")
    assert old["tokens"] == new["tokens"]


def test_fused_artifact_does_not_load_there(cpu_artifact: Path) -> None:
    """The reason for the portable lowering; when this fails, it may have become unnecessary."""
    assert OLD_PYTHON is not None
    with pytest.raises(subprocess.CalledProcessError):
        greedy(OLD_PYTHON, cpu_artifact, [1, 2, 3], 1)
