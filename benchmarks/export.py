"""Peak memory and speed of an export, beside ONNX Runtime GenAI's model builder.

    python -m benchmarks.export [--sizes 0.8B 4B] [--builder 0.8B] [--json export.json]

Random checkpoints of real geometries, each export in a process of its own, three times; the median counts.
Memory is the process's own maximum (VmHWM).
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.checkpoint.config import load_config
from rich.console import Console
from rich.table import Table

from benchmarks.builder import command as builder_command
from benchmarks.builder import wrap
from benchmarks.geometry import GEOMETRIES, write_checkpoint
from benchmarks.support.checkpoints import TINY, copy_tokenizer

_POLL = 0.02  # seconds


def watched(arguments: list[str]) -> tuple[float, int]:
    """Seconds and peak resident bytes of one command."""
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=errors)
        watcher = psutil.Process(process.pid)
        peak = 0
        while process.poll() is None:
            try:
                peak = max(peak, peak_bytes(watcher))
            except psutil.Error:
                break
            time.sleep(_POLL)
        if process.wait():
            errors.seek(0)
            raise RuntimeError(f"{arguments[:4]} failed: {errors.read()[-2000:]}")
    return time.perf_counter() - started, peak


def peak_bytes(process: psutil.Process) -> int:
    """The maximum so far, as the kernel keeps it where it does."""
    status = Path(f"/proc/{process.pid}/status")
    if status.exists():
        line = next((line for line in status.read_text().splitlines() if line.startswith("VmHWM")), None)
        if line:
            return int(line.split()[1]) * 1024
    return int(process.memory_info().rss)


def parameters(checkpoint: Path) -> tuple[int, int]:
    """All parameters, and the bytes of the largest tensor."""
    tensors = Checkpoint.open(str(checkpoint)).tensors
    count = 0
    for spec in load_config(checkpoint).tensors().values():
        count += math.prod(spec.shape)
    return count, max(info.nbytes for info in tensors.values())


def measure(checkpoint: Path, folder: Path, runs: int) -> dict[str, Any]:
    count, largest = parameters(checkpoint)
    command = [sys.executable, "-c", "from qwen_export.cli import main; main()", "--profile", "cpu"]
    command += [str(checkpoint), "-o", str(folder), "--no-progress"]
    seconds, peaks = [], []
    for _ in range(runs):
        shutil.rmtree(folder, ignore_errors=True)
        elapsed, peak = watched(command)
        seconds.append(elapsed)
        peaks.append(peak)
    size = sum(path.stat().st_size for path in folder.iterdir())
    return {
        "parameters": count,
        "largest_tensor_bytes": largest,
        "seconds": statistics.median(seconds),
        "seconds_all": seconds,
        "peak_bytes": statistics.median(peaks),
        "artifact_bytes": size,
    }


def measure_builder(checkpoint: Path, folder: Path) -> dict[str, Any]:
    count, largest = parameters(checkpoint)
    wrapped = wrap(checkpoint, folder / "wrapped")
    elapsed, peak = watched(builder_command(wrapped, folder / "built"))
    size = sum(path.stat().st_size for path in (folder / "built").glob("*.onnx*"))
    return {
        "parameters": count,
        "largest_tensor_bytes": largest,
        "seconds": elapsed,
        "peak_bytes": peak,
        "artifact_bytes": size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=GEOMETRIES, default=["0.8B", "4B"])
    parser.add_argument("--builder", nargs="*", choices=GEOMETRIES, default=["0.8B"])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--hollow-experts",
        action="store_true",
        help="routed experts take no disk and are 0: for exports only, memory once loaded is no measure",
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    results: dict[str, dict[str, Any]] = {}
    for size in dict.fromkeys([*arguments.sizes, *arguments.builder]):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            checkpoint = write_checkpoint(
                folder / "checkpoint", GEOMETRIES[size], hollow_experts=arguments.hollow_experts
            )
            copy_tokenizer(TINY, checkpoint)
            if size in arguments.sizes:
                results[f"qwen-export {size}"] = measure(checkpoint, folder / "artifact", arguments.runs)
            if size in arguments.builder:
                results[f"builder {size}"] = measure_builder(checkpoint, folder)

    table = Table(
        "export", "M parameters", "seconds", "M parameters/s", "peak GiB", "largest tensor GiB", "GB"
    )
    for name, row in results.items():
        table.add_row(
            name,
            f"{row['parameters'] / 1e6:.0f}",
            f"{row['seconds']:.1f}",
            f"{row['parameters'] / 1e6 / row['seconds']:.0f}",
            f"{row['peak_bytes'] / 2**30:.2f}",
            f"{row['largest_tensor_bytes'] / 2**30:.2f}",
            f"{row['artifact_bytes'] / 1e9:.2f}",
        )
    Console(width=110).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
