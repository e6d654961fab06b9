"""Software adapters and devices without float16: known from vulkaninfo, from Windows, and from a run."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from qwen_common.providers import PROVIDERS
from qwen_runtime import devices, float16_probe, plugins
from qwen_runtime.devices import Device, Machine, providers
from qwen_runtime.graphics import Adapter, vulkan_adapters, vulkaninfo_adapters, windows_adapters

SWIFTSHADER = Path("/usr/lib/chromium/vk_swiftshader_icd.json")
LAVAPIPE = Path("/usr/share/vulkan/icd.d/lvp_icd.json")
PLUGIN_FOLDER = os.environ.get("QWEN_EDGE_WEBGPU")
SOFTWARE = Adapter("llvmpipe (LLVM 15.0.6, 256 bits)", True, True, "vulkaninfo")
RADEON = Device("gpu", "AMD 1002:1586", "1002:1586")
BARE = Machine("linux", "some CPU", frozenset(), 10**10, ())
# What vulkaninfo 1.3.239 prints, cut to the lines that are read and their neighbours.
VULKANINFO = """\
Device Properties and Extensions:
=================================
GPU0:
VkPhysicalDeviceProperties:
---------------------------
	apiVersion        = 1.4.305 (4210993)
	vendorID          = 0x1002
	deviceType        = PHYSICAL_DEVICE_TYPE_INTEGRATED_GPU
	deviceName        = AMD Radeon 8060S (RADV GFX1151)
VkPhysicalDeviceVulkan11Features:
	storageBuffer16BitAccess           = true
VkPhysicalDeviceVulkan12Features:
	shaderFloat16                                      = true

GPU1:
VkPhysicalDeviceProperties:
---------------------------
	deviceType        = PHYSICAL_DEVICE_TYPE_CPU
	deviceName        = SwiftShader Device (Subzero)
VkPhysicalDeviceVulkan11Features:
	storageBuffer16BitAccess           = false
VkPhysicalDeviceVulkan12Features:
	shaderFloat16                                      = false
"""


def webgpu(machine: Machine) -> devices.Usable:
    return next(item for item in providers(machine, None) if item.name == "webgpu")


@pytest.fixture
def only_webgpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """WebGPU's record alone, as of an install with its plug-in and a device that has no float16."""
    monkeypatch.setattr(devices, "PROVIDERS", {"webgpu": PROVIDERS["webgpu"]})
    monkeypatch.setattr(plugins, "is_here", lambda provider: True)
    monkeypatch.setattr(plugins, "devices", lambda provider: ["a device"])
    monkeypatch.setattr(plugins, "library", lambda provider: "webgpu.so")
    monkeypatch.setattr(devices, "computes_float16", lambda name, library: False)


def test_what_vulkaninfo_prints() -> None:
    assert vulkaninfo_adapters(VULKANINFO) == [
        Adapter("AMD Radeon 8060S (RADV GFX1151)", False, True, "vulkaninfo"),
        Adapter("SwiftShader Device (Subzero)", True, False, "vulkaninfo"),
    ]
    assert vulkaninfo_adapters("ERROR: no driver") == []


@pytest.mark.skipif(
    not (shutil.which("vulkaninfo") and SWIFTSHADER.exists() and LAVAPIPE.exists()),
    reason="no vulkaninfo, SwiftShader and lavapipe",
)
def test_the_real_vulkaninfo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VK_DRIVER_FILES", f"{SWIFTSHADER}{os.pathsep}{LAVAPIPE}")
    found = {adapter.name.split()[0]: adapter for adapter in vulkan_adapters()}
    assert found["SwiftShader"].software and found["llvmpipe"].software
    assert (found["SwiftShader"].float16, found["llvmpipe"].float16) == (False, True)


def test_windows_own_renderer() -> None:
    names = ["Microsoft Basic Render Driver", "AMD Radeon(TM) 8060S Graphics", None]
    assert windows_adapters([{"Name": name} for name in names]) == [
        Adapter("Microsoft Basic Render Driver", True, None, "Windows")
    ]


def test_a_software_adapter_is_no_gpu(only_webgpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER", raising=False)
    for gpus in (), (RADEON,):  # the second has no driver
        machine = dataclasses.replace(BARE, devices=gpus, adapters=(SOFTWARE,))
        advice = webgpu(machine).advice
        assert advice.startswith(
            "only a software adapter here, llvmpipe (LLVM 15.0.6, 256 bits) (says vulkaninfo)"
        )
        assert "set ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER=1" in advice
        monkeypatch.setenv("ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER", "1")
        assert webgpu(machine).usable
        assert webgpu(machine).note.startswith("on the CPU, by llvmpipe")
        monkeypatch.delenv("ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER")


def test_a_gpu_beside_software(only_webgpu: None) -> None:
    """Vulkan lists both where there is a driver, and so does Windows."""
    hardware = dataclasses.replace(SOFTWARE, name="RADV", software=False)
    beside = dataclasses.replace(BARE, devices=(RADEON,), adapters=(SOFTWARE, hardware))
    assert webgpu(beside).note == ("no float16 (found by a run): export with --set activation_dtype=float32")
    warp = Adapter("Microsoft Basic Render Driver", True, None, "Windows")
    assert webgpu(dataclasses.replace(beside, system="win32", adapters=(warp,))).usable
    alone = webgpu(dataclasses.replace(BARE, system="win32", adapters=(warp,)))
    assert not alone.usable and "Microsoft Basic Render Driver (says Windows)" in alone.advice


def test_the_probe_is_one_addition_in_float16() -> None:
    kind = TensorProto.FLOAT16
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", kind, [4])],
        [helper.make_tensor_value_info("y", kind, [4])],
    )
    made = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    assert onnx.ModelProto.FromString(float16_probe.MODEL) == made
    session = ort.InferenceSession(float16_probe.MODEL, providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": np.ones(4, np.float16)})[0].tolist() == [2, 2, 2, 2]


def test_a_library_that_does_not_load_says_nothing() -> None:
    assert float16_probe.computes_float16("NoExecutionProvider", "/nothing.so") is None


@pytest.mark.webgpu
@pytest.mark.skipif(not PLUGIN_FOLDER, reason="QWEN_EDGE_WEBGPU does not name the plug-in's folder")
@pytest.mark.parametrize(
    ("driver", "has"), [(LAVAPIPE, True), (SWIFTSHADER, False)], ids=["lavapipe", "swiftshader"]
)
def test_the_real_webgpu_is_asked(driver: Path, has: bool) -> None:
    """Through `qwen-run devices`."""
    if not driver.exists():
        pytest.skip(f"no {driver}")
    assert PLUGIN_FOLDER is not None
    path = os.pathsep.join([PLUGIN_FOLDER, *filter(None, [os.environ.get("PYTHONPATH")])])
    chosen = dict.fromkeys(("VK_DRIVER_FILES", "VK_ICD_FILENAMES"), str(driver))
    environment = {**os.environ, **chosen, "PYTHONPATH": path, "ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER": "1"}
    command = [sys.executable, "-c", "from qwen_runtime.cli import main; main()", "devices"]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    line = next(line for line in shown.splitlines() if line.startswith("WebGPU"))
    assert "usable" in line and ("no float16 (found by a run)" in line) == (not has)
