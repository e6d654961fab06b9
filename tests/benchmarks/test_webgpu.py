"""benchmarks/webgpu.py where there is no device, and with a software one."""

from __future__ import annotations

import sys

import pytest
from qwen_runtime.graphics import Adapter

from benchmarks import webgpu


def test_without_a_device_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["webgpu"])
    monkeypatch.setattr(webgpu.plugins, "is_here", lambda provider: False)
    with pytest.raises(SystemExit, match="pip install onnxruntime-ep-webgpu"):
        webgpu.main()


def test_a_software_device_is_named_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webgpu.plugins, "is_here", lambda provider: True)
    monkeypatch.setattr(webgpu.plugins, "devices", lambda provider: ["a device"])
    software = Adapter("llvmpipe", True, True, "vulkaninfo")
    monkeypatch.setattr(webgpu, "vulkan_adapters", lambda: [software])
    assert webgpu.device().startswith("SOFTWARE DEVICE llvmpipe")
