"""Checkpoints in FP8, GPTQ and AWQ, written by the definitions of those formats."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.support.checkpoints import TINY, copy_tokenizer
from tests.support.fitting_tokenizer import fit_tokenizer
from tests.support.random_checkpoints import random_model, save_shards

# Rows that groups of 128 divide, one of them into an odd number; key and value heads fill half an FP8 block.
GEOMETRY: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
PROJECTIONS = ("gate_proj", "up_proj", "down_proj", "q_proj", "k_proj", "v_proj", "o_proj", "in_proj_qkv")


@dataclass(frozen=True)
class Method:
    """A format: what stands in config.json, and a weight [N, K] -> (tensors by suffix, what they mean)."""

    config: dict[str, Any]
    pack: Callable[[np.ndarray], tuple[dict[str, torch.Tensor], np.ndarray]]


def fp8_blocks(weight: np.ndarray) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """float8_e4m3fn, and a bfloat16 factor for each block of 128 x 128."""
    rows, columns = weight.shape
    scales = torch.empty(-(-rows // 128), -(-columns // 128), dtype=torch.bfloat16)
    values = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    meaning = np.empty_like(weight)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1))
            scale = torch.tensor(np.abs(weight[block]).max() / 448).to(torch.bfloat16)
            scales[i, j] = scale
            values[block] = (torch.from_numpy(weight[block]) / scale.float()).to(torch.float8_e4m3fn)
            meaning[block] = values[block].float().numpy() * float(scale)
    return {"weight": values, "weight_scale_inv": scales}, meaning


FP8 = Method(
    {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head", "model.language_model.embed_tokens"],
    },
    fp8_blocks,
)


def integers(weight: np.ndarray, group: int, sym: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [N, K], zero points [N, groups], float16 scales [N, groups]: rounding to the nearest."""
    n, k = weight.shape
    blocks = weight.reshape(n, k // group, group)
    if sym:
        scales = np.abs(blocks).max(-1) / 7
        zeros = np.full(scales.shape, 8)
    else:
        low, high = np.minimum(blocks.min(-1), 0), np.maximum(blocks.max(-1), 0)
        scales = (high - low) / 15
        zeros = np.rint(-low / scales)
    scales = scales.astype(np.float16)
    codes = np.rint(blocks / scales.astype(np.float32)[..., None]) + zeros[..., None]
    return np.clip(codes, 0, 15).reshape(n, k).astype(np.uint32), zeros.astype(np.uint32), scales


def meaning_of(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray) -> np.ndarray:
    group = codes.shape[1] // zeros.shape[1]
    spread = [np.repeat(part.astype(np.float32), group, axis=1) for part in (zeros, scales)]
    return (codes.astype(np.float32) - spread[0]) * spread[1]


def pack_int32(codes: np.ndarray, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """[rows, 8 n] -> int32 [rows, n]; the code of column order[i] of each 8 at bits 4 i and up."""
    packed = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
    for word in range(packed.shape[1]):
        for place, column in enumerate(order):
            packed[:, word] |= codes[:, 8 * word + column].astype(np.uint32) << np.uint32(4 * place)
    return torch.from_numpy(packed.view(np.int32))


def gptq(group: int = 128, sym: bool = True, version: str = "gptq", desc_act: bool = False) -> Method:
    """GPTQModel's layout: codes packed along the input features; zero points less one in version 1."""

    def pack(weight: np.ndarray) -> tuple[dict[str, torch.Tensor], np.ndarray]:
        turned = slice(None, None, -1 if desc_act else 1)
        codes, zeros, scales = integers(weight[:, turned], group, sym)
        meaning, codes = meaning_of(codes, zeros, scales)[:, turned], codes[:, turned]
        stored_zeros = zeros.T - (1 if version == "gptq" else 0)
        order = np.arange(weight.shape[1]) // group
        tensors = {
            "qweight": pack_int32(codes).T.contiguous(),
            "qzeros": pack_int32(stored_zeros),
            "scales": torch.from_numpy(np.ascontiguousarray(scales.T)),
            "g_idx": torch.from_numpy(order[turned].astype(np.int32)),
        }
        return tensors, np.ascontiguousarray(meaning)

    config = {"quant_method": "gptq", "bits": 4, "group_size": group, "sym": sym, "desc_act": desc_act}
    return Method({**config, "checkpoint_format": version, "pack_dtype": "int32"}, pack)


def awq(group: int = 128) -> Method:
    """AutoAWQ's GEMM layout: codes packed along the output features, in the order of its kernel."""

    def pack(weight: np.ndarray) -> tuple[dict[str, torch.Tensor], np.ndarray]:
        codes, zeros, scales = integers(weight, group, sym=False)
        tensors = {
            "qweight": pack_int32(codes.T, AWQ_ORDER),
            "qzeros": pack_int32(zeros.T, AWQ_ORDER),
            "scales": torch.from_numpy(np.ascontiguousarray(scales.T)),
        }
        return tensors, meaning_of(codes, zeros, scales)

    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    return Method(config, pack)


def unfuse(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each expert's projections as tensors of their own."""
    result = {}
    for name, value in tensors.items():
        prefix, _, kind = name.rpartition(".")
        if not prefix.endswith(".experts"):
            result[name] = value
            continue
        for expert, weight in enumerate(value):
            parts = weight.chunk(2) if kind == "gate_up_proj" else (weight,)
            kinds = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
            for part, own in zip(parts, kinds, strict=True):
                result[f"{prefix}.{expert}.{own}.weight"] = part.contiguous()
    return result


def fuse(tensors: dict[str, torch.Tensor], names: list[str]) -> dict[str, torch.Tensor]:
    """The inverse, for a state dict of `names`."""
    result = {}
    for name in names:
        prefix, _, kind = name.rpartition(".")
        if not prefix.endswith(".experts"):
            result[name] = tensors[name]
            continue
        kinds = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
        count = sum(other.startswith(prefix) and other.endswith("down_proj.weight") for other in tensors)
        result[name] = torch.stack(
            [
                torch.cat([tensors[f"{prefix}.{expert}.{own}.weight"] for own in kinds])
                for expert in range(count)
            ]
        )
    return result


def write_quantized_checkpoint(
    folder: Path,
    method: Method | None,
    chosen: tuple[str, ...] = PROJECTIONS,
    edit: Callable[[dict[str, torch.Tensor], dict[str, Any]], None] = lambda tensors, config: None,
    **overrides: Any,
) -> tuple[Path, torch.nn.Module]:
    """A checkpoint as published, a text model inside a vision-language one, and what its weights mean.

    Args:
        method: None leaves the weights float32, experts one by one.
        chosen: parts of the names of the projections that are quantised, where their rows are whole groups.
        edit: changes tensors and config.json before they are written.

    Returns:
        The folder, and a float32 model with the dequantised weights.
    """
    model = random_model(**{**GEOMETRY, **overrides})
    state = dict(model.state_dict())
    names = list(state)
    meant, stored = unfuse(state), {}
    for name, value in list(meant.items()):
        module, _, kind = name.rpartition(".")
        whole = value.dim() == 2 and value.shape[1] % 128 == 0
        if method and kind == "weight" and whole and any(f".{part}." in name for part in chosen):
            tensors, meaning = method.pack(value.numpy())
            stored |= {f"{module}.{suffix}": tensor for suffix, tensor in tensors.items()}
            meant[name] = torch.from_numpy(meaning)
        elif name != "lm_head.weight":
            stored[name] = value
    model.load_state_dict(fuse(meant, names))
    stored = {name.replace("model.", "model.language_model.", 1): value for name, value in stored.items()}
    text = model.config.to_dict()
    config = {"model_type": text["model_type"].removesuffix("_text"), "text_config": text}
    config |= {"tie_word_embeddings": text["tie_word_embeddings"]}
    if method:
        config["quantization_config"] = dict(method.config)
    edit(stored, config)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_shards(folder, stored, 1)
    copy_tokenizer(TINY, folder)
    fit_tokenizer(folder, model.config.vocab_size)
    return folder, model
