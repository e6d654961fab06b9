"""What `qwen-run devices` makes of a machine. Hardware that is not here is described, not mocked."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import onnxruntime_genai as og
import pytest
from qwen_common.providers import PROVIDERS
from qwen_runtime.devices import (
    Device,
    Machine,
    find_machine,
    fitting_profiles,
    linux_devices,
    providers,
    windows_devices,
)

RADEON = Device("gpu", "AMD Radeon(TM) 8060S Graphics", "1002:1586")
STRIX_HALO = Machine(
    "win32", "AMD RYZEN AI MAX+ 395 w/ Radeon 8060S", frozenset({"avx2", "avx512f"}), 128 * 10**9, (RADEON,)
)
GEFORCE = Device("gpu", "NVIDIA 10de:2684", "10de:2684", 24 * 10**9)
WORKSTATION = Machine("linux", "Some CPU", frozenset({"avx2"}), 64 * 10**9, (GEFORCE,))
MINI_PC = Machine("linux", "Intel(R) N100", frozenset({"avx2"}), 8 * 10**9, ())


class FakeGenAI:
    """Stands for an onnxruntime_genai built with providers that this machine does not have."""

    def __init__(self, *available: str) -> None:
        for name in ("cuda", "dml"):
            setattr(self, f"is_{name}_available", lambda name=name: name in available)


def test_profiles_that_tell_a_machine_most_closely_come_first() -> None:
    assert fitting_profiles(STRIX_HALO)[0] == "strix-halo"
    assert fitting_profiles(MINI_PC)[0] == "intel-n100"
    assert "cpu-avx2" in fitting_profiles(MINI_PC)
    assert "strix-halo" not in fitting_profiles(WORKSTATION)


@pytest.mark.parametrize(
    "cpu,pci,flags,best",
    [
        ("Intel(R) Core(TM) Ultra 7 258V", "8086:64a0", {"avx2"}, "intel-lunar-lake"),
        ("Intel(R) Core(TM) Ultra 7 155H", "8086:7d55", {"avx2"}, "intel-meteor-lake"),
        ("AMD RYZEN AI MAX+ 395 w/ Radeon 8060S", "1002:1586", {"avx512f", "avx512_vnni"}, "strix-halo"),
    ],
)
def test_profiles_for_graphics_need_them(cpu: str, pci: str, flags: set[str], best: str) -> None:
    """A virtual machine has the processor's name alone, and perhaps somebody else's graphics."""
    whole = Machine("linux", cpu, frozenset(flags), 32 * 10**9, (Device("gpu", "graphics", pci),))
    assert fitting_profiles(whole)[0] == best
    vendor = pci[:4]
    for others in ((), (Device("npu", "an NPU", f"{vendor}:7d1d"),), (GEFORCE,)):
        found = fitting_profiles(dataclasses.replace(whole, devices=others))
        assert best not in found
        assert any(name.startswith("cpu-") for name in found)


@pytest.mark.parametrize(
    "machine,library,expected",
    [
        (STRIX_HALO, FakeGenAI(), {"cpu": "", "dml": PROVIDERS["dml"].advice}),
        (STRIX_HALO, FakeGenAI("dml"), {"dml": "", "cuda": "no device here that it runs on"}),
        (WORKSTATION, FakeGenAI(), {"cuda": "pip install onnxruntime-genai-cuda", "dml": "not on linux"}),
        (WORKSTATION, FakeGenAI("cuda"), {"cuda": "", "openvino": "no device here that it runs on"}),
        (MINI_PC, FakeGenAI("cuda"), {"cpu": "", "cuda": "no device here that it runs on"}),
    ],
)
def test_providers(machine: Machine, library: FakeGenAI, expected: dict[str, str]) -> None:
    found = {item.name: item for item in providers(machine, library)}
    for name, advice in expected.items():
        assert found[name].advice == advice and found[name].usable == (not advice)


def test_linux_devices(tmp_path: Path) -> None:
    """A Radeon with memory of its own, an NPU, a virtual screen, a network card."""
    tree = {
        "0000:c5:00.0": ("0x030000", "0x1002", "0x1586"),
        "0000:c6:00.1": ("0x120000", "0x8086", "0x7d1d"),
        "0000:00:02.0": ("0x030000", "0x1af4", "0x1050"),
        "0000:00:03.0": ("0x020000", "0x8086", "0x15f3"),
    }
    for place, values in tree.items():
        (tmp_path / place).mkdir()
        for name, value in zip(("class", "vendor", "device"), values, strict=True):
            (tmp_path / place / name).write_text(value + "\n")
    (tmp_path / "0000:c5:00.0" / "mem_info_vram_total").write_text("103079215104\n")
    assert linux_devices(tmp_path) == [
        Device("gpu", "AMD 1002:1586", "1002:1586", 103079215104),
        Device("npu", "Intel 8086:7d1d", "8086:7d1d"),
    ]
    assert linux_devices(tmp_path / "nothing") == []


def test_windows_devices() -> None:
    answer = {
        "gpu": [
            {"Name": RADEON.name, "PNPDeviceID": r"PCI\VEN_1002&DEV_1586&SUBSYS_1", "AdapterRAM": 4293918720},
            {"Name": "Microsoft Basic Display Adapter", "PNPDeviceID": r"ROOT\BASIC", "AdapterRAM": None},
        ],
        "npu": [{"Name": "Intel(R) AI Boost", "PNPDeviceID": r"PCI\VEN_8086&DEV_7D1D&SUBSYS_2"}],
    }
    assert windows_devices(json.dumps(answer)) == [
        Device("gpu", RADEON.name, "1002:1586", 4293918720),
        Device("npu", "Intel(R) AI Boost", "8086:7d1d", None),
    ]


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "\n",
        "Get-CimInstance : Access denied",
        "null",
        "[]",
        '"x"',
        "{}",
        '{"gpu": null, "npu": [null, "x", {}]}',
    ],
)
def test_an_answer_that_lists_nothing(answer: str) -> None:
    """Wine's PowerShell prints nothing."""
    assert windows_devices(answer) == []


def test_instruction_sets_have_their_names_on_linux_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """What py-cpuinfo finds on Windows, from the processor itself: the profile for AVX-512 is found there."""
    found = {"brand_raw": "AMD Ryzen 9 9950X", "flags": ["avx2", "avx512f", "avx512vl", "avx512vnni"]}
    monkeypatch.setattr("cpuinfo.get_cpu_info", lambda: found)
    machine = find_machine()
    assert machine.cpu_flags == {"avx2", "avx512f", "avx512vl", "avx512_vnni"}
    assert "cpu-avx512" in fitting_profiles(machine)


def test_this_machine() -> None:
    machine = find_machine()
    assert machine.system == sys.platform and machine.cpu and machine.memory_bytes > 10**9
    assert next(item for item in providers(machine, og) if item.name == "cpu").usable


def test_command() -> None:
    command = [sys.executable, "-c", "from qwen_runtime.cli import main; main()", "devices"]
    shown = subprocess.check_output(command, text=True)
    assert "usable" in shown and shown.splitlines()[-1].startswith("profiles")
    found = json.loads(subprocess.check_output([*command, "--json"], text=True))
    assert {item["name"] for item in found["providers"]} >= {"cpu", "cuda", "dml"}
