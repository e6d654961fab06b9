"""CUDA on a GPU: parity, and both lowerings' rates as a share of its bandwidth, beside the builder's.

    pip install onnxruntime-genai-cuda onnxruntime-gpu       (in place of onnxruntime-genai and onnxruntime)
    python -m benchmarks.cuda [--sizes 0.8B "35B-A3B, 2 layers"] [--builder] [--rounds 5] [--json cuda.json]

NOT RUN YET: no GPU has been at hand; tests/benchmarks/test_cuda.py rehearses it on the CPU. It stops with a
clear message where there is no CUDA provider.

Parity is that of the unquantised float16 graph of the trained tiny checkpoint in each lowering, on the GPU,
with the fused graph in float32 on the CPU. The bandwidth is that of copying on the device, read and written
bytes together. An INT8 KV cache and the MTP head on a GPU are not here: the exporter writes neither.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from qwen_common.providers import PROVIDERS
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.export import export
from qwen_profiles.schema import Profile, load_profile
from rich.console import Console
from rich.table import Table

from benchmarks.builder import command as builder_command
from benchmarks.builder import wrap
from benchmarks.decode import PROMPT, Peer, bytes_read, file_bytes, measure, onnx_peer, spread
from benchmarks.export import watched
from benchmarks.geometry import GEOMETRIES, write_checkpoint
from benchmarks.support.artifacts import Quiet, float_profile, make_artifact
from benchmarks.support.checkpoints import TINY, copy_tokenizer
from benchmarks.support.session import Session, cosine

CUDA = "CUDAExecutionProvider"
PROFILE = "nvidia-rtx-24gb"


class CudaSession(Session):
    providers = (CUDA,)


def lowerings(name: str) -> dict[str, Profile]:
    """The profile in each lowering that its provider has."""
    profile = load_profile(name)
    return {
        lowering: profile.model_copy(update={"lowering": lowering})
        for lowering in sorted(PROVIDERS[profile.provider].lowerings)
    }


def parity(profile: Profile, folder: Path) -> float:
    """Least cosine of the logits at 200 positions, GPU in float16 against CPU in float32."""
    ids = np.random.default_rng(0).integers(0, 2000, 200)
    expected = Session(make_artifact(TINY, float_profile("fused"), folder / "float32")).run(ids)
    unquantised = float_profile(profile.lowering, "float16", profile.prefill_chunk).model_copy(
        update={"provider": profile.provider, "device": profile.device}
    )
    session = CudaSession(make_artifact(TINY, unquantised, folder / "float16"))
    pieces = np.array_split(ids, -(-len(ids) // profile.prefill_chunk))
    found = np.concatenate([session.run(piece) for piece in pieces], axis=1)
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


def peers(
    size: str, profiles: Mapping[str, Profile], asked: argparse.Namespace, folder: Path, plugin: str = ""
) -> list[Peer]:
    """Of random weights, a profile in each lowering, and the builder's artifact where it is asked for."""
    checkpoint = write_checkpoint(folder / "checkpoint", GEOMETRIES[size])
    copy_tokenizer(TINY, checkpoint)
    found = []
    for lowering, profile in profiles.items():
        opened = Checkpoint.open(str(checkpoint))
        export(opened, profile, folder / lowering, Quiet())
        read = bytes_read(opened, profile)
        found.append(onnx_peer(f"ours, {profile.name}, {lowering}", folder / lowering, asked, read))
        found[-1].command += ["--plugin", plugin] if plugin else []
    if asked.builder:
        command = builder_command(wrap(checkpoint, folder / "wrapped"), folder / "built")
        provider = next(iter(profiles.values())).provider
        watched([provider if part == "cpu" else part for part in command])
        built = folder / "built"
        found.append(onnx_peer("builder, default", built, asked, file_bytes(built)))
        found[-1].command += ["--plugin", plugin] if plugin else []
    return found


def options(description: str | None, sizes: list[str]) -> argparse.ArgumentParser:
    """Those of a benchmark of this kind."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=GEOMETRIES, default=sizes)
    parser.add_argument("--builder", action="store_true", help="GenAI's model builder, its default int4")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128, help="decoded in each round")
    parser.add_argument("--json", type=Path)
    return parser


def main() -> None:
    asked = options(__doc__, ["0.8B", "4B", "35B-A3B, 2 layers"]).parse_args()
    if CUDA not in ort.get_available_providers() or not torch.cuda.is_available():
        sys.exit("no CUDA here: install onnxruntime-genai-cuda, onnxruntime-gpu and torch for CUDA on a GPU")

    results: dict[str, Any] = {"device": torch.cuda.get_device_name(), "bandwidth": bandwidth()}
    table = Table("size", "peer", "MB", "prefill tok/s", "decode tok/s", "of bandwidth")
    profiles = lowerings(PROFILE)
    with tempfile.TemporaryDirectory() as name:
        results["parity"] = {
            lowering: parity(profile, Path(name, lowering)) for lowering, profile in profiles.items()
        }
        for size in asked.sizes:
            found = peers(size, profiles, asked, Path(name, size))
            measure(found, PROMPT, asked.rounds)
            for peer in found:
                assert peer.bytes
                speeds = {speed: [turn[speed] for turn in peer.turns] for speed in ("prefill", "decode")}
                shares = [speed * peer.bytes / results["bandwidth"] for speed in speeds["decode"]]
                results[f"{peer.name}, {size}"] = {"bytes": peer.bytes, "share": shares, **speeds}
                cells = [spread(values) for values in (*speeds.values(), shares)]
                table.add_row(size, peer.name, f"{peer.bytes / 1e6:.0f}", *cells)
    console = Console(width=130)
    least = ", ".join(f"{lowering} {value:.6f}" for lowering, value in results["parity"].items())
    console.print(f"{results['device']}, {results['bandwidth'] / 1e9:.0f} GB/s, parity {least}")
    console.print(table)
    if asked.json:
        asked.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
