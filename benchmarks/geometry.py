"""Checkpoints of the real Qwen3.5 geometries with random weights: the right sizes, no download.

Weights are slices of one random block, written without ever holding a tensor in memory, so that a
checkpoint of several GB takes as long as the disk does; or made as they are read, for models whose
checkpoint fits no disk.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from qwen_export.architecture.mtp import mtp_tensors
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.checkpoint.config import load_config

_FAMILY: dict[str, Any] = {
    "vocab_size": 248320,
    "head_dim": 256,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 4,
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10_000_000.0,
        "partial_rotary_factor": 0.25,
        "mrope_section": [11, 11, 10],
        "mrope_interleaved": True,
    },
}
_COLUMNS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "tie_word_embeddings",
)
# 0.8B and 27B as published in public training scripts; the others filled in to agree with their names.
_ROWS = {
    "0.8B": (1024, 24, 8, 2, 3584, 16, 16, True),
    "2B": (2048, 24, 8, 2, 6144, 16, 16, True),
    "4B": (2560, 32, 16, 4, 9216, 16, 32, True),
    "9B": (4096, 32, 16, 4, 12288, 16, 32, False),
    "27B": (5120, 64, 24, 4, 17408, 16, 48, False),
}
GEOMETRIES = {size: {**_FAMILY, **dict(zip(_COLUMNS, row, strict=True))} for size, row in _ROWS.items()}
# The mixture of experts with 3 B active parameters, as published, and its first layers.
GEOMETRIES["35B-A3B"] = {
    **_FAMILY,
    "model_type": "qwen3_5_moe_text",
    "hidden_size": 2048,
    "num_hidden_layers": 40,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "tie_word_embeddings": False,
}
GEOMETRIES["35B-A3B, 2 layers"] = {**GEOMETRIES["35B-A3B"], "num_hidden_layers": 2}
GEOMETRIES["35B-A3B, 4 layers"] = {**GEOMETRIES["35B-A3B"], "num_hidden_layers": 4}
# Filled in to agree with its name.
GEOMETRIES["122B-A10B"] = {
    **GEOMETRIES["35B-A3B"],
    "hidden_size": 3072,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "moe_intermediate_size": 1024,
    "shared_expert_intermediate_size": 1024,
    "linear_num_value_heads": 64,
}
GEOMETRIES["122B-A10B, 4 layers"] = {**GEOMETRIES["122B-A10B"], "num_hidden_layers": 4}
GEOMETRIES["122B-A10B, 8 layers"] = {**GEOMETRIES["122B-A10B"], "num_hidden_layers": 8}

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_BLOCK = 8 * 1024 * 1024 + 1  # elements; odd, so that rows of a tensor are not copies of one another
_SHARD_BYTES = 2 * 1024**3
# Near 1 in a trained model; every other weight is spread around 0.
_AROUND_ONE = "linear_attn.norm.weight"


@dataclass(frozen=True)
class GeneratedTensor:
    """A tensor that is made as it is read, the same each time; a `CheckpointTensor` that no shard holds.

    Attributes:
        file: the checkpoint's config.json.
        block: random values, bfloat16, that follow each other again and again.
        start: where in `block` the tensor begins.
        mean: of its values.
    """

    shape: tuple[int, ...]
    file: Path
    block: np.ndarray
    start: int
    mean: float = 0.0

    @property
    def nbytes(self) -> int:
        return _size(self.shape) * _BFLOAT16.itemsize

    @property
    def files(self) -> frozenset[Path]:
        return frozenset({self.file})

    def read(self, start: int, stop: int) -> np.ndarray:
        row = _size(self.shape[1:])
        runs = list(self.runs(start * row, stop * row))
        return (runs[0] if len(runs) == 1 else np.concatenate(runs)).reshape(stop - start, *self.shape[1:])

    def runs(self, first: int, last: int) -> Iterator[np.ndarray]:
        """Elements `first` to `last` of the flat tensor, in pieces that hold no more than the block."""
        while first < last:
            at = (self.start + first) % len(self.block)
            part = self.block[at : at + last - first]
            first += len(part)
            yield (part.astype(np.float32) + self.mean).astype(_BFLOAT16) if self.mean else part


def write_checkpoint(
    folder: Path, text_config: Mapping[str, Any], seed: int = 0, hollow_experts: bool = False
) -> Path:
    """Write a bfloat16 checkpoint of `text_config`, in shards of 2 GiB; returns `folder`.

    Weights are N(0, 0.02), repeating every 8 M values. About 100 MB of memory, whatever the model's size.
    With `hollow_experts` those of the routed experts are zeros, as holes that take no place on the disk. For
    measuring an export only: loaded, packed pages of zeros are freed, so memory and speed say nothing.
    """
    tensors = generated_checkpoint(folder, text_config, seed).tensors
    shards = list(_shards({name: tensor.shape for name, tensor in tensors.items()}))
    weight_map: dict[str, str] = {}
    for number, shapes in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(shapes, name)
        with (folder / name).open("wb") as file:
            file.write(_header(shapes))
            for key in shapes:
                tensor = tensors[key]
                assert isinstance(tensor, GeneratedTensor)
                if hollow_experts and ".experts." in key:
                    file.seek(tensor.nbytes, os.SEEK_CUR)
                else:
                    file.writelines(run.view(np.uint8).data for run in tensor.runs(0, _size(tensor.shape)))
            file.truncate()
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return folder


def generated_checkpoint(folder: Path, text_config: Mapping[str, Any], seed: int = 0) -> Checkpoint:
    """A checkpoint of the same weights whose `folder` has config.json alone: nothing else is on the disk."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["Qwen3_5ForCausalLM"],
        "model_type": "qwen3_5_text",
        "dtype": "bfloat16",
        "eos_token_id": min(248044, text_config.get("vocab_size", 248320) - 1),
        **text_config,
    }
    file = folder / "config.json"
    file.write_text(json.dumps(config, indent=2))
    rng = np.random.default_rng(seed)
    block = (0.02 * rng.standard_normal(_BLOCK, dtype=np.float32)).astype(_BFLOAT16)
    geometry = load_config(folder)
    head = mtp_tensors(geometry) if geometry.mtp_num_hidden_layers else {}
    tensors = {
        name: GeneratedTensor(
            spec.shape, file, block, int(rng.integers(_BLOCK)), float(name.endswith(_AROUND_ONE))
        )
        for name, spec in {**geometry.tensors(), **head}.items()
    }
    return Checkpoint(folder, str(folder), None, geometry, tensors)


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def _shards(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[dict[str, tuple[int, ...]]]:
    """Split `shapes`, in their order, into parts of at most `_SHARD_BYTES` (or one larger tensor)."""
    part: dict[str, tuple[int, ...]] = {}
    part_bytes = 0
    for name, shape in shapes.items():
        nbytes = _size(shape) * _BFLOAT16.itemsize
        if part and part_bytes + nbytes > _SHARD_BYTES:
            yield part
            part, part_bytes = {}, 0
        part[name] = shape
        part_bytes += nbytes
    yield part


def _header(shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    """A safetensors header: 8 bytes of length, JSON padded to 8 bytes (huggingface.co/docs/safetensors)."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + _size(shape) * _BFLOAT16.itemsize
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    content = json.dumps(entries).encode()
    content += b" " * (-len(content) % 8)
    return len(content).to_bytes(8, "little") + content
