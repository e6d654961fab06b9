"""The CUDA profile on a GPU: parity, and decode rate as a share of its bandwidth, beside the builder's.

    pip install onnxruntime-genai-cuda onnxruntime-gpu       (in place of onnxruntime-genai and onnxruntime)
    python -m benchmarks.cuda [--sizes 0.8B 4B] [--builder] [--rounds 5] [--json cuda.json]

NOT RUN YET: no GPU has been at hand; tests/benchmarks/test_cuda.py rehearses it on the CPU. It stops with a
clear message where there is no CUDA provider.

Parity is that of the unquantised float16 graph of the trained tiny checkpoint, lowered as the profile says,
on the GPU with the fused graph in float32 on the CPU. The bandwidth is that of copying on the device, read
and written bytes together.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.export import export
from qwen_profiles.schema import load_profile
from rich.console import Console
from rich.table import Table

from benchmarks.builder import command as builder_command
from benchmarks.builder import wrap
from benchmarks.decode import Peer, bytes_read, file_bytes, onnx_peer, spread
from benchmarks.export import watched
from benchmarks.geometry import GEOMETRIES, write_checkpoint
from benchmarks.support.artifacts import Quiet, float_profile, make_artifact
from benchmarks.support.checkpoints import TINY, copy_tokenizer
from benchmarks.support.session import Session, cosine

CUDA = "CUDAExecutionProvider"
PROFILE = "nvidia-rtx-24gb"


class CudaSession(Session):
    providers = (CUDA,)


def parity(folder: Path) -> float:
    """Least cosine of the logits at 200 positions, GPU in float16 against CPU in float32."""
    ids = np.random.default_rng(0).integers(0, 2000, 200)
    expected = Session(make_artifact(TINY, float_profile("fused"), folder / "float32")).run(ids)
    ours = load_profile(PROFILE)
    profile = float_profile(ours.lowering, "float16", ours.prefill_chunk).model_copy(
        update={"provider": ours.provider, "device": ours.device}
    )
    found = CudaSession(make_artifact(TINY, profile, folder / "float16")).run(ids)
    return float(cosine(found, expected).min())


def bandwidth() -> float:
    """Bytes a second that the device reads and writes while it copies 1 GB."""
    source = torch.ones(2**28, device="cuda")
    target = torch.empty_like(source)
    seconds = []
    for _ in range(10):
        torch.cuda.synchronize()
        started = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * source.nbytes / statistics.median(seconds)


def measure(size: str, asked: argparse.Namespace, folder: Path) -> list[Peer]:
    checkpoint = write_checkpoint(folder / "checkpoint", GEOMETRIES[size])
    copy_tokenizer(TINY, checkpoint)
    export(Checkpoint.open(str(checkpoint)), load_profile(PROFILE), folder / "ours", Quiet())
    read = bytes_read(checkpoint, load_profile(PROFILE))
    peers = [onnx_peer(f"ours, {PROFILE}", folder / "ours", asked, read)]
    if asked.builder:
        command = builder_command(wrap(checkpoint, folder / "wrapped"), folder / "built")
        watched(["cuda" if part == "cpu" else part for part in command])
        built = folder / "built"
        peers.append(onnx_peer("builder, default", built, asked, file_bytes(built)))
    with ExitStack() as stack:
        for peer in peers:
            stack.enter_context(peer.running())
        for _ in range(asked.rounds + 1):
            for peer in peers:
                peer.take_turn()
    for peer in peers:
        peer.turns.pop(0)  # a warm-up
    return peers


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=GEOMETRIES, default=["0.8B", "4B"])
    parser.add_argument("--builder", action="store_true", help="GenAI's model builder, its default int4")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128, help="decoded in each round")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    if CUDA not in ort.get_available_providers() or not torch.cuda.is_available():
        sys.exit("no CUDA here: install onnxruntime-genai-cuda, onnxruntime-gpu and torch for CUDA on a GPU")

    results: dict[str, Any] = {"device": torch.cuda.get_device_name(), "bandwidth": bandwidth()}
    table = Table("size", "peer", "MB", "prefill tok/s", "decode tok/s", "of bandwidth")
    with tempfile.TemporaryDirectory() as name:
        results["parity"] = parity(Path(name))
        for size in asked.sizes:
            for peer in measure(size, asked, Path(name, size)):
                assert peer.bytes
                speeds = {speed: [turn[speed] for turn in peer.turns] for speed in ("prefill", "decode")}
                shares = [speed * peer.bytes / results["bandwidth"] for speed in speeds["decode"]]
                results[f"{peer.name}, {size}"] = {"bytes": peer.bytes, "share": shares, **speeds}
                cells = [spread(values) for values in (*speeds.values(), shares)]
                table.add_row(size, peer.name, f"{peer.bytes / 1e6:.0f}", *cells)
    console = Console(width=130)
    console.print(
        f"{results['device']}, {results['bandwidth'] / 1e9:.0f} GB/s, parity {results['parity']:.6f}"
    )
    console.print(table)
    if asked.json:
        asked.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
