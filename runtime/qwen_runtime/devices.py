"""What this machine has, what of it can run an artifact, and what is missing for the rest."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from qwen_common.providers import APPLE, PCI_VENDORS, PROVIDERS, Provider
from qwen_profiles.reading import profile_names, read_fields, shipped_text

from qwen_runtime import plugins, windows_ml
from qwen_runtime.float16_probe import computes_float16
from qwen_runtime.graphics import Adapter, vulkan_adapters, windows_adapters
from qwen_runtime.provider import cause, is_available

_PCI = Path("/sys/bus/pci/devices")
_DISPLAY, _ACCELERATOR = "0x03", "0x12"  # PCI base classes
_WINDOWS_QUERY = """
$v = Get-CimInstance Win32_VideoController | Select-Object Name, PNPDeviceID, AdapterRAM
$n = Get-CimInstance Win32_PnPEntity -Filter "PNPClass='ComputeAccelerator'" | Select-Object Name, PNPDeviceID
ConvertTo-Json @{gpu = @($v); npu = @($n)}
"""


@dataclass(frozen=True)
class Device:
    """A graphics device or NPU.

    Attributes:
        kind: "gpu" or "npu".
        pci: `vendor:device`, four hexadecimal digits each; "apple:" for Apple's.
        memory_bytes: of its own; None where it shares the machine's, or that is not known.
    """

    kind: str
    name: str
    pci: str
    memory_bytes: int | None = None

    @property
    def vendor(self) -> str:
        return self.pci.partition(":")[0]


@dataclass(frozen=True)
class Machine:
    """One computer, as far as it matters here.

    Attributes:
        system: as sys.platform has it.
        cpu_flags: instruction sets, as Linux's /proc/cpuinfo calls them.
        adapters: what Vulkan or Direct3D runs on, as far as that is known; of Windows the software ones.
    """

    system: str
    cpu: str
    cpu_flags: frozenset[str]
    memory_bytes: int
    devices: tuple[Device, ...]
    adapters: tuple[Adapter, ...] = ()


@dataclass(frozen=True)
class Usable:
    """One execution provider here.

    Attributes:
        advice: the one thing to do where it is not usable; "" where it is.
        note: what to know where it is; "" for nothing.
        sources: what may have it on this system: a package, an environment variable, a place, Windows.
    """

    name: str
    title: str
    usable: bool
    advice: str
    note: str = ""
    sources: tuple[str, ...] = ()


def find_machine() -> Machine:
    """This machine."""
    # Windows tells of AVX2, but not of AVX-512's parts, which py-cpuinfo asks the processor for.
    import cpuinfo

    info = cpuinfo.get_cpu_info()
    devices, adapters = _FOUND_BY.get(sys.platform, lambda: ([], []))()
    return Machine(
        system=sys.platform,
        cpu=info.get("brand_raw", platform.machine()),
        cpu_flags=frozenset(map(_linux_name, info.get("flags", ()))),
        memory_bytes=psutil.virtual_memory().total,
        devices=tuple(devices),
        adapters=tuple(adapters),
    )


def _linux_name(flag: str) -> str:
    """py-cpuinfo reads the processor itself where there is no /proc/cpuinfo, and leaves underscores out."""
    return re.sub("^avx512(?=vnni|bitalg|vbmi2|vpopcntdq)", "avx512_", flag)


def linux_devices(root: Path = _PCI) -> list[Device]:
    """Graphics devices and accelerators of a tree such as /sys/bus/pci/devices."""
    found = []
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        try:
            kind, vendor, device = (
                (folder / name).read_text().strip() for name in ("class", "vendor", "device")
            )
        except OSError:
            continue
        if not kind.startswith((_DISPLAY, _ACCELERATOR)) or vendor.removeprefix("0x") not in PCI_VENDORS:
            continue  # a virtual screen, say
        pci = f"{vendor.removeprefix('0x')}:{device.removeprefix('0x')}"
        memory = folder / "mem_info_vram_total"  # amdgpu
        found.append(
            Device(
                kind="gpu" if kind.startswith(_DISPLAY) else "npu",
                name=f"{PCI_VENDORS[pci[:4]]} {pci}",
                pci=pci,
                memory_bytes=int(memory.read_text()) if memory.is_file() else None,
            )
        )
    return found


def _on_windows() -> tuple[list[Device], list[Adapter]]:
    command = ["powershell", "-NoProfile", "-NonInteractive", "-Command", _WINDOWS_QUERY]
    try:
        # Its encoding is the console's, whatever Python's own is.
        answer = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=60, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        answer = ""
    found = windows_devices(answer), windows_adapters(_listed(answer, "gpu"))
    return found if any(found) else ([], vulkan_adapters())


def _listed(answer: str, kind: str) -> list[dict[str, Any]]:
    """Entries of one kind in PowerShell's answer; none where it is no such answer: Wine's prints nothing."""
    try:
        found = json.loads(answer)
    except ValueError:
        return []
    entries = found.get(kind) if isinstance(found, dict) else None
    return [entry for entry in entries or () if isinstance(entry, dict)]


def windows_devices(answer: str) -> list[Device]:
    """Devices from PowerShell's answer to the query above."""
    found = []
    for kind in ("gpu", "npu"):
        for entry in _listed(answer, kind):
            match = re.search(r"VEN_([0-9A-F]{4})&DEV_([0-9A-F]{4})", entry.get("PNPDeviceID") or "")
            if match and match[1].lower() in PCI_VENDORS:
                pci = f"{match[1]}:{match[2]}".lower()
                found.append(Device(kind, entry.get("Name") or pci, pci, entry.get("AdapterRAM")))
    return found


