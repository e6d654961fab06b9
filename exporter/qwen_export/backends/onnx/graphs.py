"""An ONNX artifact before any weight is read: its graphs, and every tensor's place in the data file."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from qwen_profiles.schema import Profile

from qwen_export.architecture.mtp import mtp_tensors
from qwen_export.backends.onnx.files import (
    EMBEDDING_FILE,
    MODEL_FILE,
    MTP_FILE,
    SPECULATIVE_FILE,
    VISION_FILE,
)
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.graph.builder import DataLayout, Graph, GraphBuilder
from qwen_export.graph.embedding import embedding
from qwen_export.graph.model import GraphOptions, decoder
from qwen_export.graph.mtp import mtp_head
from qwen_export.graph.recipe import Recipe
from qwen_export.graph.targets import Target, target_for
from qwen_export.graph.vision import vision_tower
from qwen_export.graph.weights import PlacedWeight

# A prompt with images goes to the decoder in one run, whatever `search.chunk_size` says: ONNX Runtime GenAI
# cannot cut their positions. So the portable graph must take longer runs. Its work grows with the cube of the
# run, and 512 tokens hold an image of about 650 x 650 pixels and a question.
_IMAGE_RUN_TOKENS = 512


@dataclass(frozen=True)
class Graphs:
    """The graphs of one artifact, and the data file that they share.

    Attributes:
        by_file: by file name.
        placed: every weight, with its place in the data file, in file order.
        max_run_tokens: of the decoder; None: any number.
    """

    target: Target
    by_file: dict[str, Graph]
    placed: list[PlacedWeight]
    data_bytes: int
    max_run_tokens: int | None

    def prequantized_roles(self) -> list[str]:
        """Roles with weights whose codes are the checkpoint's own."""
        return sorted({weight.role for weight, _ in self.placed if weight.prequantized})

    def bytes_by_role(self) -> dict[str, int]:
        totals: dict[str, int] = {}
        for weight, tensors in self.placed:
            totals[weight.role] = totals.get(weight.role, 0) + sum(tensor.nbytes for tensor in tensors)
        return totals


def build_graphs(
    checkpoint: Checkpoint, profile: Profile, all_logits: bool = False, mtp: bool = False
) -> Graphs:
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
    by_file = {MODEL_FILE: g.graph("qwen3_5")}
    if vision:
        g = GraphBuilder(target, dtype, layout)
        embedding(g, config, vision, recipe)
        by_file[EMBEDDING_FILE] = g.graph("qwen3_5_embedding")
        g = GraphBuilder(target, dtype, layout)
        vision_tower(g, vision, recipe)
        by_file[VISION_FILE] = g.graph("qwen3_5_vision")
    if mtp:
        g = GraphBuilder(target, dtype, layout, pairs=True)
        decoder(g, config, recipe, GraphOptions(run, hidden_states=True))
        by_file[SPECULATIVE_FILE] = g.graph("qwen3_5_speculative")
        g = GraphBuilder(target, dtype, layout)
        mtp_head(g, config, recipe)
        by_file[MTP_FILE] = g.graph("qwen3_5_mtp")
    return Graphs(target, by_file, layout.placed, layout.end, None if target.has("LinearAttention") else run)
