"""GGUF files of a checkpoint, as llama.cpp's converter writes them.

What it does to names, orders and numbers is done here again, in PyTorch and the other way round than the
reader does. Its own files were compared with these, tensor by tensor and key by key (docs/checkpoints.md).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, TokenType, get_tensor_name_map
from gguf.quants import quantize
from qwen_export.checkpoint.tensors.names import tensor_name
from safetensors.torch import load_file
from transformers import AutoTokenizer

Kind = GGMLQuantizationType
F32 = Kind.F32
_FLOATS = ("ffn_gate_inp", "conv1d", "position_embd")  # matrices that llama.cpp keeps
_NEXTN = {
    "mtp.fc": "eh_proj",
    "mtp.pre_fc_norm_embedding": "enorm",
    "mtp.pre_fc_norm_hidden": "hnorm",
    "mtp.norm": "shared_head_norm",
}


def write_gguf(
    checkpoint: Path,
    path: Path,
    kind: Kind = F32,
    *,
    fuse: bool = False,
    parts: int = 1,
    change: Callable[[str, np.ndarray], tuple[np.ndarray, Kind] | None] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """The text model of `checkpoint` in the file `path`; its first part where there are several.

    Args:
        kind: of the matrices; the rest is F32, as llama.cpp keeps it.
        fuse: an expert's gate and up projection are one tensor, and Qwen3-Next's projections are as its
            checkpoint has them.
        change: the bytes and the type of a tensor that shall have others.
        metadata: keys that are set, or left out (None).
    """
    config = json.loads((checkpoint / "config.json").read_text())
    text = config.get("text_config", config)
    architecture = _architecture(text)
    keys = {**_keys(text, architecture), **_tokenizer(checkpoint, text["vocab_size"]), **(metadata or {})}
    if parts > 1:
        path = path.with_name(f"{path.stem}-{1:05}-of-{parts:05}.gguf")
    tensors = list(_tensors(_state(checkpoint), text, fuse))
    for part in range(parts):
        file = path if parts == 1 else path.with_name(path.name.replace("-00001-of", f"-{part + 1:05}-of"))
        own = keys if part == 0 else {}
        if parts > 1:
            own = {**own, "split.no": part, "split.count": parts, "split.tensors.count": len(tensors)}
        chosen = tensors[len(tensors) * part // parts : len(tensors) * (part + 1) // parts]
        _write(file, architecture, own, _stored(chosen, kind, change))
    return path


def write_mmproj(checkpoint: Path, path: Path, kind: Kind = F32) -> Path:
    """The vision tower of `checkpoint`."""
    config = json.loads((checkpoint / "config.json").read_text())
    vision = config["vision_config"]
    side = int(vision["num_position_embeddings"] ** 0.5) * vision["patch_size"]
    keys = {
        "general.type": "mmproj",
        "clip.has_vision_encoder": True,
        "clip.projector_type": "qwen3vl_merger",
        "clip.use_gelu": True,
        "clip.vision.projection_dim": vision["out_hidden_size"],
        "clip.vision.image_size": side,
        "clip.vision.patch_size": vision["patch_size"],
        "clip.vision.embedding_length": vision["hidden_size"],
        "clip.vision.feed_forward_length": vision["intermediate_size"],
        "clip.vision.block_count": vision["depth"],
        "clip.vision.attention.head_count": vision["num_heads"],
        "clip.vision.attention.layer_norm_epsilon": 1e-6,
        "clip.vision.image_mean": [0.5] * 3,
        "clip.vision.image_std": [0.5] * 3,
        "clip.vision.spatial_merge_size": vision["spatial_merge_size"],
        "clip.vision.is_deepstack_layers": [False] * vision["depth"],
    }
    _write(path, "clip", keys, _stored(list(_tower(_state(checkpoint))), kind, None))
    return path


def _architecture(text: Mapping[str, Any]) -> str:
    if text["model_type"] == "qwen3_next":
        return "qwen3next"
    return "qwen35moe" if "num_experts" in text else "qwen35"


def _state(checkpoint: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(checkpoint / "model.safetensors")
    return {tensor_name(name): value.float() for name, value in tensors.items()}


def _keys(text: dict[str, Any], architecture: str) -> dict[str, Any]:
    rope, layers = text["rope_parameters"], text["num_hidden_layers"]
    nextn = text.get("mtp_num_hidden_layers", 0)
    found = {
        "block_count": layers + nextn,
        "context_length": text["max_position_embeddings"],
        "embedding_length": text["hidden_size"],
        "attention.head_count": text["num_attention_heads"],
        "attention.head_count_kv": text["num_key_value_heads"],
        "attention.key_length": text["head_dim"],
        "attention.value_length": text["head_dim"],
        "attention.layer_norm_rms_epsilon": text["rms_norm_eps"],
        "attention.recurrent_layers": [
            *(kind == "linear_attention" for kind in text["layer_types"]),
            *[False] * nextn,
        ],
        "full_attention_interval": 4,
        "rope.freq_base": rope["rope_theta"],
        "rope.dimension_count": int(text["head_dim"] * rope["partial_rotary_factor"]),
        "ssm.conv_kernel": text["linear_conv_kernel_dim"],
        "ssm.state_size": text["linear_key_head_dim"],
        "ssm.group_count": text["linear_num_key_heads"],
        "ssm.time_step_rank": text["linear_num_value_heads"],
        "ssm.inner_size": text["linear_value_head_dim"] * text["linear_num_value_heads"],
    }
    if "mrope_section" in rope:
        found["rope.dimension_sections"] = [*rope["mrope_section"], 0]
    if nextn:
        found["nextn_predict_layers"] = nextn
    if "num_experts" in text:
        found |= {
            "expert_count": text["num_experts"],
            "expert_used_count": text["num_experts_per_tok"],
            "expert_feed_forward_length": text["moe_intermediate_size"],
            "expert_shared_feed_forward_length": text["shared_expert_intermediate_size"],
        }
    if architecture != "qwen35moe":
        found["feed_forward_length"] = text["intermediate_size"]
    return {f"{architecture}.{key}": value for key, value in found.items()}


def _tokenizer(checkpoint: Path, vocab_size: int) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    texts = {id: token for token, id in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, kinds = [], []
    for id in range(vocab_size):
        tokens.append(texts.get(id, f"[PAD{id}]"))
        special = id in added and (added[id].special or tokens[id].startswith("<|"))
        kinds.append(
            TokenType.UNUSED
            if id not in texts
            else TokenType.CONTROL
            if special
            else TokenType.USER_DEFINED
            if id in added
            else TokenType.NORMAL
        )
    merges = json.loads((checkpoint / "tokenizer.json").read_text())["model"]["merges"]
    found = {
        "general.sampling.top_k": 20,
        "general.sampling.top_p": 0.95,
        "general.sampling.temp": 0.7,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen35",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [int(kind) for kind in kinds],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.ggml.padding_token_id": tokenizer.pad_token_id,
        "tokenizer.ggml.add_bos_token": False,
    }
    template = (checkpoint / "chat_template.jinja").read_text()
    return found | {"tokenizer.chat_template": template}


def _tensors(
    state: Mapping[str, torch.Tensor], text: dict[str, Any], fuse: bool
) -> Iterator[tuple[str, np.ndarray]]:
    layers = text["num_hidden_layers"]
    arch = MODEL_ARCH[_architecture(text).upper()]
    names = get_tensor_name_map(arch, layers + 1)
    for ours, value in state.items():
        if ours.startswith("model.visual.") or (ours == "lm_head.weight" and text["tie_word_embeddings"]):
            continue
        name = ours.replace("mtp.layers.0.", f"model.layers.{layers}.")
        value = _as_llama(name, value, text)
        if name.startswith("mtp."):
            module = _NEXTN[name.removesuffix(".weight")]
            yield f"blk.{layers}.nextn.{module}.weight", value.numpy()
        elif name.endswith("experts.gate_up_proj"):
            block = f"blk.{name.split('.')[2]}"
            if fuse:
                yield f"{block}.ffn_gate_up_exps.weight", value.numpy()
            else:
                gate, up = value.chunk(2, dim=1)
                yield f"{block}.ffn_gate_exps.weight", gate.contiguous().numpy()
                yield f"{block}.ffn_up_exps.weight", up.contiguous().numpy()
        elif name.endswith("in_proj_qkvz.weight") and not fuse:
            qkv, z = _split(value, text)
            block = f"blk.{name.split('.')[2]}"
            yield f"{block}.attn_qkv.weight", qkv.numpy()
            yield f"{block}.attn_gate.weight", z.numpy()
        elif name.endswith("dt_bias"):
            yield f"blk.{name.split('.')[2]}.ssm_dt.bias", value.numpy()
        else:
            found = names.get_name(name, try_suffixes=(".weight",))
            assert found, name
            yield found + (".weight" if name.endswith("experts.down_proj") else ""), value.numpy()


def _split(fused: torch.Tensor, text: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Qwen3-Next's queries, keys, values and gates of a key head after the other, each by itself."""
    groups, key = text["linear_num_key_heads"], text["linear_key_head_dim"]
    value = text["linear_num_value_heads"] // groups * text["linear_value_head_dim"]
    by_head = fused.reshape(groups, -1, fused.shape[-1]).split([key, key, value, value], dim=1)
    q, k, v, z = (part.reshape(-1, fused.shape[-1]) for part in by_head)
    return torch.cat([q, k, v]), z.contiguous()


