"""Providers x lowerings x trained checkpoints: divergence from the reference, and where the nodes run.

    python -m benchmarks.providers [--webgpu FOLDER] [--peer NAME=COMMAND] [--json F]

Unquantised graphs read a prompt of 40 tokens in two pieces and 5 more step by step, on each provider. The
mean KL divergence of the next-token distributions is from transformers in float32, in nats; nodes are those
that ONNX Runtime's profiler saw after its fusions, copies those between the devices. tiny-vl reads an image
before its text, and has a row for the vision tower too, whose figure is 1 less the least cosine of the
features. Last, the size of one folder of tiny-dense for several providers beside separate ones, and whether
its greedy tokens are the same on all of them.

A provider has rows only of the lowerings that it has kernels for.

`--webgpu` names the folder of the plug-in (docs/testing.md); a software device is named as such. `--peer` is
another interpreter with another provider: a command, the provider's name and its options, with colons
between, as in `DirectML=wine python.exe:DmlExecutionProvider:{"device_id":"0"}`. It runs
benchmarks/support/plugin_run.py.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from qwen_profiles.schema import load_profile
from qwen_runtime.graphics import vulkan_adapters
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from benchmarks.support.artifacts import directml_profile, float_profile, make_artifact
from benchmarks.support.checkpoints import EVALUATION, TINY, TINY_MOE, TINY_VL
from benchmarks.support.provider import (
    COPIES,
    CPU,
    Operators,
    Provider,
    features_of_transformers,
    logits_of_transformers,
    random_image,
    webgpu,
)
from benchmarks.support.session import cosine

LOWERINGS = ("fused", "portable")
CHUNKS = [24, 16, 1, 1, 3]
IMAGE = (8, 12)  # patches


@dataclass(frozen=True)
class Row:
    """One graph on one provider.

    Attributes:
        divergence: mean KL divergence in nats; of a vision tower 1 less the least cosine of its features.
        on_provider, on_cpu, copies: nodes; of the CPU provider `on_cpu` has all.
    """

    checkpoint: str
    provider: str
    lowering: str
    dtype: str
    divergence: float
    on_provider: int
    on_cpu: int
    copies: int


def divergence(found: np.ndarray, expected: np.ndarray) -> float:
    """Mean KL divergence, in nats, of logits [tokens, vocab]."""
    p, q = (_log_softmax(logits.astype(np.float64)) for logits in (expected, found))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def counted(ran: Operators) -> tuple[int, int, int]:
    """Nodes on the provider, on the CPU, and copies."""
    copies = sum(count for found in ran.values() for name, count in found.items() if name in COPIES)
    on_cpu = sum(ran.get(CPU, {}).values())
    return sum(sum(found.values()) for found in ran.values()) - copies - on_cpu, on_cpu, copies


def rows(providers: Mapping[str, Provider], dtype: str, folder: Path) -> Iterator[Row]:
    ids = np.random.default_rng(3).integers(0, 2000, sum(CHUNKS)).tolist()
    image_ids, images = random_image(TINY_VL, *IMAGE, 9)
    for checkpoint in (TINY, TINY_MOE, TINY_VL):
        seen = checkpoint == TINY_VL
        read, pieces = (image_ids, [len(image_ids) - 3, 1, 1, 1]) if seen else (ids, CHUNKS)
        expected = logits_of_transformers(checkpoint, read, images if seen else None)
        features = features_of_transformers(checkpoint, images) if seen else None
        for lowering in LOWERINGS:
            for name, provider in providers.items():
                if lowering not in provider.record.lowerings:
                    continue
                place = Path(tempfile.mkdtemp(dir=folder))
                profile = float_profile(lowering, dtype).model_copy(update={"provider": provider.record.key})
                artifact = make_artifact(checkpoint, profile, place / "artifact")
                run = provider.run(artifact, read, pieces, place, images=images if seen else None)
                loss = divergence(run.logits, expected)
                yield Row(checkpoint.name, name, lowering, dtype, loss, *counted(run.ran))
                if run.features is not None and features is not None:
                    far = 1 - float(cosine(run.features, features).min())
                    yield Row(f"{checkpoint.name}, tower", name, lowering, dtype, far, *counted(run.vision))


def one_folder(providers: Mapping[str, Provider], folder: Path) -> tuple[dict[str, int], bool]:
    """Bytes of tiny-dense for WebGPU and DirectML in one folder and in one for each; whether the one folder's
    graphs give the same likeliest tokens: on every provider its own, and DirectML's on the CPU too."""
    profiles = {
        "one folder": load_profile("strix-halo"),
        "WebGPU alone": load_profile("strix-halo", ["fallbacks=[]"]),
        "DirectML alone": directml_profile(),
    }
    made = {name: folder / name.replace(" ", "-") for name in profiles}
    for name, profile in profiles.items():
        make_artifact(TINY, profile, made[name], all_logits=False)
    sizes = {name: sum(path.stat().st_size for path in output.iterdir()) for name, output in made.items()}
    whole = make_artifact(TINY, profiles["one folder"], folder / "logits")
    text = AutoTokenizer.from_pretrained(TINY)(EVALUATION.read_text(encoding="utf-8"))["input_ids"]
    ids = text[: sum(CHUNKS)]
    further = "model.dml.onnx"
    runs = [
        provider.run(whole, ids, CHUNKS, folder, further if provider.record.key == "dml" else "model.onnx")
        for provider in providers.values()
    ]
    runs.append(Provider(CPU).run(whole, ids, CHUNKS, folder, further))
    likeliest = [run.logits.argmax(-1) for run in runs]
    return sizes, all((found == likeliest[0]).all() for found in likeliest)


def peer(text: str) -> tuple[str, Provider]:
    """NAME=COMMAND:PROVIDER:OPTIONS"""
    name, _, rest = text.partition("=")
    command, _, rest = rest.partition(":")
    provider, _, options = rest.partition(":")
    return name, Provider(provider, shlex.split(command), json.loads(options or "{}"))


def webgpu_title() -> str:
    """WebGPU, with the device in words where Vulkan says that it is software."""
    adapters = vulkan_adapters()
    software = adapters and all(adapter.software for adapter in adapters)
    return f"WebGPU (software: {adapters[0].name})" if software else "WebGPU"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--webgpu", metavar="FOLDER", help="of the installed plug-in")
    parser.add_argument("--peer", type=peer, action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--dtype", choices=["float16", "float32"], default="float16")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    providers = {"CPU": Provider(CPU)}
    if asked.webgpu:
        providers[webgpu_title()] = webgpu(asked.webgpu)
    providers |= dict(asked.peer)
    table = Table(
        *("checkpoint", "provider", "lowering", "dtype", "divergence", "nodes on it", "on the CPU", "copies"),
        box=MARKDOWN,
    )
    found = []
    with tempfile.TemporaryDirectory() as name:
        for row in rows(providers, asked.dtype, Path(name)):
            found.append(asdict(row))
            cells = [row.checkpoint, row.provider, row.lowering, row.dtype, f"{row.divergence:.1e}"]
            on_provider = "" if row.provider == "CPU" else str(row.on_provider)
            table.add_row(*cells, on_provider, str(row.on_cpu), str(row.copies))
            print(*cells, file=sys.stderr)
        sizes, alike = one_folder(providers, Path(name))
    console = Console(width=160)
    console.print(table)
    console.print(", ".join(f"{title} {size:,} bytes" for title, size in sizes.items()))
    console.print(f"one folder's likeliest tokens are the same on all of them: {'yes' if alike else 'no'}")
    if asked.json:
        content = {"rows": found, "bytes": sizes, "alike": alike}
        asked.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
