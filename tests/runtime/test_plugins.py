"""Where a plug-in's library is found. Fakes are named so, and made from the packages' real interfaces."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import onnxruntime_genai as og
import pytest
from qwen_common.providers import PROVIDERS
from qwen_profiles.schema import load_profile
from qwen_runtime import plugins
from qwen_runtime.devices import Device, Machine, providers
from qwen_runtime.provider import load_first

from benchmarks.support.checkpoints import TINY
from tests.support.exported import Exported

PLUGIN_FOLDER = os.environ.get("QWEN_EDGE_WEBGPU")

# Of the wheels of 0.5.0 (win_amd64) and 0.31.0 (macOS), and of the build script of onnxruntime-ep-amdgpu: the
# functions that they have, with what the real ones return but for the path.
FAKE_PACKAGES = {
    "onnxruntime_ep_nv_tensorrt_rtx": "def get_ep_name(): return 'NvTensorRTRTXExecutionProvider'\n"
    "def get_library_path(): return 'nv.so'\n",
    "onnxruntime_ep_mlx": "def ep_name(): return 'MLXExecutionProvider'\n"
    "def library_path(): return 'mlx.dylib'\n",
    "onnxruntime_ep_amdgpu": "def get_ep_name(): return 'AMDGPUExecutionProvider'\n"
    "def get_library_path(): return 'amdgpu.so'\n",
}
# ELF's header of a library for RISC-V.
FOR_RISC_V = b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + struct.pack(
    "<HHIQQQIHHHHHH", 3, 243, 1, 0, 64, 0, 0, 64, 56, 0, 64, 0, 0
)
# Greedy tokens of one artifact, on a plug-in and on the CPU.
ON_A_PLUGIN = """
import sys, numpy as np, onnxruntime_genai as og
name, library, artifact = sys.argv[1:]
og.register_execution_provider_library(name, library)
for provider in (name, None):
    config = og.Config(artifact)
    config.clear_providers()
    if provider is not None:
        config.append_provider(provider)
    model = og.Model(config)
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=20, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array([5, 9, 100, 7], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    print(*generator.get_sequence(0))
"""


@pytest.fixture
def fake_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """Puts one of the packages where it can be imported."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(plugins, "_registered", set())

    def put(module: str) -> None:
        (tmp_path / f"{module}.py").write_text(FAKE_PACKAGES[module])

    yield put
    for module in FAKE_PACKAGES:
        sys.modules.pop(module, None)


@pytest.mark.parametrize(
    ("key", "module", "path"),
    [
        ("nvtensorrtrtx", "onnxruntime_ep_nv_tensorrt_rtx", "nv.so"),
        ("mlx", "onnxruntime_ep_mlx", "mlx.dylib"),
        ("amdgpu", "onnxruntime_ep_amdgpu", "amdgpu.so"),
    ],
)
def test_the_library_of_a_package(
    key: str, module: str, path: str, fake_package: Callable[[str], None]
) -> None:
    provider = PROVIDERS[key]
    assert not plugins.is_here(provider)
    with pytest.raises(FileNotFoundError):
        plugins.library(provider)
    fake_package(module)
    found: list[tuple[str, str]] = []
    library = SimpleNamespace(register_execution_provider_library=lambda *given: found.append(given))
    choice, _ = load_first("auto", key, library, str.upper)
    assert choice.reason == f"{provider.title}: the artifact was made for it"
    assert found == [(provider.onnxruntime_name, path)]
    names = next(line for line in FAKE_PACKAGES[module].splitlines() if "ep_name" in line)
    assert f"'{provider.onnxruntime_name}'" in names  # what GenAI looks its devices up by


def test_an_environment_variable_names_the_library(
    fake_package: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_package("onnxruntime_ep_amdgpu")
    monkeypatch.setenv("AMDGPU_EP_PATH", "/opt/amd/libamdgpu-ep.so")
    assert plugins.library(PROVIDERS["amdgpu"]) == "/opt/amd/libamdgpu-ep.so"


def test_a_library_beside_onnxruntime(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where hip-ep's own wheel puts it."""
    package = tmp_path / "onnxruntime" / "__init__.py"
    monkeypatch.setattr(
        plugins, "find_spec", lambda name: SimpleNamespace(origin=package) if name == "onnxruntime" else None
    )
    assert not plugins.is_here(PROVIDERS["amdgpu"])
    library = package.parent / "capi" / PROVIDERS["amdgpu"].beside_onnxruntime[sys.platform]
    library.parent.mkdir(parents=True)
    library.touch()
    assert plugins.is_here(PROVIDERS["amdgpu"]) and plugins.library(PROVIDERS["amdgpu"]) == str(library)


def test_a_library_that_is_none_is_left_for_the_next_provider(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(plugins, "_registered", set())
    monkeypatch.setenv("AMDGPU_EP_PATH", str(tmp_path / "nothing.so"))
    choice, _ = load_first("auto", "amdgpu", og, str.upper, ["cpu"])
    assert choice.name == "cpu" and choice.reason.startswith("CPU: AMDGPU did not start (")


def test_devices_says_what_is_wrong_with_a_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The real ONNX Runtime, and a file that is no library."""
    wrong = tmp_path / "libamdgpu-ep.so"
    wrong.write_text("no library")
    radeon = Device("gpu", "AMD 1002:1586", "1002:1586")
    machine = Machine("linux", "some CPU", frozenset(), 10**10, (radeon,))
    for path in (wrong, tmp_path / "nothing.so"):
        monkeypatch.setenv("AMDGPU_EP_PATH", str(path))
        found = next(item for item in providers(machine, og) if item.name == "amdgpu")
        assert not found.usable and found.advice.startswith("its library does not load: ")
        assert path.name in found.advice and "\n" not in found.advice


@pytest.mark.skipif(sys.platform != "linux", reason="words of Linux's loader")
@pytest.mark.parametrize(
    "content, why",
    [
        (b"no library", "file too short"),
        (bytes(4096), "invalid ELF header"),
        (FOR_RISC_V + bytes(4096), "it is for another processor"),
        (None, "there is no such file"),
    ],
    ids=["short", "no ELF", "another processor", "no file"],
)
def test_why_a_library_does_not_load(
    content: bytes | None, why: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By the real libraries; the path is named once, and is long, as those of packages are."""
    wrong = tmp_path / ("deep" * 20) / "libamdgpu-ep.so"
    wrong.parent.mkdir()
    if content is not None:
        wrong.write_bytes(content)
    monkeypatch.setattr(plugins, "_registered", set())
    monkeypatch.setenv("AMDGPU_EP_PATH", str(wrong))
    choice, _ = load_first("auto", "amdgpu", og, str.upper, ["cpu"])
    assert choice.reason == f"CPU: AMDGPU did not start ({wrong}: {why})"
    radeon = Device("gpu", "AMD 1002:1586", "1002:1586")
    machine = Machine("linux", "some CPU", frozenset(), 10**10, (radeon,))
    found = next(item for item in providers(machine, og) if item.name == "amdgpu")
    assert found.advice == f"its library does not load: {wrong}: {why}"


@pytest.mark.parametrize("key", ["amdgpu", "nvtensorrtrtx", "mlx"])
def test_genai_takes_the_names(key: str, cpu_artifact: Path) -> None:
    """The real library, which has none of these here. What it does not know by name it hands to ONNX Runtime,
    as it does with MLX's on a Mac."""
    name = PROVIDERS[key].genai_name
    config = og.Config(str(cpu_artifact))
    config.append_provider(name)
    with pytest.raises(RuntimeError) as raised:
        og.Model(config)
    said = {
        "amdgpu": "Failed to create allocator for AMDGPU",
        "nvtensorrtrtx": "Cuda interface not available",
        "mlx": "Unknown provider name 'MLXExecutionProvider'",
    }
    assert said[key] in str(raised.value)


@pytest.mark.webgpu
@pytest.mark.skipif(not PLUGIN_FOLDER, reason="QWEN_EDGE_WEBGPU does not name the plug-in's folder")
def test_genai_runs_a_plugin_that_it_does_not_know(exported: Exported, tmp_path: Path) -> None:
    """As MLX's on a Mac: its profile's graphs, on WebGPU's library by a name that GenAI has no code for."""
    name, known = b"OthersExecutionProvider", b"WebGpuExecutionProvider"
    content = next(Path(str(PLUGIN_FOLDER)).rglob("libonnxruntime_providers_webgpu.so")).read_bytes()
    (tmp_path / "others.so").write_bytes(content.replace(known, name))
    artifact = exported(TINY, load_profile("apple-m4"))
    command = [sys.executable, "-c", ON_A_PLUGIN, name.decode(), tmp_path / "others.so", artifact]
    environment = {**os.environ, "ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER": "1"}
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    on_the_plugin, on_the_cpu = said.splitlines()[-2:]
    assert on_the_plugin == on_the_cpu and len(on_the_cpu.split()) == 20
