"""Providers that would take an artifact's graph and answer wrongly, or slowly, are not given it."""

from __future__ import annotations

from pathlib import Path

import pytest
from qwen_common import manifest as manifests
from qwen_common.errors import UserError
from qwen_common.providers import PROVIDERS
from qwen_export.backends.onnx.graphs import targets
from qwen_profiles.reading import profile_names
from qwen_profiles.schema import load_profile
from qwen_runtime import Model
from qwen_runtime.artifact import Artifact
from qwen_runtime.graph_fault import graph_fault

from benchmarks.support.artifacts import directml_profile
from benchmarks.support.checkpoints import TINY, TINY_MOE, TINY_VL
from tests.support.exported import Exported

FUSED = "has no kernels for the artifact's graph, which is fused"
EXPERTS = "computes QMoE wrongly, which model.onnx has"


def faults(artifact: Path) -> dict[str, str]:
    """By provider, those that there are."""
    opened = Artifact.open(artifact)
    found = {key: graph_fault(opened, provider) for key, provider in PROVIDERS.items()}
    return {key: fault for key, fault in found.items() if fault}


def test_experts_of_the_cpu(exported: Exported) -> None:
    assert faults(exported(TINY_MOE, load_profile("cpu"))) == {
        "cuda": f"CUDA {EXPERTS}",
        "dml": f"DirectML {FUSED}",
        "webgpu": f"WebGPU {EXPERTS}",
        "nvtensorrtrtx": f"TensorRT-RTX {FUSED}",
    }


def test_a_dense_model_of_the_cpu(cpu_artifact: Path) -> None:
    assert faults(cpu_artifact).keys() == {"dml", "nvtensorrtrtx"}


@pytest.mark.parametrize("checkpoint", [TINY, TINY_MOE, TINY_VL], ids=lambda path: path.name)
def test_each_provider_of_a_folder_may_run_its_own_graph(checkpoint: Path, exported: Exported) -> None:
    assert faults(exported(checkpoint, load_profile("strix-halo"))).keys() == {"nvtensorrtrtx"}
    assert faults(exported(checkpoint, directml_profile())) == {}


def test_what_the_manifest_says_of_the_lowering_is_not_believed(
    cpu_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GroupQueryAttention, which DirectML gets wrong after a past."""
    real = manifests.read(cpu_artifact)
    monkeypatch.setattr("qwen_common.manifest.read", lambda _: {**real, "lowering": "portable"})
    assert faults(cpu_artifact) == {
        "dml": "DirectML computes GroupQueryAttention wrongly, which model.onnx has"
    }


def test_a_provider_that_was_asked_for_is_refused_by_name(exported: Exported) -> None:
    """Before anything is installed for it."""
    artifact = exported(TINY_MOE, load_profile("cpu"))
    for provider, fault in ("webgpu", f"WebGPU {EXPERTS}"), ("dml", f"DirectML {FUSED}"):
        with pytest.raises(UserError) as raised:
            Model.load(artifact, provider)
        advice = f"take --provider auto, or export with a profile for {PROVIDERS[provider].title}"
        assert str(raised.value) == f"{fault}: {advice}"
    with Model.load(artifact) as model:
        assert model.info.reason == "CPU: the artifact was made for it"


def test_the_automatic_choice_passes_it_over(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """An artifact for a provider that this install has not, on one that would compute its experts wrongly."""
    artifact = exported(TINY_MOE, load_profile("cpu", ["provider=openvino"]))
    registered: list[str] = []
    monkeypatch.setattr("qwen_runtime.plugins.is_here", lambda provider: provider.key == "webgpu")
    monkeypatch.setattr("qwen_runtime.plugins.register", lambda provider, og: registered.append(provider.key))
    with Model.load(artifact) as model:
        assert model.info.provider == "cpu" and registered == ["cpu"]


def test_no_profile_asks_for_what_a_provider_computes_wrongly() -> None:
    for name in profile_names():
        profile = load_profile(name)
        if profile.backend == manifests.BackendName.ONNX:
            for provider, target in targets(profile).items():
                assert target.name in PROVIDERS[provider].lowerings
                assert not PROVIDERS[provider].wrong & target.operators
