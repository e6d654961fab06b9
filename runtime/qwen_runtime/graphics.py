"""What the system's graphics interface runs on: a GPU, or software that computes on the CPU.

A machine may have a GPU and no driver for it. Then Vulkan lists Mesa's llvmpipe, Chromium's SwiftShader or
nothing, and Direct3D Microsoft's WARP. PCI ids do not tell of that.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_SECONDS = 30
_SOFTWARE_ON_WINDOWS = re.compile("Microsoft (Basic Render|Basic Display)", re.IGNORECASE)  # WARP


@dataclass(frozen=True)
class Adapter:
    """One adapter.

    Attributes:
        software: it computes on the CPU.
        float16: whether shaders compute float16; None where `source` does not say.
        source: what says so: "vulkaninfo", or "Windows" for its list of display adapters.
    """

    name: str
    software: bool
    float16: bool | None
    source: str


def vulkan_adapters() -> list[Adapter]:
    """Those that the Vulkan tool vulkaninfo lists; [] where it is not installed or fails."""
    if (tool := shutil.which("vulkaninfo")) is None:
        return []
    try:
        done = subprocess.run([tool], capture_output=True, text=True, errors="replace", timeout=_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return []
    return vulkaninfo_adapters(done.stdout)


def vulkaninfo_adapters(text: str) -> list[Adapter]:
    """From what vulkaninfo prints. WebGPU wants both of Vulkan's features for its shader-f16."""
    found = []
    for device in re.split(r"^GPU\d+:$", text, flags=re.MULTILINE)[1:]:
        facts = dict(re.findall(r"^\s*(\w+)\s*= (.+)$", device, flags=re.MULTILINE))
        if "deviceName" in facts:
            needed = {facts.get(name) for name in ("shaderFloat16", "storageBuffer16BitAccess")}
            software = facts.get("deviceType") == "PHYSICAL_DEVICE_TYPE_CPU"
            found.append(Adapter(facts["deviceName"].strip(), software, needed == {"true"}, "vulkaninfo"))
    return found


def windows_adapters(entries: Sequence[Mapping[str, str | None]]) -> list[Adapter]:
    """From Windows' display adapters: those of its own software renderer."""
    names = [entry.get("Name") or "" for entry in entries]
    return [Adapter(name, True, None, "Windows") for name in names if _SOFTWARE_ON_WINDOWS.search(name)]
