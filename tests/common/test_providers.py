"""One record for each execution provider: everybody's facts about one come from it."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from qwen_common.errors import UserError
from qwen_common.providers import AMD, PCI_VENDORS, PROVIDERS, Provider, named
from qwen_export.backends.onnx import kernels
from qwen_export.graph.targets import FUSED, PORTABLE, target_for
from qwen_export.inspection import inspect
from qwen_profiles.reading import profile_names
from qwen_profiles.schema import load_profile
from qwen_runtime.devices import Device, Machine, providers
from qwen_runtime.provider import load_first

PRETEND = Provider(
    key="pretend",
    title="Pretend",
    onnxruntime_name="PretendExecutionProvider",
    genai_name="Pretend",
    package="onnxruntime-genai-pretend",
    probe="is_pretend_available",
    systems=frozenset({"linux"}),
    vendors=frozenset({AMD}),
    lowerings=frozenset({"portable"}),
)
COMMANDS = """
import sys
from qwen_common import providers
providers.PROVIDERS["pretend"] = providers.Provider(
    "pretend", "Pretend", "PretendExecutionProvider", "Pretend", "onnxruntime-genai-pretend"
)
from qwen_export.cli import main as export
from qwen_runtime.cli import main as run
(export if sys.argv.pop(1) == "export" else run)()
"""


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Provider:
    """A provider more, as whoever adds one writes it: a record, and a table of kernels."""
    monkeypatch.setitem(PROVIDERS, "pretend", PRETEND)
    monkeypatch.setitem(kernels.KERNELS, "pretend", kernels.KERNELS["dml"])
    return PRETEND


def test_every_provider_has_a_record_and_an_entry_among_the_kernels() -> None:
    assert list(kernels.KERNELS) == list(PROVIDERS)
    assert list(PROVIDERS) == [provider.key for provider in PROVIDERS.values()]
    for provider in PROVIDERS.values():
        assert provider.vendors is None or provider.vendors <= {*PCI_VENDORS, "apple"}
        assert provider.lowerings and provider.lowerings <= {FUSED.name, PORTABLE.name}
        assert provider.probe is None or provider.plugin is None
        taken = [requirement.partition(">")[0] for requirement in provider.replaces.values()]
        if provider.key not in ("cpu", "amdgpu"):  # PyPI has no AMDGPU
            assert provider.package in taken and provider.package in provider.advice
        if provider.variable:
            assert provider.variable in provider.advice
    used = {load_profile(name).provider for name in profile_names()}
    assert used <= PROVIDERS.keys()


def test_lowerings_ask_for_what_their_providers_need() -> None:
    assert PORTABLE.zero_points_required and PORTABLE.exact_blocks  # DirectML's kernels
    assert not FUSED.zero_points_required and not FUSED.exact_blocks
    assert {key: target_for("fused", key).silu_inside for key in PROVIDERS} == {
        key: key != "cpu" for key in PROVIDERS
    }
    with pytest.raises(dataclasses.FrozenInstanceError):
        PROVIDERS["cpu"].title = "x"  # type: ignore[misc]


def test_another_provider_in_profiles(pretend: Provider) -> None:
    assert load_profile("strix-halo", ["provider=pretend", "lowering=portable"]).provider == "pretend"
    with pytest.raises(
        UserError, match="pretend has no kernels for lowering fused: set lowering to portable"
    ):
        load_profile("cpu", ["provider=pretend"])
    with pytest.raises(UserError) as raised:
        load_profile("cpu", ["provider=tpu"])
    message = (
        "Input should be 'cpu', 'cuda', 'amdgpu', 'dml', 'webgpu', 'mlx', 'openvino', 'nvtensorrtrtx' "
        "or 'pretend'"
    )
    assert str(raised.value) == f"profile 'cpu', field 'provider': {message}"


class Library:
    """Stands for an onnxruntime_genai built with the providers that `available` names."""

    def __init__(self, *available: str) -> None:
        for name in ("cuda", "dml", "pretend"):
            setattr(self, f"is_{name}_available", lambda name=name: name in available)


def test_another_provider_among_devices(pretend: Provider) -> None:
    radeon = Device("gpu", "AMD Radeon", "1002:1586")
    machine = Machine("linux", "some CPU", frozenset(), 10**10, (radeon,))

    def advice(machine: Machine, library: Library) -> str:
        return next(item.advice for item in providers(machine, library) if item.name == "pretend")

    assert advice(machine, Library("pretend")) == ""
    assert advice(machine, Library()) == "pip install onnxruntime-genai-pretend"
    assert advice(dataclasses.replace(machine, system="win32"), Library()) == "not on win32"
    assert advice(dataclasses.replace(machine, devices=()), Library()) == "no device here that it runs on"


def test_another_provider_is_tried(pretend: Provider) -> None:
    choice, loaded = load_first("auto", "pretend", Library("pretend"), str.upper)
    assert (choice.name, loaded) == ("pretend", "PRETEND")
    assert choice.reason == "Pretend: the artifact was made for it"
    choice, _ = load_first("auto", "pretend", Library(), str.upper)
    assert choice.reason == "CPU: Pretend is not in this install (onnxruntime-genai-pretend has it)"


def test_another_provider_in_inspect(pretend: Provider, cpu_artifact: Path) -> None:
    found = inspect(cpu_artifact)["providers"]
    assert list(found) == list(PROVIDERS)
    assert found["pretend"] == found["dml"] and "LinearAttention" in found["pretend"]["missing"]


@pytest.mark.parametrize(
    "arguments",
    [("run", "answer"), ("run", "serve"), ("run", "bench"), ("export", "verify")],
    ids=" ".join,
)
def test_another_provider_in_help(arguments: tuple[str, str]) -> None:
    command = [sys.executable, "-c", COMMANDS, *arguments, "--help"]
    shown = " ".join(subprocess.check_output(command, text=True).split())
    assert "pretend" in shown and all(key in shown for key in PROVIDERS)


def test_another_provider_in_the_devices_command() -> None:
    command = [sys.executable, "-c", COMMANDS, "run", "devices", "--json"]
    found = json.loads(subprocess.check_output(command, text=True))
    assert found["providers"][-1] == {
        "name": "pretend",
        "title": "Pretend",
        "usable": True,
        "advice": "",
        "note": "",
        "sources": ["onnxruntime-genai-pretend"],
    }


def test_a_provider_is_found_by_its_key_and_by_genais_name() -> None:
    for provider in PROVIDERS.values():
        assert named(provider.key) is provider
        assert provider.genai_name is None or named(provider.genai_name) is provider
    assert named("WebGpuExecutionProvider") is None
