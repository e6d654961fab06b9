"""The vision tower in the file that llama.cpp calls mmproj.

Source: llama.cpp's conversion/qwen3vl.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from qwen_common.errors import UserError

from qwen_export.architecture.vision import VISION
from qwen_export.checkpoint.tensors.tensor import Assembled, CheckpointTensor, Part, float32
from qwen_export.gguf.file import GgufFile
from qwen_export.gguf.metadata import Keys, decimal
from qwen_export.gguf.tensors import tensor

_ARCHITECTURE, _PROJECTOR = "clip", "qwen3vl_merger"
_PREFIX = "clip.vision."  # begins the keys of its metadata
_PATCHES = ("v.patch_embd.weight", "v.patch_embd.weight.1")  # of the first and the second frame
_BLOCK = re.compile(r"v\.blk\.(\d+)\.(\w+)\.(weight|bias)")
_PARTS = {
    "attn_qkv": "attn.qkv",
    "attn_out": "attn.proj",
    "ffn_up": "mlp.linear_fc1",
    "ffn_down": "mlp.linear_fc2",
    "ln1": "norm1",
    "ln2": "norm2",
}
_NAMES = {
    "v.patch_embd.bias": "patch_embed.proj.bias",
    "v.position_embd.weight": "pos_embed.weight",
    "v.post_ln.weight": "merger.norm.weight",
    "v.post_ln.bias": "merger.norm.bias",
    "mm.0.weight": "merger.linear_fc1.weight",
    "mm.0.bias": "merger.linear_fc1.bias",
    "mm.2.weight": "merger.linear_fc2.weight",
    "mm.2.bias": "merger.linear_fc2.bias",
}
_FIELDS = {
    "depth": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_heads": "attention.head_count",
    "patch_size": "patch_size",
    "out_hidden_size": "projection_dim",
    "spatial_merge_size": "spatial_merge_size",
}
# Of the prompt, by what config.json calls their ids.
_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
_PIXELS = {"shortest_edge": "image_min_pixels", "longest_edge": "image_max_pixels"}


@dataclass(frozen=True)
class Frames(Assembled):
    """The patch convolution [out, in, frames, height, width], from a tensor for each frame."""

    frames: tuple[CheckpointTensor, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        n, channels, *patch = self.frames[0].shape
        return n, channels, len(self.frames), *patch

    def _parts(self) -> Iterable[Part]:
        return self.frames

    def read(self, start: int, stop: int) -> np.ndarray:
        return np.stack([float32(frame.read(start, stop)) for frame in self.frames], axis=2)


def vision_config(file: GgufFile) -> dict[str, Any]:
    """The fields of config.json's vision_config.

    Raises:
        UserError: the file is no vision tower of Qwen3.5's, or a key is missing.
    """
    has = Keys(file, _PREFIX)
    projector = file.metadata.get("clip.projector_type", has.get("projector_type"))
    if file.architecture != _ARCHITECTURE or projector != _PROJECTOR:
        found = f"{file.architecture[:60] or 'of no architecture'}, {str(projector)[:60]}"
        raise UserError(
            f"{file.path} is {found}: --mmproj takes the vision tower of Qwen3.5, which is {_ARCHITECTURE}, "
            f"{_PROJECTOR}"
        )
    if any(has.get("is_deepstack_layers") or ()):
        raise UserError(
            f"{file.path} is the vision tower of Qwen3-VL, for it has deepstack layers: give Qwen3.5's"
        )
    values = {field: has.size(key) for field, key in _FIELDS.items()}
    side = has.size("image_size") // values["patch_size"]
    return values | {"num_position_embeddings": side * side}


def processor(file: GgufFile) -> dict[str, Any]:
    """The fields of preprocessor_config.json that the file has.

    Raises:
        UserError: a key is missing.
    """
    has = Keys(file, _PREFIX)
    size = {edge: has.size(key) for edge, key in _PIXELS.items() if has.get(key) is not None}
    return {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "patch_size": has.size("patch_size"),
        "merge_size": has.size("spatial_merge_size"),
        "temporal_patch_size": len(_PATCHES),
        "image_mean": decimal(has["image_mean"]),
        "image_std": decimal(has["image_std"]),
        **({"size": size} if size else {}),
    }


def image_tokens(ids: Mapping[str, int], where: Path) -> dict[str, int]:
    """Ids of the tokens that stand for images, as config.json calls them.

    Raises:
        UserError: the tokenizer of the file `where` has them not.
    """
    if missing := [token for token in _TOKENS.values() if token not in ids]:
        raise UserError(f"{where} has no token {missing[0]}: its model takes no images, leave --mmproj off")
    return {field: ids[token] for field, token in _TOKENS.items()}


def vision_tensors(file: GgufFile) -> tuple[dict[str, CheckpointTensor], list[str]]:
    """The tower's tensors by the model's names, and the file's names of those that are none of it.

    Raises:
        UserError: a type cannot be read.
    """
    found: dict[str, CheckpointTensor] = {}
    unread = []
    for name, stored in file.tensors.items():
        if block := _BLOCK.fullmatch(name):
            number, part, kind = block.groups()
            ours = f"blocks.{number}.{_PARTS[part]}.{kind}" if part in _PARTS else None
        else:
            ours = _NAMES.get(name)
        if ours:
            found[VISION + ours] = tensor(stored, stored.shape)
        elif name not in _PATCHES:
            unread.append(name)
    frames = [file.tensors[name] for name in _PATCHES if name in file.tensors]
    if len(frames) == len(_PATCHES) and frames[0].shape == frames[1].shape and len(frames[0].shape) == 4:
        patches = tuple(tensor(frame, frame.shape) for frame in frames)
        found[f"{VISION}patch_embed.proj.weight"] = Frames(patches)
    return found, unread
