"""Graphs on the real WebGPU provider, with a software Vulkan where there is no GPU: docs/testing.md.

Truth is transformers in float32; the graphs are unquantised, with float16 activations as profiles have them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from qwen_common import manifest as manifests
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_profiles.schema import Profile, load_profile

from benchmarks.support.artifacts import float_profile, make_artifact
from benchmarks.support.checkpoints import TINY, TINY_MOE, TINY_VL
from benchmarks.support.provider import (
    CPU,
    features_of_transformers,
    logits_of_transformers,
    random_image,
    webgpu,
)
from benchmarks.support.session import cosine

PLUGIN_FOLDER = os.environ.get("QWEN_EDGE_WEBGPU")
pytestmark = [
    pytest.mark.webgpu,
    pytest.mark.skipif(not PLUGIN_FOLDER, reason="QWEN_EDGE_WEBGPU does not name the plug-in's folder"),
]
WEBGPU = "WebGpuExecutionProvider"
# Chromium's software Vulkan, whose device computes no float16.
SWIFTSHADER = Path("/usr/lib/chromium/vk_swiftshader_icd.json")
CHECKPOINTS = {"dense": TINY, "experts": TINY_MOE}
# Arithmetic of shapes and lengths, which ONNX Runtime leaves to the CPU on every provider.
ON_THE_CPU = {
    "fused": {"Cast", "Range", "ReduceSum", "Reshape", "Shape", "Squeeze", "Sub"},
    "portable": {
        *{"Add", "Cast", "Concat", "Gather", "Greater", "Range", "Reshape"},
        *{"Shape", "Slice", "Squeeze", "Sub", "Tile", "Unsqueeze"},
    },
}
# Where each patch of an image lies.
IN_THE_TOWER = {"Cast", "Concat", "Expand", "Range", "Reshape", "Shape", "Slice", "Split", "Squeeze"}
MOST_COPIES = 3  # of all that the CPU computes, a run
# Which experts were chosen, which TopK gives as int64, is made int32 there, and cut into the first token's
# and the others'.
WITH_EXPERTS = {"Cast", "Slice"}


def environment() -> dict[str, str]:
    assert PLUGIN_FOLDER is not None
    return {**os.environ, **webgpu(PLUGIN_FOLDER).variables}


def on_webgpu(profile: Profile) -> Profile:
    return profile.model_copy(update={"provider": "webgpu", "device": "gpu"})


@pytest.mark.parametrize("lowering", ["fused", "portable"])
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_logits_are_those_of_transformers(kind: str, lowering: str, tmp_path: Path) -> None:
    """A prompt in pieces, then step by step; every node that has a kernel on the GPU runs there."""
    assert PLUGIN_FOLDER is not None
    checkpoint = CHECKPOINTS[kind]
    artifact = make_artifact(checkpoint, on_webgpu(float_profile(lowering, "float16")), tmp_path / "artifact")
    ids = np.random.default_rng(3).integers(0, 2000, 45).tolist()
    found = webgpu(PLUGIN_FOLDER).run(artifact, ids, [24, 16, 1, 1, 3], tmp_path)
    agree(found.logits, logits_of_transformers(checkpoint, ids))
    allowed = ON_THE_CPU[lowering] | (WITH_EXPERTS if kind == "experts" else set())
    assert set(found.ran[CPU]) <= allowed
    gpu = found.ran[WEBGPU]
    assert gpu["MatMul"] and (gpu.get("LinearAttention") if lowering == "fused" else gpu["CumSum"])
    # Positions, lengths and masks go to the GPU, once for all layers. Nothing comes back but the outputs and
    # each layer's choice of experts, which goes there again in two parts.
    layers = Checkpoint.open(str(checkpoint)).config.num_hidden_layers if kind == "experts" else 0
    assert gpu.get("MemcpyToHost", 0) <= layers
    assert gpu["MemcpyFromHost"] <= MOST_COPIES + 2 * layers


def agree(found: np.ndarray, expected: np.ndarray) -> None:
    assert cosine(found, expected).min() > 0.9995
    assert (found.argmax(-1) == expected.argmax(-1)).mean() > 0.95


@pytest.mark.parametrize("lowering", ["fused", "portable"])
def test_images(lowering: str, tmp_path: Path) -> None:
    """The tower's features, and the logits of a prompt with an image, then step by step."""
    assert PLUGIN_FOLDER is not None
    artifact = make_artifact(TINY_VL, on_webgpu(float_profile(lowering, "float16")), tmp_path / "artifact")
    ids, images = random_image(TINY_VL, 8, 12, 9)
    found = webgpu(PLUGIN_FOLDER).run(artifact, ids, [len(ids) - 2, 1, 1], tmp_path, images=images)
    assert found.features is not None
    assert cosine(found.features, features_of_transformers(TINY_VL, images)).min() > 0.9995
    agree(found.logits, logits_of_transformers(TINY_VL, ids, images))
    assert set(found.ran[CPU]) <= ON_THE_CPU[lowering]
    assert set(found.vision[CPU]) <= IN_THE_TOWER
    assert found.vision[WEBGPU]["MultiHeadAttention"] == Checkpoint.open(str(TINY_VL)).vision.depth


