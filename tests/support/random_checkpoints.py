"""Random checkpoints of small, awkward geometries, in the Hugging Face layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Qwen3_5Config,
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from benchmarks.support.checkpoints import TINY, copy_tokenizer
from tests.support.fitting_tokenizer import fit_tokenizer

GEOMETRY: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10_000.0,
        "partial_rotary_factor": 0.25,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
    "num_experts_per_tok": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def random_model(
    seed: int = 0, **overrides: Any
) -> Qwen3_5ForCausalLM | Qwen3_5MoeForCausalLM | Qwen3NextForCausalLM:
    """A float32 model in which no weight keeps its trivial initial value."""
    torch.manual_seed(seed)
    if overrides.get("model_type") == "qwen3_next":
        rope = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25}
        model = Qwen3NextForCausalLM(
            Qwen3NextConfig(**{**GEOMETRY, "rope_parameters": rope, **overrides})
        ).eval()
    elif "num_experts" in overrides:
        model = Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**{**GEOMETRY, **overrides})).eval()
    else:
        model = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**{**GEOMETRY, **overrides})).eval()
    randomise(model)
    return model


def randomise(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(0.0, 0.2)
            elif "visual" in name and ".norm" in name:
                parameter.normal_(1.0, 0.2)
            elif "pos_embed" in name:
                parameter.normal_(0.0, 0.5)
            elif "patch_embed" in name:
                parameter.normal_(0.0, parameter[0].numel() ** -0.5)
            elif name.endswith("linear_attn.norm.weight"):
                parameter.normal_(1.0, 0.2)
            elif name.endswith("norm.weight"):
                parameter.normal_(0.0, 0.2)
            elif name.endswith("A_log"):
                parameter.uniform_(-4.0, 1.0)
            elif name.endswith(("dt_bias", "conv1d.weight")):
                parameter.normal_(0.0, 0.5)
            else:
                parameter.normal_(0.0, 1.5 * parameter.shape[-1] ** -0.5)


def write_random_checkpoint(
    folder: Path, *, shards: int = 1, dtype: torch.dtype = torch.float32, wrap: bool = False, **overrides: Any
) -> Path:
    """Save `random_model(**overrides)` with the trained checkpoint's tokenizer.

    With `wrap`, config and names are those of a vision-language checkpoint's text model.
    """
    model = random_model(**overrides)
    tensors = {name: value.to(dtype).contiguous() for name, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    config = model.config.to_dict()
    if wrap:
        tensors = {
            name.replace("model.", "model.language_model.", 1): value for name, value in tensors.items()
        }
        tied = config.pop("tie_word_embeddings")
        outer = config["model_type"].removesuffix("_text")
        config = {"model_type": outer, "text_config": config, "tie_word_embeddings": tied}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_shards(folder, tensors, shards)
    copy_tokenizer(TINY, folder)
    fit_tokenizer(folder, model.config.vocab_size)
    return folder


VISION = {
    "depth": 2,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_heads": 3,
    "patch_size": 4,
    "num_position_embeddings": 49,
}
# As in the trained checkpoint's tokenizer.
VISION_TOKENS = {
    "vision_start_token_id": 2038,
    "vision_end_token_id": 2039,
    "image_token_id": 2040,
    "video_token_id": 2041,
}
PROCESSOR = {
    "size": {"shortest_edge": 1024, "longest_edge": 65536},
    "patch_size": 4,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.5, 0.6, 0.7],
}
VISION_TEMPLATE = """
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' }}
{%- if message.content is string %}
{{- message.content }}
{%- else %}
{%- for part in message.content %}
{%- if 'image' in part or 'image_url' in part or part.type == 'image' %}
{{- '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif 'text' in part %}
{{- part.text }}
{%- endif %}
{%- endfor %}
{%- endif %}
{{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}
{%- endif %}
"""


def random_vision_model(seed: int = 0, **overrides: Any) -> torch.nn.Module:
    """A float32 vision-language model; with `num_experts` its text model is a mixture of experts.

    `vision` overrides fields of the vision tower.
    """
    torch.manual_seed(seed)
    vision = {**VISION, **overrides.pop("vision", {})}
    text = {**GEOMETRY, "vocab_size": 2048, "eos_token_id": 2037, "pad_token_id": 2035, **overrides}
    vision["out_hidden_size"] = text["hidden_size"]
    config_type, model_type = (
        (Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration)
        if "num_experts" in overrides
        else (Qwen3_5Config, Qwen3_5ForConditionalGeneration)
    )
    config = config_type(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=text["tie_word_embeddings"],
        **VISION_TOKENS,
    )
    model = model_type(config).eval()
    randomise(model)
    return model


def write_vision_checkpoint(folder: Path, **overrides: Any) -> Path:
    """Save `random_vision_model(**overrides)` as the hub's checkpoints are laid out."""
    model = random_vision_model(**overrides)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()))
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    save_tensors(folder, model)
    copy_tokenizer(TINY, folder)
    (folder / "chat_template.jinja").write_text(VISION_TEMPLATE)
    return folder


def save_shards(folder: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    """model.safetensors, or numbered shards and their index."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    names = sorted(tensors)
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def edit_config(folder: Path, **values: object) -> None:
    """Set entries of config.json."""
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(config))


def store_head(folder: Path, equal: bool = False) -> torch.Tensor:
    """Put lm_head.weight into a checkpoint with a tied embedding: `equal` to it, or another."""
    tensors = load_tensors(folder)
    (embedding,) = (value for name, value in tensors.items() if name.endswith("embed_tokens.weight"))
    noise = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(7))
    tensors["lm_head.weight"] = embedding.float().clone() if equal else noise
    save_shards(folder, tensors, 1)
    return tensors["lm_head.weight"]


def save_tensors(
    folder: Path, model: torch.nn.Module, change: Callable[[dict[str, torch.Tensor]], None] = lambda _: None
) -> None:
    """Replace the weights in `folder` with those of `model`, after `change`."""
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    change(tensors)
    save_shards(folder, tensors, 1)