def _apple_devices() -> list[Device]:
    return [Device("gpu", "Apple GPU", f"{APPLE}:")] if platform.machine() == "arm64" else []


_FOUND_BY: dict[str, Callable[[], tuple[list[Device], list[Adapter]]]] = {
    "linux": lambda: (linux_devices(), vulkan_adapters()),
    "win32": _on_windows,
    "darwin": lambda: (_apple_devices(), []),
}


def providers(machine: Machine, og: Any) -> list[Usable]:
    """Every execution provider, and whether it can be used on `machine` with this install.

    Args:
        og: the module onnxruntime_genai.
    """
    found = []
    for name, provider in PROVIDERS.items():
        advice = _obstacle(provider, machine, og)
        note = "" if advice else _note(provider, machine)
        found.append(
            Usable(name, provider.title, not advice, advice, note, _sources(provider, machine.system))
        )
    return found


def _obstacle(provider: Provider, machine: Machine, og: Any) -> str:
    """What there is to do before the provider can be used; "" for nothing."""
    if provider.systems is not None and machine.system not in provider.systems:
        return f"not on {machine.system}"
    software = _only_software(provider, machine)
    if software is not None and not _is_set(provider.software_variable):
        setting = provider.software_variable
        test = f"; to test with it all the same, set {setting}=1" if setting else ""
        return (
            f"only a software adapter here, {software.name} (says {software.source}), which computes on the "
            f"CPU: install the graphics driver, or take the CPU provider{test}"
        )
    if provider.vendors is not None and not software and not _has_device_of(provider, machine):
        return "no device here that it runs on"
    if not is_available(provider, og):
        return _how_to_get(provider, machine.system)
    if provider.plugin is None:
        return ""
    try:
        found = plugins.devices(provider)
    except Exception as error:  # whatever ONNX Runtime, a package or Windows says of a library
        return f"its library does not load: {cause(error)}"
    return "" if found else "its plug-in finds no device here"


