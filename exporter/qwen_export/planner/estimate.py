"""What an artifact will take and give, from its plan alone: bytes on disk, memory, tokens per second.

The plan is the one that exports, so sizes are sums over its tensors. Only how ONNX Runtime holds them is a
model; `python -m benchmarks.plan` compares it with what a process really takes (docs/profiles.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from qwen_profiles.schema import Profile

from qwen_export.architecture.models.qwen3_5_moe import MoeTextConfig
from qwen_export.backends.onnx import package
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.graph.model import cache_bytes_per_token, states
from qwen_export.graph.weights import StoredTensor, Weight

if TYPE_CHECKING:
    from qwen_export.backends.onnx.plan import Plan

# Python, ONNX Runtime, GenAI and a session of a few small layers, before any weight (measured, Linux x86-64).
_RUNTIME_BYTES = 72_000_000
# genai_config.json, manifest.json, processor_config.json, README.md; within a few hundred bytes.
_DESCRIPTION_BYTES = 8_000
# Tensors of one layer, each as wide as its widest, that are alive at once in a run (measured, generously).
_LIVE_TENSORS = 6
# Graphs that a runtime loads only for speculative decoding.
_ON_DEMAND = {package.SPECULATIVE_FILE, package.MTP_FILE}


@dataclass(frozen=True)
class Estimate:
    """Predictions for one checkpoint and one profile. Bytes, unless a name says otherwise.

    Attributes:
        disk: all files of the artifact, without the tokenizer's where the checkpoint's are not at hand.
        load: memory of the process once the model is loaded, before the first prompt.
        working: what a run of `prefill_chunk` tokens needs besides, with the recurrent states.
        cache_per_token: keys and values of one token of context.
        decode_bytes: weights that are read for one token; of a mixture only the experts that it is sent to.
        decode_rate: tokens per second at which those bytes saturate the memory; no runtime is faster.
        by_role: bytes on disk.
        precision: how each role's matrices are stored; a role that no block size fits is `float`.
        context: tokens that the artifact will be made for.
        largest_context: tokens that fit the profile's memory, at most what the model was made for; 0: none.
        budget: the profile's memory.
    """

    disk: int
    load: int
    working: int
    cache_per_token: int
    decode_bytes: int
    decode_rate: float
    by_role: dict[str, int]
    precision: dict[str, str]
    context: int
    largest_context: int
    budget: int

    @property
    def needed(self) -> int:
        """Memory with the shortest context that is of use, 1024 tokens."""
        return self.load + self.working + 1024 * self.cache_per_token

    @property
    def fits(self) -> bool:
        return self.needed <= self.budget


def estimate(checkpoint: Checkpoint, profile: Profile, planned: Plan) -> Estimate:
    """Predictions for `planned`, the plan of `checkpoint` for `profile`; reads no weight."""
    config, dtype = checkpoint.config, np.dtype(profile.activation_dtype)
    budget = int(profile.hardware.memory_budget_gb * 1e9)
    per_token = cache_bytes_per_token(config, dtype)
    load = _RUNTIME_BYTES + (_cpu_bytes(planned) if profile.provider == "cpu" else planned.data_bytes)
    widest = max(
        2 * config.gate_up_dim if isinstance(config, MoeTextConfig) else 2 * config.intermediate_size,
        config.conv_dim + config.value_dim,
        2 * config.num_attention_heads * config.head_dim,
    )
    fixed = sum(_state_bytes(checkpoint, dtype))
    working = fixed + _LIVE_TENSORS * profile.prefill_chunk * widest * dtype.itemsize
    working += config.vocab_size * np.dtype(np.float32).itemsize
    room = max(0, budget - load - working) // per_token if per_token else config.positions
    decoded = _decode_bytes(checkpoint, planned)
    return Estimate(
        disk=planned.data_bytes + _graph_bytes(planned) + _tokenizer_bytes(checkpoint.root),
        load=load,
        working=working,
        cache_per_token=per_token,
        decode_bytes=decoded,
        decode_rate=profile.hardware.bandwidth_gb_s * 1e9 / decoded,
        by_role=planned.bytes_by_role(),
        precision=_precisions(planned),
        context=min(profile.context_length, config.positions),
        largest_context=min(room, config.positions),
        budget=budget,
    )


def _uses(planned: Plan) -> Iterator[tuple[str, ir.Node, str]]:
    """(graph file, node, tensor of the data file that it takes) of everything that is loaded at once."""
    stored = {tensor.name for _, tensors in planned.stored for tensor in tensors}
    for file, model in planned.models.items():
        if file in _ON_DEMAND:
            continue
        for node in model.graph:
            for value in node.inputs:
                if value is not None and value.name in stored:
                    yield file, node, value.name


def _cpu_bytes(planned: Plan) -> int:
    """Weights in memory on the CPU, as onnxruntime 1.32 holds them.

    MatMulNBits repacks its codes, with a float scale and a float sum for each block, and lets go of the
    mapped codes but not of the scales: mapped, or the widened copy of float16 ones. Float products repack
    too. What others take, such as a gather, stays mapped: counted in full, as it will be in memory once it
    was used. So is QMoE's, which repacks its codes on CPUs with AVX2 and lets go of the mapped ones: the
    same bytes.
    """
    tensors: dict[str, StoredTensor] = {t.name: t for _, stored in planned.stored for t in stored}
    mapped: set[str] = set()
    copied = 0
    for _, node, name in set(_uses(planned)):
        size = tensors[name].nbytes
        if name.endswith(".scales") and node.op_type in ("MatMulNBits", "Cast"):
            floats = 4 * size // tensors[name].dtype.itemsize
            copied += 2 * floats
            if node.op_type == "Cast":
                copied += floats
            else:
                mapped.add(name)
        elif node.op_type in ("MatMulNBits", "FusedMatMul"):
            copied += size
        else:
            mapped.add(name)
    return copied + sum(tensors[name].nbytes for name in mapped)


def _decode_bytes(checkpoint: Checkpoint, planned: Plan) -> int:
    """Weights that the decoder reads for one token. A looked-up embedding row is nothing beside them."""
    weights: dict[str, tuple[Weight, StoredTensor]] = {
        tensor.name: (weight, tensor) for weight, tensors in planned.stored for tensor in tensors
    }
    config, total = checkpoint.config, 0
    touched = {
        name
        for file, node, name in _uses(planned)
        if file == package.MODEL_FILE and (node.op_type != "Gather" or weights[name][0].role == "experts")
    }
    for weight, tensor in (weights[name] for name in touched):
        if weight.role == "experts" and isinstance(config, MoeTextConfig):
            total += tensor.nbytes * config.num_experts_per_tok // config.num_experts
        else:
            total += tensor.nbytes
    return total


def _precisions(planned: Plan) -> dict[str, str]:
    found: dict[str, set[str]] = {}
    for weight, _ in planned.stored:
        storage = weight.storage
        form = "float" if isinstance(storage, np.dtype) else f"int{storage.bits}/{storage.block_size}"
        found.setdefault(weight.role, set()).add(form)
    return {role: ", ".join(sorted(forms)) for role, forms in found.items()}


def _state_bytes(checkpoint: Checkpoint, dtype: np.dtype) -> Iterator[int]:
    """Conv and recurrent states, past and present, of one sequence."""
    config = checkpoint.config
    for layer, layer_type in enumerate(config.layer_types):
        if layer_type == "linear_attention":
            for state in states(config, layer, dtype):
                sizes = [size for size in state.past_shape if isinstance(size, int)]
                yield 2 * int(np.prod(sizes)) * state.dtype.itemsize


def _graph_bytes(planned: Plan) -> int:
    graphs = sum(ir.serde.serialize_model(model).ByteSize() for model in planned.models.values())
    return graphs + _DESCRIPTION_BYTES


def _tokenizer_bytes(root: Path) -> int:
    return sum(path.stat().st_size for name in package.COPIED_FILES if (path := root / name).is_file())