def answer(artifact: Path, question: str, *options: str) -> tuple[str, str]:
    """What `qwen-run` says through ONNX Runtime GenAI and the plug-in, and on which provider."""
    command = [sys.executable, "-c", "from qwen_runtime.cli import main; main()", str(artifact), question]
    command += ["--temperature", "0", "--max-tokens", "24", "--json", *options]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    return found["text"], found["provider"]


@pytest.mark.parametrize("profile", ["webgpu", "strix-halo"])
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_the_profile_as_shipped_answers_as_on_the_cpu(kind: str, profile: str, tmp_path: Path) -> None:
    assert load_profile(profile).lowering == "fused"
    artifact = make_artifact(CHECKPOINTS[kind], load_profile(profile), tmp_path / "artifact", False)
    question = "What is an iterator?"
    text, provider = answer(artifact, question)
    assert provider == "webgpu" and len(text) > 20
    assert answer(artifact, question, "--provider", "cpu") == (text, "cpu")
    if profile == "strix-halo":  # DirectML's graph, on the CPU
        manifest = manifests.read(artifact)
        (further,) = [entry for entry in manifest["further_graphs"] if entry["providers"] == ["dml"]]
        further["providers"].append("cpu")
        manifests.write(artifact, manifest)
        assert answer(artifact, question, "--provider", "cpu") == (text, "cpu")


@pytest.mark.skipif(not SWIFTSHADER.exists(), reason="no Chromium with SwiftShader")
def test_a_device_without_float16_leaves_the_answer_to_the_cpu(tmp_path: Path) -> None:
    """It loads the model, and fails when that first runs."""
    artifact = make_artifact(TINY, load_profile("webgpu"), tmp_path / "artifact", all_logits=False)
    command = [sys.executable, "-c", "from qwen_runtime.cli import main; main()", str(artifact)]
    command += ["What is yield?", "--temperature", "0", "--max-tokens", "8", "--json"]
    chosen = dict.fromkeys(("VK_DRIVER_FILES", "VK_ICD_FILENAMES"), str(SWIFTSHADER))
    done = subprocess.run(command, env=environment() | chosen, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["provider"] == "cpu"
    reason = "its device has no float16: export with --set activation_dtype=float32"
    assert f"CPU: WebGPU did not start ({reason})" in done.stderr
    asked = subprocess.run(
        [*command, "--provider", "webgpu"], env=environment() | chosen, capture_output=True, text=True
    )
    assert asked.returncode == 2 and f"WebGPU could not load the artifact: {reason}" in asked.stderr