def _note(provider: Provider, machine: Machine) -> str:
    """What to know of a provider that can be used; "" for nothing."""
    notes = []
    if software := _only_software(provider, machine):
        notes.append(f"on the CPU, by {software.name} (says {software.source}): slower than the CPU provider")
    if provider.float16_varies:
        found = computes_float16(provider.onnxruntime_name, plugins.library(provider))
        if found is False:
            notes.append("no float16 (found by a run): export with --set activation_dtype=float32")
    return "; ".join(notes)


def _has_device_of(provider: Provider, machine: Machine) -> bool:
    return provider.vendors is not None and any(d.vendor in provider.vendors for d in machine.devices)


def _only_software(provider: Provider, machine: Machine) -> Adapter | None:
    """The software adapter that is all that a provider for GPUs of any vendor would find."""
    any_gpu = provider.vendors is not None and provider.vendors >= PCI_VENDORS.keys()
    if not any_gpu or any(not adapter.software for adapter in machine.adapters):
        return None
    if any(adapter.source == "Windows" for adapter in machine.adapters) and _has_device_of(provider, machine):
        return None  # Windows lists its own beside the GPU's
    return next(iter(machine.adapters), None)


def _is_set(variable: str | None) -> bool:
    return variable is not None and os.environ.get(variable) == "1"


def _how_to_get(provider: Provider, system: str) -> str:
    if not provider.in_catalogue or system != "win32":
        return provider.advice
    if windows_ml.offered(provider):
        return f"Windows offers it: qwen-run devices --get {provider.key}; or {provider.advice}"
    if windows_ml.is_installed():
        return provider.advice
    return f"{provider.advice}; or pip install {windows_ml.PACKAGE}, with which Windows may offer it"


def _sources(provider: Provider, system: str) -> tuple[str, ...]:
    found = [provider.package]
    if provider.variable:
        found.append(f"environment variable {provider.variable}")
    if name := provider.beside_onnxruntime.get(system):
        found.append(f"{name} beside onnxruntime")
    if provider.in_catalogue and system == "win32":
        found.append(f"Windows ML's catalogue, through {windows_ml.PACKAGE}")
    return tuple(found)


def fitting_profiles(machine: Machine) -> list[str]:
    """Names of the shipped profiles whose hardware this is, those that tell it most closely first.

    A name of a processor says nothing of graphics that are not there, as in a virtual machine: a profile for
    them needs a device that its provider runs on.
    """
    fields = {name: read_fields(name, shipped_text(name)) for name in profile_names()}
    recognise = {name: found["hardware"].get("recognise", {}) for name, found in fields.items()}
    fitting = [
        name
        for name, found in fields.items()
        if _has_device_for(found, machine) and _fits(recognise[name], machine)
    ]
    # A name or an id says more than instruction sets, and more of these say more than fewer.
    return sorted(
        fitting,
        key=lambda name: (not _named(recognise[name]), -len(recognise[name].get("cpu_flags", ())), name),
    )


def _has_device_for(fields: Mapping[str, Any], machine: Machine) -> bool:
    vendors = PROVIDERS[fields["provider"]].vendors
    return vendors is None or any(
        device.kind == fields["device"] and device.vendor in vendors for device in machine.devices
    )


def _named(patterns: Mapping[str, Any]) -> bool:
    return any(patterns.get(key) for key in ("cpu", "gpu", "pci"))


def _fits(patterns: Mapping[str, Any], machine: Machine) -> bool:
    """As `Recognise` in qwen_profiles.schema says."""
    flags = set(patterns.get("cpu_flags", ()))
    if not flags <= machine.cpu_flags:
        return False
    if not _named(patterns):
        return bool(flags)
    names = {
        "cpu": [machine.cpu],
        "gpu": [device.name for device in machine.devices if device.kind == "gpu"],
    }
    by_name = any(
        re.search(pattern, name, re.IGNORECASE)
        for key, candidates in names.items()
        for pattern in patterns.get(key, ())
        for name in candidates
    )
    ids = {wanted for device in machine.devices for wanted in (device.pci, f"{device.vendor}:*")}
    return by_name or not ids.isdisjoint(patterns.get("pci", ()))
