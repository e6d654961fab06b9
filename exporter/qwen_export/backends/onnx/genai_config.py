"""ONNX Runtime GenAI's genai_config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from qwen_common.providers import PROVIDERS
from qwen_profiles.schema import Profile

from qwen_export.architecture.vision import VisionConfig
from qwen_export.backends.onnx.files import EMBEDDING_FILE, MODEL_FILE, PROCESSOR_CONFIG, VISION_FILE
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.graph.model import states

_NO_TOKEN = -1
_FILES = {"decoder": MODEL_FILE, "embedding": EMBEDDING_FILE, "vision": VISION_FILE}


def genai_config(checkpoint: Checkpoint, profile: Profile) -> dict[str, Any]:
    """ONNX Runtime GenAI's description of the model: its files, its inputs and outputs, how to sample."""
    config = checkpoint.config
    generation = checkpoint.generation
    context = min(profile.context_length, config.positions)
    dtype = np.dtype(profile.activation_dtype)
    tokens = "inputs_embeds" if checkpoint.vision else "input_ids"
    inputs = {name: name for name in (tokens, "attention_mask", "position_ids")}
    outputs = {"logits": "logits"}
    kinds = {layer_type: config.layer_types.index(layer_type) for layer_type in config.layer_types}
    names = {"full_attention": ("key", "value"), "linear_attention": ("conv", "recurrent")}
    for layer_type, layer in kinds.items():
        for kind, state in zip(names[layer_type], states(config, layer, dtype), strict=True):
            inputs[f"past_{kind}_names"] = state.past.replace(f".{layer}.", ".%d.")
            outputs[f"present_{kind}_names"] = state.present.replace(f".{layer}.", ".%d.")
    end = generation.eos_token_id
    first_end = end[0] if isinstance(end, list) else end
    record = PROVIDERS[profile.provider]
    options = {**record.options, **profile.provider_options}
    provider_options = [] if record.genai_name is None else [{record.genai_name: options}]
    return {
        "model": {
            "type": checkpoint.genai_type,
            "vocab_size": config.vocab_size,
            "context_length": context,
            "bos_token_id": generation.bos_token_id or config.bos_token_id or first_end,
            "eos_token_id": end,
            # GenAI hides a prompt's pad tokens from attention, and Qwen's is also its <|endoftext|>, which a
            # text may have. One sequence is never padded.
            "pad_token_id": _NO_TOKEN,
            "decoder": {
                "filename": MODEL_FILE,
                "session_options": {**_threads(profile), "provider_options": provider_options},
                "hidden_size": config.hidden_size,
                "head_size": config.head_dim,
                "num_attention_heads": config.num_attention_heads,
                "num_key_value_heads": config.num_key_value_heads,
                "num_hidden_layers": config.num_hidden_layers,
                **_layer_types(checkpoint, profile.lowering),
                "inputs": inputs,
                "outputs": outputs,
            },
            **(_multimodal(checkpoint.vision) if checkpoint.vision else {}),
        },
        "search": {
            **generation.search(),
            "max_length": context,
            "chunk_size": profile.prefill_chunk,
            "past_present_share_buffer": _shares_buffer(profile.lowering),
        },
    }


def genai_overlay(checkpoint: Checkpoint, lowering: str, replaced: Mapping[str, str]) -> dict[str, Any]:
    """What ONNX Runtime GenAI's Config.overlay takes so that it opens further graphs of the artifact.

    An overlay can add layer types, but not take them away (measured with 0.18): the main graphs are without.

    Args:
        lowering: of the further graphs.
        replaced: by a main graph's file name the further one's.
    """
    model = {section: {"filename": replaced[name]} for section, name in _FILES.items() if name in replaced}
    model["decoder"] = {**model.get("decoder", {}), **_layer_types(checkpoint, lowering)}
    return {"model": model, "search": {"past_present_share_buffer": _shares_buffer(lowering)}}


def _threads(profile: Profile) -> dict[str, Any]:
    """0: ONNX Runtime's own choice, every physical core. Without it GenAI takes half of them. Which are the P
    cores is known where it runs, and found there by `qwen_runtime`."""
    options: dict[str, Any] = {
        "intra_op_num_threads": 0 if profile.threads == "performance" else profile.threads
    }
    if profile.spin_us == 0:
        options["session.intra_op.allow_spinning"] = "0"
    elif profile.spin_us is not None:
        options["session.intra_op.spin_duration_us"] = str(profile.spin_us)
    return options


def _layer_types(checkpoint: Checkpoint, lowering: str) -> dict[str, Any]:
    """Told of layer types, GenAI holds the states in a way that cannot return to an earlier point. Untold,
    past and present share a buffer, which only the fused operators are made for."""
    return {} if lowering == "fused" else {"layer_types": list(checkpoint.config.layer_types)}


def _shares_buffer(lowering: str) -> bool:
    """Only GroupQueryAttention writes into the past it was given."""
    return lowering == "fused"


def _multimodal(vision: VisionConfig) -> dict[str, Any]:
    """The models before the decoder; both take their session options from its section."""
    return {
        "image_token_id": vision.image_token_id,
        "video_token_id": vision.video_token_id,
        "vision_start_token_id": vision.vision_start_token_id,
        "embedding": {
            "filename": EMBEDDING_FILE,
            "inputs": {"input_ids": "input_ids", "image_features": "image_features"},
            "outputs": {"inputs_embeds": "inputs_embeds"},
        },
        "vision": {
            "filename": VISION_FILE,
            "config_filename": PROCESSOR_CONFIG,
            "spatial_merge_size": vision.spatial_merge_size,
            "patch_size": vision.patch_size,
            "inputs": {"pixel_values": "pixel_values", "image_grid_thw": "image_grid_thw"},
            "outputs": {"image_features": "image_features"},
        },
    }
