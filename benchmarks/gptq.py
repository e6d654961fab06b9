"""Time, processor time and peak memory of GPTQ or GPTAQ for one layer of a published geometry.

    python -m benchmarks.gptq [--compression gptq] [--size 27B] [--attention] [--half] [--samples 64]
                              [--json gptq.json]

Weights and text are random, made in memory; the codes are written to a file that is thrown away. The layer is
one of Gated DeltaNet unless `--attention` asks for the other kind. `--half` halves hidden sizes and
numbers of heads and experts, for a quick look. Seconds are told by what they were spent on. The forward
passes have all the others in them, and codes are made in threads, so that the parts add up to more than the
whole.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from qwen_export import reference
from qwen_export.backends.onnx import artifact, stream
from qwen_export.backends.onnx.graphs import build_graphs
from qwen_export.quantize import calibrated_codes, gptq
from qwen_profiles.schema import load_profile

from benchmarks.export import peak_bytes
from benchmarks.geometry import GEOMETRIES, generated_checkpoint
from benchmarks.support.artifacts import Quiet

_HALVED = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "num_experts",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
)
_VOCABULARY = 512
_PARTS = {
    "forward pass": (reference, "layer"),
    "products": (gptq, "add_products"),
    "what is missed": (calibrated_codes, "missed"),
    "factors": (calibrated_codes, "compensation"),
    "codes": (calibrated_codes, "quantize"),
}


def one_layer(size: str, attention: bool, half: bool) -> dict[str, Any]:
    """The geometry of a model of one layer."""
    whole = GEOMETRIES[size]
    narrow = {key: whole[key] // 2 for key in _HALVED if key in whole and half}
    interval = 1 if attention else 4
    return {
        **whole,
        **narrow,
        "num_hidden_layers": 1,
        "full_attention_interval": interval,
        "vocab_size": _VOCABULARY,
    }


def watch(module: Any, name: str, spent: Counter[str], label: str) -> None:
    """Add the seconds of each call of `module`'s function `name` to `spent`."""
    inner: Callable[..., Any] = getattr(module, name)

    @wraps(inner)
    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return inner(*args, **kwargs)
        finally:
            spent[label] += time.perf_counter() - started

    setattr(module, name, timed)


def measure(geometry: dict[str, Any], compression: str, samples: int) -> dict[str, Any]:
    spent: Counter[str] = Counter()
    for label, (module, name) in _PARTS.items():
        watch(module, name, spent, label)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = generated_checkpoint(folder / "checkpoint", geometry)
        profile = load_profile("cpu-int4", [f"compression={compression}"])
        graphs = build_graphs(checkpoint, profile, mtp=False)
        text = np.random.default_rng(0).integers(_VOCABULARY, size=(samples, 128))
        write = artifact.OnnxWrite(checkpoint, profile, graphs, False, text, None)
        (folder / "work" / artifact.STAGED).mkdir(parents=True)
        destination = write.begin(folder / "work", Quiet())
        started, processor = time.perf_counter(), time.process_time()
        steps = artifact.calibrated_steps(destination, text, compression == "gptaq")
        stream.write_weights([destination], steps, lambda count: None)
        seconds, processor = time.perf_counter() - started, time.process_time() - processor
        if destination.fault:
            raise destination.fault
    return {
        "seconds": seconds,
        "processor_seconds": processor,
        "peak_bytes": peak_bytes(psutil.Process()),
        "parts": dict(spent),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--compression", choices=("gptq", "gptaq"), default="gptaq")
    parser.add_argument("--size", choices=GEOMETRIES, default="27B")
    parser.add_argument("--attention", action="store_true")
    parser.add_argument("--half", action="store_true")
    parser.add_argument("--samples", type=int, default=gptq.SAMPLES)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    geometry = one_layer(arguments.size, arguments.attention, arguments.half)
    found = measure(geometry, arguments.compression, arguments.samples)
    parts = ", ".join(f"{label} {seconds:.1f}" for label, seconds in found["parts"].items())
    size = f"{arguments.size}{' at half width' * arguments.half}"
    print(
        f"{arguments.compression}, one layer of {size}, {arguments.samples * 128} tokens: "
        f"{found['seconds']:.1f} s ({parts}), {found['processor_seconds']:.1f} s of processors, "
        f"peak {found['peak_bytes'] / 1e9:.2f} GB"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
