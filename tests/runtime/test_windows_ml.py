"""Providers that Windows offers: listed, used where they are on the machine, fetched only when asked for."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import CliRunner
from qwen_common.errors import UserError
from qwen_common.providers import PROVIDERS
from qwen_runtime import windows_ml
from qwen_runtime.cli import main
from qwen_runtime.devices import Device, Machine, providers
from qwen_runtime.provider import load_first

from tests.support import fake_windowsml
from tests.support.fake_windowsml import EpReadyState, ExecutionProvider

# As Microsoft's page spells it; ONNX Runtime's plug-in says NvTensorRTRTXExecutionProvider.
RTX = "NvTensorRtRtxExecutionProvider"
GEFORCE = Device("gpu", "NVIDIA GeForce RTX 5080", "10de:2c02", 16 * 10**9)
DESKTOP = Machine("win32", "some CPU", frozenset(), 10**10, (GEFORCE,))


class FakeGenAI:
    """Stands for ONNX Runtime GenAI's registration of plug-ins."""

    def __init__(self) -> None:
        self.registered: list[tuple[str, str]] = []

    def register_execution_provider_library(self, name: str, path: str) -> None:
        self.registered.append((name, path))

    def is_cuda_available(self) -> bool:
        return False

    is_dml_available = is_cuda_available


@pytest.fixture
def fake_catalogue(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ExecutionProvider]]:
    """A Windows with `windowsml` installed; the test fills its catalogue."""
    monkeypatch.setitem(sys.modules, "windowsml", fake_windowsml)
    monkeypatch.setattr(fake_windowsml, "CATALOGUE", [])
    monkeypatch.setattr("qwen_runtime.plugins._registered", set())
    windows_ml._catalogue.cache_clear()
    yield fake_windowsml.CATALOGUE
    windows_ml._catalogue.cache_clear()


@pytest.mark.parametrize("state", [EpReadyState.Ready, EpReadyState.NotReady], ids=lambda s: s.name)
def test_a_provider_of_the_system_is_registered(state: Any, fake_catalogue: list[ExecutionProvider]) -> None:
    """One that is on the machine and that this process has yet to be given is made ready, not downloaded."""
    fake_catalogue.append(ExecutionProvider(RTX, state))
    library = FakeGenAI()
    choice, _ = load_first("auto", "nvtensorrtrtx", library, str.upper)
    assert choice.reason == "TensorRT-RTX: the artifact was made for it"
    assert library.registered == [("NvTensorRTRTXExecutionProvider", f"C:\\WindowsApps\\{RTX}.dll")]
    assert fake_catalogue[0].calls == ([] if state == EpReadyState.Ready else ["ensure_ready"])


def test_nothing_is_downloaded_unasked(fake_catalogue: list[ExecutionProvider]) -> None:
    fake_catalogue.append(ExecutionProvider(RTX, EpReadyState.NotPresent))
    choice, _ = load_first("auto", "nvtensorrtrtx", FakeGenAI(), str.upper)
    assert choice.name == "cpu" and "TensorRT-RTX is not in this install" in choice.reason
    with pytest.raises(UserError, match="TensorRT-RTX is not in this install: pip install"):
        load_first("nvtensorrtrtx", "cpu", FakeGenAI(), str.upper)
    advice = next(item.advice for item in providers(DESKTOP, FakeGenAI()) if item.name == "nvtensorrtrtx")
    assert advice.startswith("Windows offers it: qwen-run devices --get nvtensorrtrtx; or pip install ")
    assert fake_catalogue[0].calls == []


def test_devices_lists_the_catalogue_and_fetches_what_is_asked_for(
    fake_catalogue: list[ExecutionProvider],
) -> None:
    fake_catalogue += [
        ExecutionProvider(RTX, EpReadyState.NotPresent),
        ExecutionProvider("VitisAIExecutionProvider", EpReadyState.NotPresent),  # not one of ours
    ]
    shown = CliRunner().invoke(main, ["devices"])
    assert f"Windows ML    offers {RTX} 1.8.69.0: not present" in shown.stdout
    assert fake_catalogue[0].calls == []
    shown = CliRunner().invoke(main, ["devices", "--get", "nvtensorrtrtx", "--json"])
    assert shown.exit_code == 0
    assert json.loads(shown.stdout)["windows_ml"] == [
        {"name": RTX, "version": "1.8.69.0", "state": "ready"},
        {"name": "VitisAIExecutionProvider", "version": "1.8.69.0", "state": "not present"},
    ]
    assert [entry.calls for entry in fake_catalogue] == [["ensure_ready"], []]
    assert "Windows is asked for TensorRT-RTX" in shown.stderr and "100%" in shown.stderr


def test_what_windows_cannot_do_is_said(fake_catalogue: list[ExecutionProvider]) -> None:
    with pytest.raises(UserError, match=r"^Windows does not offer AMDGPU here$"):
        windows_ml.download(PROVIDERS["amdgpu"], print)
    fake_catalogue.append(ExecutionProvider(RTX, EpReadyState.NotPresent, fails=True))
    shown = CliRunner().invoke(main, ["devices", "--get", "nvtensorrtrtx"])
    assert shown.exit_code == 2
    assert "Windows could not install TensorRT-RTX: " in shown.stderr and "cannot be started" in shown.stderr


def test_without_the_package() -> None:
    """This machine is no Windows."""
    windows_ml._catalogue.cache_clear()
    assert windows_ml.system_providers() == [] and not windows_ml.is_installed()
    shown = CliRunner().invoke(main, ["devices", "--get", "openvino"])
    assert shown.exit_code == 2
    assert "its catalogue needs Windows 11 24H2 and pip install windowsml" in shown.stderr
    advice = {item.name: item.advice for item in providers(DESKTOP, FakeGenAI())}
    assert advice["nvtensorrtrtx"].endswith("or pip install windowsml, with which Windows may offer it")
    linux = dataclasses.replace(DESKTOP, system="linux")
    assert "windowsml" not in "".join(item.advice for item in providers(linux, FakeGenAI()))
