"""An ONNX artifact's estimate, from its graphs alone.

They are the ones that are exported, so sizes are sums over their tensors. Only how ONNX Runtime holds them is
a model; `python -m benchmarks.plan` compares it with what a process really takes (docs/profiles.md).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from qwen_common.providers import CPU
from qwen_profiles.schema import Profile

from qwen_export.architecture.models.qwen3_5_moe import MoeTextConfig
from qwen_export.backends.copied_files import COPIED_FILES
from qwen_export.backends.onnx.files import MODEL_FILE, MTP_FILE, PAIRS_FILE, SPECULATIVE_FILE
from qwen_export.backends.onnx.graphs import Graphs, build_graphs, targets
from qwen_export.backends.onnx.proto import model_size
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.checkpoint.tensors.tensor import Fp4Experts, PrequantizedTensor
from qwen_export.graph.builder import Node
from qwen_export.graph.model import cache_bytes_per_token, states
from qwen_export.graph.weights import ExternalTensor, Weight
from qwen_export.planner.estimate import Estimate
from qwen_export.quantize.blockwise import Quantization
from qwen_export.quantize.fp4 import Fp4

# Python, ONNX Runtime, GenAI and a session of a few small layers, before any weight (measured, Linux x86-64).
_RUNTIME_BYTES = 79_000_000
# genai_config.json, manifest.json, processor_config.json, README.md; within a few hundred bytes.
_DESCRIPTION_BYTES = 8_000
# Tensors of one layer, each as wide as its widest, that are alive at once in a run (measured, generously).
_LIVE_TENSORS = 6
# Operators that hold quantised weights in a layout of their own, with a scale and a sum for each block: with
# accuracy_level 4 on a CPU with AVX-512 (measured, benchmarks/memory.py; docs/profiles.md).
_REPACKING = {"MatMulNBits", "QMoE"}
FLOATS_PER_BLOCK = 2
FLOATS_PER_TWO_BIT_BLOCK = 1.25  # of QMoE, whose kernel for 2 bits holds less (measured at 64 and 128)
# Graphs that a runtime loads only for speculative decoding.
_ON_DEMAND = {SPECULATIVE_FILE, PAIRS_FILE, MTP_FILE}
# Fields of a profile that no graph depends on; of `provider` it depends on the target.
_NOT_IN_GRAPHS = {
    *("name", "description", "backend", "provider", "device", "provider_options", "compression"),
    *("context_length", "hardware", "quality"),
}


@dataclass(frozen=True)
class _Sizes:
    """What of an estimate only the graphs decide; bytes.

    Attributes:
        files: graphs and data file.
        data: the data file.
        cpu: weights in memory on the CPU, of graphs for it.
        cpu_load: the most of them while they are loaded.
        decoded: weights that are read for one token.
    """

    files: int
    data: int
    cpu: int
    cpu_load: int
    decoded: int
    by_role: dict[str, int]
    precision: dict[str, str]


@dataclass(frozen=True)
class _Asked:
    """A checkpoint and a profile; two are equal where their graphs are."""

    graphs_depend_on: str
    checkpoint: Checkpoint = field(compare=False)
    profile: Profile = field(compare=False)
    mtp: bool


def estimate(checkpoint: Checkpoint, profile: Profile, mtp: bool = False) -> Estimate:
    """Predictions for `checkpoint` with `profile`; reads no weight.

    Args:
        mtp: the MTP head is exported.
    """
    config, dtype = checkpoint.config, np.dtype(profile.activation_dtype)
    sizes = _sizes(_Asked(_graphs_depend_on(checkpoint, profile), checkpoint, profile, mtp))
    budget = int(profile.hardware.memory_budget_gb * 1e9)
    per_token = cache_bytes_per_token(config, np.dtype(profile.kv_dtype))
    on_cpu = profile.provider == CPU.key
    resident = _RUNTIME_BYTES + (sizes.cpu if on_cpu else sizes.data)
    load = _RUNTIME_BYTES + (sizes.cpu_load if on_cpu else sizes.data)
    widest = max(
        2 * config.gate_up_dim if isinstance(config, MoeTextConfig) else 0,
        2 * config.intermediate_size if config.dense_layers else 0,
        config.conv_dim + config.value_dim,
        2 * config.num_attention_heads * config.head_dim,
    )
    fixed = sum(_state_bytes(checkpoint, dtype))
    working = fixed + _LIVE_TENSORS * profile.prefill_chunk * widest * dtype.itemsize
    working += config.vocab_size * np.dtype(np.float32).itemsize
    room = max(0, budget - resident - working) // per_token if per_token else config.positions
    return Estimate(
        disk=sizes.files + _description_bytes(profile) + _tokenizer_bytes(checkpoint.root),
        load=load,
        resident=resident,
        working=working,
        cache_per_token=per_token,
        decode_bytes=sizes.decoded,
        decode_rate=profile.hardware.bandwidth_gb_s * 1e9 / sizes.decoded,
        by_role=sizes.by_role,
        precision=sizes.precision,
        context=min(profile.context_length, config.positions),
        largest_context=min(room, config.positions),
        budget=budget,
    )


def _graphs_depend_on(checkpoint: Checkpoint, profile: Profile) -> str:
    """All that graphs depend on, as text."""
    schemes = {
        name: tensor.scheme if isinstance(tensor, PrequantizedTensor) else tensor.fp4_experts
        for name, tensor in checkpoint.tensors.items()
        if isinstance(tensor, PrequantizedTensor | Fp4Experts)
    }
    return repr(
        (
            checkpoint.config,
            checkpoint.vision,
            schemes,
            targets(profile),
            profile.model_dump(exclude=_NOT_IN_GRAPHS),
        )
    )


@lru_cache(maxsize=256)
def _sizes(asked: _Asked) -> _Sizes:
    """Profiles that differ only in their hardware share the graphs."""
    graphs = build_graphs(asked.checkpoint, asked.profile, mtp=asked.mtp)
    # The CPU's target is nobody else's, so that no other provider shares this entry.
    cpu, cpu_load = _cpu_bytes(graphs) if asked.profile.provider == CPU.key else (0, 0)
    return _Sizes(
        files=graphs.data_bytes + sum(map(model_size, graphs.every_file.values())),
        data=graphs.data_bytes,
        cpu=cpu,
        cpu_load=cpu_load,
        decoded=_decode_bytes(asked.checkpoint, graphs),
        by_role=graphs.bytes_by_role(),
        precision=_precisions(graphs),
    )


def _uses(graphs: Graphs) -> Iterator[tuple[str, Node, ExternalTensor]]:
    """(graph file, node, tensor of the data file that it takes) of all that the
    profile's provider loads at once."""
    for file, graph in graphs.by_file.items():
        if file in _ON_DEMAND:
            continue
        for node in graph.nodes:
            for value in node.inputs:
                if value is not None and isinstance(value.tensor, ExternalTensor):
                    yield file, node, value.tensor


