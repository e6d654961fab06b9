"""Which provider runs an artifact."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from qwen_common.errors import UserError
from qwen_runtime import Model
from qwen_runtime.provider import load_first


class FakeGenAI:
    """Stands for an onnxruntime_genai built with providers that this machine does not have."""

    def __init__(self, *available: str) -> None:
        self.registered: list[tuple[str, str]] = []
        for name in ("cuda", "dml"):
            setattr(self, f"is_{name}_available", lambda name=name: name in available)

    def register_execution_provider_library(self, name: str, path: str) -> None:
        self.registered.append((name, path))


@pytest.fixture
def fake_webgpu_plugin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Stands for the installed package onnxruntime-ep-webgpu."""
    (tmp_path / "onnxruntime_ep_webgpu.py").write_text(
        "def get_ep_name(): return 'WebGpuExecutionProvider'\ndef get_library_path(): return 'webgpu.so'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("qwen_runtime.plugins._registered", set())
    monkeypatch.delitem(sys.modules, "onnxruntime_ep_webgpu", raising=False)
    yield
    sys.modules.pop("onnxruntime_ep_webgpu", None)  # it was imported, and others would find it


def loads_on(*good: str) -> Callable[[str], str]:
    """Stands for hardware that only these providers start on; the message is ONNX Runtime GenAI's."""

    def load(name: str) -> str:
        if name not in good:
            raise RuntimeError(f"{name} execution provider is not supported in this build.\n")
        return name

    return load


def test_provider_choice() -> None:
    choice, loaded = load_first("auto", "dml", FakeGenAI("dml"), loads_on("dml"))
    assert (choice.name, loaded) == (
        "dml",
        "dml",
    ) and choice.reason == "DirectML: the artifact was made for it"
    assert load_first("cuda", "dml", FakeGenAI("cuda"), loads_on("cuda"))[0].reason == "CUDA: asked for"
    with pytest.raises(UserError, match="CUDA is not in this install: pip install onnxruntime-genai-cuda"):
        load_first("cuda", "cpu", FakeGenAI(), loads_on("cuda"))
    with pytest.raises(UserError, match="no provider 'gpu': there are auto, cpu, cuda"):
        load_first("gpu", "cpu", FakeGenAI(), loads_on())
    with pytest.raises(UserError, match="CUDA could not load the artifact: it finds no device here"):
        load_first("cuda", "cpu", FakeGenAI("cuda"), loads_on("cpu"))


def test_an_onnxruntime_without_directml() -> None:
    def load(name: str) -> str:
        raise RuntimeError("Specified provider is not supported.")  # seen with onnxruntime 1.32's for Windows

    with pytest.raises(UserError, match=r"DirectML could not load .*: .*pip install onnxruntime-windowsml"):
        load_first("dml", "dml", FakeGenAI("dml"), load)


def test_a_machine_without_a_graphics_driver(fake_webgpu_plugin: None) -> None:
    def load(name: str) -> str:
        if name == "webgpu":  # as the plug-in 0.4.0 and GenAI 0.18 say it
            raise RuntimeError(
                "/onnxruntime_src/onnxruntime/core/session/plugin_ep/ep_plugin_provider_interfaces.cc:393 "
                "virtual std::unique_ptr<onnxruntime::IExecutionProvider> onnxruntime::"
                "PluginExecutionProviderFactory::CreateProvider(const OrtSessionOptions&, const OrtLogger&) "
                "[ONNXRuntimeError] : 11 : EP_FAIL : /onnxruntime_src/onnxruntime/core/providers/webgpu/"
                "webgpu_context.cc:136 ::<lambda()> adapter_result.status == wgpu::RequestAdapterStatus::"
                "Success was false. Failed to get a WebGPU adapter: No supported adapters\n\n"
            )
        return name

    choice, _ = load_first("auto", "webgpu", FakeGenAI(), load)
    assert choice.reason == "CPU: WebGPU did not start (it finds no graphics device here: install its driver)"


def test_the_next_provider_that_loads() -> None:
    choice, _ = load_first("auto", "dml", FakeGenAI("cuda"), loads_on("cuda", "cpu"))
    assert choice.name == "cuda"
    assert choice.reason == "CUDA: DirectML is not in this install (onnxruntime-genai-winml has it)"
    choice, _ = load_first("auto", "dml", FakeGenAI("cuda", "dml"), loads_on("cpu"))
    assert choice.name == "cpu"
    assert choice.reason == (
        "CPU: DirectML did not start (it finds no device here); CUDA did not start (it finds no device here)"
    )
    tried = []
    with pytest.raises(ZeroDivisionError):  # what the CPU raises is not hidden
        load_first("auto", "cpu", FakeGenAI("cuda"), lambda name: (tried.append(name), 1 / 0))
    assert tried == ["cpu"]


def test_plugin_is_registered_once(fake_webgpu_plugin: None) -> None:
    library = FakeGenAI()
    for _ in range(2):
        choice, _loaded = load_first("auto", "webgpu", library, loads_on("webgpu"))
        assert choice.reason == "WebGPU: the artifact was made for it"
    assert library.registered == [("WebGpuExecutionProvider", "webgpu.so")]


def test_provider_that_does_not_start(
    cpu_artifact: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """This install's CPU-only library, made to claim CUDA: it falls back, or says so when it was asked."""
    monkeypatch.setattr("onnxruntime_genai.is_cuda_available", lambda: True)
    artifact = shutil.copytree(cpu_artifact, tmp_path / "cuda")
    manifest = artifact / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"provider": "cpu"', '"provider": "cuda"'))
    with Model.load(artifact) as model:
        assert model.info.provider == "cpu"
        assert model.info.reason.startswith("CPU: CUDA did not start (")
    with pytest.raises(UserError, match="CUDA could not load"):
        Model.load(cpu_artifact, provider="cuda")
