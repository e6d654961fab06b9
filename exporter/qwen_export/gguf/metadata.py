"""From a GGUF file's metadata to the fields of config.json and generation_config.json.

Real numbers are stored in float32: they become the shortest decimals that give those.
Source: llama.cpp's conversion/base.py, src/models/qwen35.cpp and qwen3next.cpp, which have the same defaults.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from qwen_common.errors import UserError

from qwen_export.architecture.registry import config_class
from qwen_export.gguf.file import GgufFile

MODEL_TYPES = {"qwen35": "qwen3_5_text", "qwen35moe": "qwen3_5_moe_text", "qwen3next": "qwen3_next"}
_OTHERS = {
    "clip": "a vision tower: name it with --mmproj, and give the text model's file",
    "qwen4exp": "Qwen3.8-Flash-Next's, which is not supported (docs/architecture.md)",
}
# Of an MTP head that shares neither the model's embedding nor its head.
_OWN_EMBEDDING = ("nextn.embed_tokens.weight", "nextn.shared_head_head.weight")
_MOST_SHOWN = 60  # characters of a wrong value
# A field of config.json, by the key without the architecture at its beginning.
_FIELDS = {
    "hidden_size": "embedding_length",
    "max_position_embeddings": "context_length",
    "num_attention_heads": "attention.head_count",
    "head_dim": "attention.key_length",
    "linear_conv_kernel_dim": "ssm.conv_kernel",
    "linear_key_head_dim": "ssm.state_size",
    "linear_num_key_heads": "ssm.group_count",
    "linear_num_value_heads": "ssm.time_step_rank",
}
_DENSE = {"intermediate_size": "feed_forward_length"}
_MIXTURE = {
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
}
_SAMPLING = {
    "temperature": "general.sampling.temp",
    "top_k": "general.sampling.top_k",
    "top_p": "general.sampling.top_p",
    "min_p": "general.sampling.min_p",
    "repetition_penalty": "general.sampling.penalty_repeat",
}
_YARN = {
    "factor": "rope.scaling.factor",
    "original_max_position_embeddings": "rope.scaling.original_context_length",
    "attention_factor": "rope.scaling.yarn_attn_factor",
    "beta_fast": "rope.scaling.yarn_beta_fast",
    "beta_slow": "rope.scaling.yarn_beta_slow",
}


def model_type(file: GgufFile) -> str:
    """As a text model's config.json says it.

    Raises:
        UserError: `general.architecture` is another one, or missing.
    """
    if file.architecture in MODEL_TYPES:
        return MODEL_TYPES[file.architecture]
    named = f"{file.path}: general.architecture is {file.architecture[:_MOST_SHOWN] or 'missing'}"
    if known := _OTHERS.get(file.architecture):
        raise UserError(f"{named}, {known}")
    raise UserError(f"{named}, which is not Qwen3.5: supported are {', '.join(MODEL_TYPES)}")


def text_config(file: GgufFile) -> dict[str, Any]:
    """The fields of a text model's config.json.

    Raises:
        UserError: as `model_type`, or a key is missing, or what it says is not supported.
    """
    kind = model_type(file)
    has = Keys(file, file.architecture + ".")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise UserError(f"{file.path} has no tensor token_embd.weight: is it a part of a model?")
    nextn = has.get("nextn_predict_layers", 0)
    layers = has.size("block_count") - (nextn if isinstance(nextn, int) else 0)
    known = config_class(kind)
    fields = _FIELDS | (_MIXTURE if "num_experts" in known.model_fields else _DENSE)
    inner, heads = has.size("ssm.inner_size"), has.size("ssm.time_step_rank")
    if inner % heads:
        raise UserError(f"{file.path}: ssm.inner_size {inner} is no multiple of ssm.time_step_rank {heads}")
    own_embedding = any(name.endswith(_OWN_EMBEDDING) for name in file.tensors)
    return {
        "model_type": kind,
        **{field: has.size(key) for field, key in fields.items()},
        "vocab_size": embedding.shape[0],
        "num_hidden_layers": layers,
        **_layer_types(has, layers),
        "num_key_value_heads": _one(has["attention.head_count_kv"]),
        "linear_value_head_dim": inner // heads,
        "rms_norm_eps": decimal(has["attention.layer_norm_rms_epsilon"]),
        "rope_parameters": _rope(has, known.has_text_section),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "mtp_num_hidden_layers": nextn,
        "mtp_use_dedicated_embeddings": own_embedding,
    }


def sampling(file: GgufFile) -> dict[str, Any]:
    """The fields of generation_config.json that say how tokens are chosen."""
    found = {field: decimal(file.metadata[key]) for field, key in _SAMPLING.items() if key in file.metadata}
    return found | ({"do_sample": True} if found else {})


def decimal(value: Any) -> Any:
    """A float32 as the shortest decimal that gives it, in lists, too; anything else as it is."""
    if isinstance(value, list):
        return [decimal(entry) for entry in value]
    return float(str(np.float32(value))) if isinstance(value, float) else value


class Keys:
    """Metadata by key, without what all of them begin with."""

    def __init__(self, file: GgufFile, prefix: str) -> None:
        self.path = file.path
        self._metadata, self._prefix = file.metadata, prefix

    def get(self, key: str, default: Any = None) -> Any:
        return self._metadata.get(self._prefix + key, default)

    def __getitem__(self, key: str) -> Any:
        """Raises:
        UserError: there is no such key.
        """
        found = self.get(key)
        if found is None:
            raise UserError(f"{self.path} has no {self._prefix}{key}: download it again")
        return found

    def size(self, key: str) -> int:
        """Raises:
        UserError: there is no such key, or it is no positive whole number.
        """
        found = _one(self[key])
        if not isinstance(found, int) or found <= 0:
            raise UserError(
                f"{self.path}: {self._prefix}{key} is {str(found)[:_MOST_SHOWN]}, which is no number above 0"
            )
        return found


def _one(value: Any) -> Any:
    """Where every layer has a value of its own, that of all which have any (0: no attention there)."""
    if not isinstance(value, list):
        return value
    found = {entry for entry in value if entry}
    return found.pop() if len(found) == 1 else value


def _layer_types(has: Keys, layers: int) -> dict[str, Any]:
    recurrent = has.get("attention.recurrent_layers")
    if not isinstance(recurrent, list):
        interval = has.get("full_attention_interval")
        return {} if interval is None else {"full_attention_interval": interval}
    kinds = ["linear_attention" if found else "full_attention" for found in recurrent]
    return {"layer_types": kinds[:layers]}


def _rope(has: Keys, three_axes: bool) -> dict[str, Any]:
    """Args:
    three_axes: a position has a place in time, height and width.
    """
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": decimal(has["rope.freq_base"]),
        "partial_rotary_factor": has.size("rope.dimension_count") / has.size("attention.key_length"),
    }
    if three_axes:
        sections = has["rope.dimension_sections"]
        if not isinstance(sections, list) or len(sections) not in (3, 4) or any(sections[3:]):
            raise UserError(f"{has.path}: rope.dimension_sections {sections} is not supported")
        rope |= {"mrope_section": sections[:3], "mrope_interleaved": True}
    kind = has.get("rope.scaling.type", "none")
    if kind == "none":
        return rope
    if kind != "yarn":
        raise UserError(f"{has.path}: rope.scaling.type {str(kind)[:_MOST_SHOWN]} is not supported")
    stretched = {field: decimal(has.get(key)) for field, key in _YARN.items() if has.get(key) is not None}
    return rope | stretched | {"rope_type": "yarn"}