def _as_llama(name: str, value: torch.Tensor, text: dict[str, Any]) -> torch.Tensor:
    groups, heads = text["linear_num_key_heads"], text["linear_num_value_heads"]
    height = text["linear_value_head_dim"]
    before = 2 * groups * text["linear_key_head_dim"]

    def tiled(part: torch.Tensor, size: int) -> torch.Tensor:
        """Value heads along axis 0: by their place in a group, then by group."""
        if text["model_type"] == "qwen3_next":
            return part
        grouped = part.reshape(groups, heads // groups, size, *part.shape[1:])
        return grouped.transpose(0, 1).reshape(part.shape).contiguous()

    kind = name.partition("linear_attn.")[2]
    if kind in ("in_proj_qkv.weight", "conv1d.weight"):
        value = torch.cat([value[:before], tiled(value[before:], height)])
    elif kind == "in_proj_z.weight":
        value = tiled(value, height)
    elif kind in ("in_proj_a.weight", "in_proj_b.weight", "dt_bias", "A_log"):
        value = tiled(value, 1)
    elif kind == "out_proj.weight":
        value = tiled(value.T.contiguous(), height).T.contiguous()
    if kind == "conv1d.weight":
        value = value.squeeze(1)
    elif kind == "A_log":
        value = -torch.exp(value)
    elif value.ndim == 1 and "norm" in name and kind != "norm.weight":
        value = value + 1
    return value


def _tower(state: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, np.ndarray]]:
    names = {
        "patch_embed.proj.bias": "v.patch_embd.bias",
        "pos_embed.weight": "v.position_embd.weight",
        "merger.norm.": "v.post_ln.",
        "merger.linear_fc1.": "mm.0.",
        "merger.linear_fc2.": "mm.2.",
        ".attn.qkv.": ".attn_qkv.",
        ".attn.proj.": ".attn_out.",
        ".mlp.linear_fc1.": ".ffn_up.",
        ".mlp.linear_fc2.": ".ffn_down.",
        ".norm1.": ".ln1.",
        ".norm2.": ".ln2.",
        "blocks.": "v.blk.",
    }
    for ours, value in state.items():
        if not ours.startswith("model.visual."):
            continue
        name = ours.removeprefix("model.visual.")
        if name == "patch_embed.proj.weight":
            yield "v.patch_embd.weight", value[:, :, 0].contiguous().numpy()
            yield "v.patch_embd.weight.1", value[:, :, 1].contiguous().numpy()
            continue
        for part, theirs in names.items():
            name = name.replace(part, theirs)
        yield name, value.numpy()


def _stored(
    tensors: list[tuple[str, np.ndarray]],
    kind: Kind,
    change: Callable[[str, np.ndarray], tuple[np.ndarray, Kind] | None] | None,
) -> Iterator[tuple[str, np.ndarray, Kind]]:
    for name, value in tensors:
        if change and (found := change(name, value)):
            yield name, *found
            continue
        plain = value.ndim < 2 or any(part in name for part in _FLOATS)
        plain = plain or (value.ndim == 4 and kind is not Kind.F16)
        own = F32 if plain or (value.ndim < 4 and value.shape[-1] % 32) else kind
        yield name, value if own is F32 else quantize(value, own), own


def _write(
    path: Path,
    architecture: str,
    keys: Mapping[str, Any],
    tensors: Iterator[tuple[str, np.ndarray, Kind]],
) -> None:
    writer = GGUFWriter(path, keys.get("general.architecture", architecture))
    for key, value in keys.items():
        if key != "general.architecture" and value is not None:
            _add(writer, key, value)
    for name, value, kind in tensors:
        writer.add_tensor(name, value, raw_dtype=None if kind is F32 else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    adders: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    adders[type(value)](key, value)
