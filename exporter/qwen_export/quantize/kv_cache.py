"""Scales of a KV cache in INT8 (`graph.kv_cache`), from what each channel reaches on calibration text.

A rotary embedding turns keys in pairs of channels, by angles that grow with the position. So the length of a
pair counts, which no position changes, and both have its scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from qwen_common.errors import UserError

from qwen_export import reference
from qwen_export.architecture.models.qwen3_5 import TextConfig
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.checkpoint.tensors.tensor import CheckpointTensor
from qwen_export.graph.kv_cache import attention_blocks, cache_specs, scaled_norm, value_scale
from qwen_export.graph.weights import one_plus
from qwen_export.quantize.chunked_delta_rule import chunked_delta_rule

CACHE_SAMPLES = 8  # of calibration text, at most
_LARGEST_CODE = 127
# What no calibration text shows is cut off: this times the largest that it does show still has a code.
# Measured in docs/quality.md.
_HEADROOM = 1.5


@dataclass(eq=False)
class FoundTensor:
    """A tensor that no checkpoint has: a `CheckpointTensor`, once `values` are there."""

    shape: tuple[int, ...]
    values: np.ndarray | None = None

    @property
    def nbytes(self) -> int:
        return 0

    @property
    def files(self) -> frozenset[Path]:
        return frozenset()

    def read(self, start: int, stop: int) -> np.ndarray:
        assert self.values is not None  # `find_cache_scales` was here
        return self.values[start:stop]


def with_cache_scales(checkpoint: Checkpoint) -> Checkpoint:
    """`checkpoint` and the tensors of `cache_specs`, whose values are still to be found."""
    found = {name: FoundTensor(spec.shape) for name, spec in cache_specs(checkpoint.config).items()}
    return replace(checkpoint, tensors={**checkpoint.tensors, **found})


def find_cache_scales(
    config: TextConfig, tensors: Mapping[str, CheckpointTensor], samples: np.ndarray
) -> None:
    """Run the model in float32, layer by layer, and fill in what `with_cache_scales` added.

    Args:
        samples: int64 [samples, tokens] of text.

    Raises:
        UserError: activations overflow.
    """
    blocks = attention_blocks(config)
    watched = _Watched(tensors)
    hidden = reference.embed(config, watched, samples)
    for layer in range(max(blocks, default=-1) + 1):
        with np.errstate(over="ignore", invalid="ignore"):  # reported below
            hidden = reference.layer(config, watched, layer, hidden, chunked_delta_rule)
        if layer in blocks:
            _fill(config, watched, blocks[layer])


class _Watched(reference.Weights):
    """Weights that keep the last keys and values that they made."""

    def __init__(self, tensors: Mapping[str, CheckpointTensor]) -> None:
        super().__init__(tensors)
        self.tensors = tensors
        self.made: dict[str, np.ndarray] = {}

    def linear(self, name: str, x: np.ndarray, expert: int | None = None) -> np.ndarray:
        result = super().linear(name, x, expert)
        if name.endswith((".self_attn.k_proj.weight", ".self_attn.v_proj.weight")):
            self.made[name] = result
        return result


def _fill(config: TextConfig, watched: _Watched, name: str) -> None:
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    key, value = (
        watched.made.pop(f"{name}.{made}.weight").reshape(-1, kv_heads, dim) for made in ("k_proj", "v_proj")
    )
    key = reference.rms_norm(config, watched, f"{name}.k_norm.weight", key)
    half = config.rotary_dim // 2
    pair = np.hypot(key[..., :half], key[..., half : 2 * half])
    key[..., :half] = key[..., half : 2 * half] = pair
    key_scale, found_scale = (_scale(name, reached) for reached in (key, value))
    norms = (one_plus(watched.whole(f"{name}.{norm}.weight")) for norm in ("q_norm", "k_norm"))
    query_norm, key_norm = (np.broadcast_to(norm, (kv_heads, dim)) for norm in norms)
    queries = np.repeat(query_norm * key_scale, heads // kv_heads, axis=0)
    for tensor, values in (
        (scaled_norm(name), np.concatenate([queries, key_norm / key_scale])),
        (value_scale(name), found_scale),
    ):
        found = watched.tensors[tensor]
        assert isinstance(found, FoundTensor)
        found.values = values


def _scale(name: str, reached: np.ndarray) -> np.ndarray:
    """reached [tokens, kv_heads, dim] -> [kv_heads, dim], none of it 0."""
    most = np.abs(reached).max(axis=0)
    if not np.isfinite(most).all():
        raise UserError(
            f"keys or values of {name} overflow on the calibration text: leave cache_dtype at its default"
        )
    # A channel that is nearly still gets codes for what the others are likely to reach.
    most = np.maximum(most, most.mean(axis=-1, keepdims=True) / _LARGEST_CODE + np.finfo(np.float32).tiny)
    return most * np.float32(_HEADROOM / _LARGEST_CODE)
