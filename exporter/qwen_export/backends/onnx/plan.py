"""An ONNX artifact before any weight is read: its graphs, and every tensor's place in the data file."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from qwen_profiles.schema import Profile

from qwen_export.architecture.mtp import mtp_tensors
from qwen_export.backends.onnx import package
from qwen_export.backends.onnx.stream import Stored
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.graph.builder import DataLayout, GraphBuilder
from qwen_export.graph.embedding import embedding
from qwen_export.graph.model import GraphOptions, decoder
from qwen_export.graph.mtp import mtp_head
from qwen_export.graph.recipe import Recipe
from qwen_export.graph.targets import Target, target_for
from qwen_export.graph.vision import vision_tower

# A prompt with images goes to the decoder in one run, whatever `search.chunk_size` says: ONNX Runtime GenAI
# cannot cut their positions. So the portable graph must take longer runs. Its work grows with the cube of the
# run, and 512 tokens hold an image of about 650 x 650 pixels and a question.
_IMAGE_RUN_TOKENS = 512


@dataclass(frozen=True)
class Plan:
    """An export before any weight is read: graphs by file name, and every tensor's place in the data file."""

    target: Target
    models: dict[str, ir.Model]
    stored: list[Stored]
    data_bytes: int
    max_run_tokens: int | None  # of the decoder; None: any number

    def prequantized_roles(self) -> list[str]:
        """Roles with weights whose codes are the checkpoint's own."""
        return sorted({weight.role for weight, _ in self.stored if weight.prequantized})

    def bytes_by_role(self) -> dict[str, int]:
        totals: dict[str, int] = {}
        for weight, tensors in self.stored:
            totals[weight.role] = totals.get(weight.role, 0) + sum(tensor.nbytes for tensor in tensors)
        return totals


def plan(checkpoint: Checkpoint, profile: Profile, all_logits: bool = False, mtp: bool = False) -> Plan:
    """Build the graphs from the config and lay out the data file; reads no weight."""
    target = target_for(profile.lowering, profile.provider)
    dtype = np.dtype(profile.activation_dtype)
    layout = DataLayout()
    config, vision = checkpoint.config, checkpoint.vision
    recipe = Recipe(
        profile.weights,
        target,
        dtype,
        profile.accuracy_level,
        np.dtype(profile.scale_dtype or profile.activation_dtype),
        checkpoint.tensors,
        profile.layer_weights,
        {**config.tensors(), **mtp_tensors(config), **(vision.tensors() if vision else {})},
    )

    run = max(profile.prefill_chunk, _IMAGE_RUN_TOKENS) if vision else profile.prefill_chunk

    g = GraphBuilder(target, dtype, layout)
    decoder(
        g, config, recipe, GraphOptions(run, all_logits, embeddings=vision is not None, hidden_states=mtp)
    )
    models = {package.MODEL_FILE: g.model("qwen3_5")}
    if vision:
        g = GraphBuilder(target, dtype, layout)
        embedding(g, config, vision, recipe)
        models[package.EMBEDDING_FILE] = g.model("qwen3_5_embedding")
        g = GraphBuilder(target, dtype, layout)
        vision_tower(g, vision, recipe)
        models[package.VISION_FILE] = g.model("qwen3_5_vision")
    if mtp:
        g = GraphBuilder(target, dtype, layout, pairs=True)
        decoder(g, config, recipe, GraphOptions(run, hidden_states=True))
        models[package.SPECULATIVE_FILE] = g.model("qwen3_5_speculative")
        g = GraphBuilder(target, dtype, layout)
        mtp_head(g, config, recipe)
        models[package.MTP_FILE] = g.model("qwen3_5_mtp")
    return Plan(target, models, layout.stored, layout.end, None if target.has("LinearAttention") else run)
