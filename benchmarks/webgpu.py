"""WebGPU on a GPU: rates of both lowerings, dense and mixture of experts, beside the builder's.

    pip install onnxruntime-ep-webgpu
    python -m benchmarks.webgpu [--sizes 0.8B "35B-A3B, 2 layers"] [--builder] [--rounds 5] [--json F]

The graphics device is named first. NO GPU HAS RUN IT YET: on a software device, which it takes where
ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER=1 is set, its figures say nothing of a GPU's, and the output says so.
`--sizes tiny` is the trained checkpoint's geometry, for a software device.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from qwen_common.providers import PROVIDERS
from qwen_runtime import plugins
from qwen_runtime.graphics import vulkan_adapters
from rich.console import Console
from rich.table import Table

from benchmarks.cuda import lowerings, options, peers
from benchmarks.decode import PROMPT, SPEEDS, measure, spread
from benchmarks.geometry import GEOMETRIES
from benchmarks.support.checkpoints import TINY

PROFILE = "webgpu"
# The peers' prompts have ids of up to 100,000.
GEOMETRIES["tiny"] = {**json.loads((TINY / "config.json").read_text()), "vocab_size": 100_352}


def device() -> str:
    """What runs the graphs, in words; "" where the plug-in finds nothing."""
    provider = PROVIDERS["webgpu"]
    if not plugins.is_here(provider) or not plugins.devices(provider):
        return ""
    adapters = vulkan_adapters()
    if adapters and all(adapter.software for adapter in adapters):
        return f"SOFTWARE DEVICE {adapters[0].name}: no figure below says anything of a GPU"
    return adapters[0].name if adapters else "a device that Vulkan's vulkaninfo does not name"


def main() -> None:
    asked = options(__doc__, ["0.8B", "35B-A3B, 2 layers"]).parse_args()
    name = device()
    if not name:
        sys.exit("WebGPU finds no device here: pip install onnxruntime-ep-webgpu, and a driver for Vulkan")
    results: dict[str, Any] = {"device": name}
    table = Table("size", "peer", "MB", "prefill tok/s", "decode tok/s")
    with tempfile.TemporaryDirectory() as folder:
        for size in asked.sizes:
            found = peers(size, lowerings(PROFILE), asked, Path(folder, size), plugin="webgpu")
            measure(found, PROMPT, asked.rounds)
            for peer in found:
                assert peer.bytes
                speeds = {speed: [turn[speed] for turn in peer.turns] for speed in SPEEDS}
                results[f"{peer.name}, {size}"] = {"bytes": peer.bytes, **speeds}
                cells = [spread(values) for values in speeds.values()]
                table.add_row(size, peer.name, f"{peer.bytes / 1e6:.0f}", *cells)
    console = Console(width=130)
    console.print(name)
    console.print(table)
    if asked.json:
        asked.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