def _cpu_bytes(graphs: Graphs) -> tuple[int, int]:
    """Weights in memory on the CPU, as onnxruntime 1.32 and the runtime hold them: after loading, and at most
    while loading.

    MatMulNBits and QMoE repack their codes, with floats for each block, and let go of the mapped codes of one
    tensor after another; mapped scales stay until all is loaded, the widened copy of float16 ones for good.
    Float products repack too. What others take stays mapped; rows of an embedding are in memory once they
    were looked up.
    """
    mapped: dict[str, int] = {}
    rows: dict[str, int] = {}
    let_go: dict[str, int] = {}
    codes: list[tuple[str, int, int]] = []  # name, size, and what was held when it had been repacked
    copied = 0
    for _, node, tensor in _uses(graphs):
        size, floats = tensor.nbytes, 4 * tensor.nbytes // tensor.dtype.itemsize
        scales = tensor.name.endswith(".scales")
        if scales and node.op_type == "Cast":  # for a MatMulNBits
            copied += (FLOATS_PER_BLOCK + 1) * floats
        elif scales and node.op_type in _REPACKING and "quant_type" not in node.attributes:
            two_bits = node.attributes.get("expert_weight_bits") == 2
            copied += int((FLOATS_PER_TWO_BIT_BLOCK if two_bits else FLOATS_PER_BLOCK) * floats)
            let_go[tensor.name] = size
        elif "quant_type" in node.attributes:  # 4-bit floats, which QMoE reads as they lie (measured)
            mapped[tensor.name] = size
        elif node.op_type in _REPACKING:
            copied += size
            codes.append((tensor.name, size, copied))
        elif node.op_type in ("FusedMatMul", "Transpose"):
            copied += size
        elif node.op_type == "Gather":
            rows[tensor.name] = size
        else:
            mapped[tensor.name] = size
    # Of a tied embedding the packing reads every row, and its mapping stays.
    tied = sum(rows.get(name, 0) for name, *_ in codes)
    most = max((held + size for name, size, held in codes if name not in rows), default=0)
    stays = sum(mapped.values())
    return copied + stays, max(copied, most) + stays + tied + sum(let_go.values())


def _decode_bytes(checkpoint: Checkpoint, graphs: Graphs) -> int:
    """Weights that the decoder reads for one token. A looked-up embedding row is nothing beside them."""
    weights: dict[str, Weight] = {tensor.name: weight for weight, found in graphs.placed for tensor in found}
    config, total = checkpoint.config, 0
    touched = {
        tensor.name: tensor
        for file, node, tensor in _uses(graphs)
        if file == MODEL_FILE and (node.op_type != "Gather" or weights[tensor.name].role == "experts")
    }
    for tensor in touched.values():
        if weights[tensor.name].role == "experts" and isinstance(config, MoeTextConfig):
            total += tensor.nbytes * config.num_experts_per_tok // config.num_experts
        else:
            total += tensor.nbytes
    return total


def _precisions(graphs: Graphs) -> dict[str, str]:
    found: dict[str, set[str]] = {}
    for weight, _ in graphs.placed:
        storage = weight.storage
        form = "float"
        if isinstance(storage, Fp4):
            form = storage.name.lower()
        elif isinstance(storage, Quantization):
            form = f"int{storage.bits}/{storage.block_size}"
        found.setdefault(weight.role, set()).add(form)
    return {role: ", ".join(sorted(forms)) for role, forms in found.items()}


def _state_bytes(checkpoint: Checkpoint, dtype: np.dtype) -> Iterator[int]:
    """Conv and recurrent states, past and present, of one sequence."""
    config = checkpoint.config
    for layer, layer_type in enumerate(config.layer_types):
        if layer_type == "linear_attention":
            for state in states(config, layer, dtype):
                sizes = [size for size in state.past_shape if isinstance(size, int)]
                yield 2 * math.prod(sizes) * state.dtype.itemsize


def _description_bytes(profile: Profile) -> int:
    """The manifest has each layer's formats, where a profile tells them apart."""
    layers = profile.model_dump(mode="json", include={"layer_weights"})["layer_weights"]
    return _DESCRIPTION_BYTES + len(json.dumps({"settings": {"layer_weights": layers}}, indent=2))


def _tokenizer_bytes(root: Path) -> int:
    return sum(path.stat().st_size for name in COPIED_FILES if (path := root / name).is_file())
