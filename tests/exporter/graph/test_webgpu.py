"""Graphs on the real WebGPU provider, with a software Vulkan where there is no GPU: docs/testing.md.

Truth is transformers in float32; the graphs are unquantised, with float16 activations as profiles have them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from qwen_common import manifest as manifests
from qwen_profiles.schema import Profile, load_profile

from benchmarks.support.artifacts import float_profile, make_artifact
from benchmarks.support.checkpoints import TINY, TINY_MOE
from benchmarks.support.session import cosine

PLUGIN_FOLDER = os.environ.get("QWEN_EDGE_WEBGPU")
pytestmark = [
    pytest.mark.webgpu,
    pytest.mark.skipif(not PLUGIN_FOLDER, reason="QWEN_EDGE_WEBGPU does not name the plug-in's folder"),
]
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
# Where experts are gathered, their places among all rows are computed there too.
WITH_EXPERTS = {"Add", "Mul", "Slice"}


@dataclass(frozen=True)
class Run:
    """Logits float32 [tokens, vocab], and the operators of the nodes that ran, by provider."""

    logits: np.ndarray
    ran: dict[str, dict[str, int]]


def environment() -> dict[str, str]:
    assert PLUGIN_FOLDER is not None
    path = os.pathsep.join([PLUGIN_FOLDER, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER": "1"}


def run(artifact: Path, ids: list[int], chunks: list[int], folder: Path) -> Run:
    script = Path(__file__).parents[2] / "support" / "plugin_run.py"
    done = subprocess.run(
        [sys.executable, script, "onnxruntime_ep_webgpu", artifact],
        input=json.dumps({"ids": ids, "chunks": chunks}),
        env=environment(),
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return Run(np.load(folder / "logits.npy"), json.loads(done.stdout.splitlines()[-1]))


def on_webgpu(profile: Profile) -> Profile:
    return profile.model_copy(update={"provider": "webgpu", "device": "gpu"})


@pytest.mark.parametrize("lowering", ["fused", "portable"])
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_logits_are_those_of_transformers(kind: str, lowering: str, tmp_path: Path) -> None:
    """A prompt in pieces, then step by step; every node that has a kernel on the GPU runs there."""
    import torch
    from transformers import AutoModelForCausalLM

    profile = on_webgpu(float_profile(lowering, "float16"))
    artifact = make_artifact(CHECKPOINTS[kind], profile, tmp_path / "artifact")
    ids = np.random.default_rng(3).integers(0, 2000, 45).tolist()
    found = run(artifact, ids, [24, 16, 1, 1, 3], tmp_path)
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINTS[kind], dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    assert cosine(found.logits, expected).min() > 0.9995
    assert (found.logits.argmax(-1) == expected.argmax(-1)).mean() > 0.95
    allowed = ON_THE_CPU[lowering] | (WITH_EXPERTS if kind == "experts" else set())
    assert set(found.ran["CPUExecutionProvider"]) <= allowed
    gpu = found.ran["WebGpuExecutionProvider"]
    assert gpu["MatMul"] and (gpu.get("LinearAttention") if lowering == "fused" else gpu["CumSum"])


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
