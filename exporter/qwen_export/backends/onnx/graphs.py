"""An ONNX artifact before any weight is read: its graphs, and every tensor's place in the data file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from qwen_common.providers import PROVIDERS
from qwen_profiles.schema import Profile

from qwen_export.architecture.mtp import mtp_tensors
from qwen_export.backends.onnx.files import (
    EMBEDDING_FILE,
    MODEL_FILE,
    MTP_FILE,
    PAIRS_FILE,
    SPECULATIVE_FILE,
    VISION_FILE,
    provider_file,
)
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.graph.builder import DataLayout, Graph, GraphBuilder
from qwen_export.graph.embedding import embedding
from qwen_export.graph.kv_cache import cache_specs
from qwen_export.graph.model import GraphOptions, decoder
from qwen_export.graph.mtp import mtp_head
from qwen_export.graph.recipe import Recipe
from qwen_export.graph.targets import FUSED, PORTABLE, Target, target_for
from qwen_export.graph.vision import vision_tower
from qwen_export.graph.weights import PlacedWeight
from qwen_export.quantize.fp4 import Fp4

# A prompt with images goes to the decoder in one run, whatever `search.chunk_size` says: ONNX Runtime GenAI
# cannot cut their positions. So the portable graph must take longer runs. Its work grows with the cube of the
# run, and 512 tokens hold an image of about 650 x 650 pixels and a question.
_IMAGE_RUN_TOKENS = 512


@dataclass(frozen=True)
class FurtherGraphs:
    """What fallbacks take in place of some of the main graphs.

    Attributes:
        providers: those of the profile's fallbacks that take them.
        replaced: by a main graph's file name that of the graph that replaces it.
        by_file: the graphs, by their file names.
        max_run_tokens: as in `Graphs`.
    """

    providers: tuple[str, ...]
    target: Target
    replaced: dict[str, str]
    by_file: dict[str, Graph]
    max_run_tokens: int | None

    def onnxruntime(self) -> str:
        """The versions that can load the graphs."""
        return _loads_on(self.target, self.by_file.values())


@dataclass(frozen=True)
class Graphs:
    """The graphs of one artifact, and the data file that they share.

    Attributes:
        target: of the profile's provider.
        by_file: the graphs for that provider, by file name.
        further: those of fallbacks.
        placed: every weight, with its place in the data file, in file order.
        max_run_tokens: of the decoder for that provider; None: any number.
    """

    target: Target
    by_file: dict[str, Graph]
    further: list[FurtherGraphs]
    placed: list[PlacedWeight]
    data_bytes: int
    max_run_tokens: int | None

    @property
    def every_file(self) -> dict[str, Graph]:
        """All graphs by file name."""
        return {**self.by_file, **{name: g for other in self.further for name, g in other.by_file.items()}}

    def prequantized_roles(self) -> list[str]:
        """Roles with weights whose codes are the checkpoint's own."""
        return sorted({weight.role for weight, _ in self.placed if weight.prequantized})

    def onnxruntime(self) -> str:
        """The versions that can load the graphs for the profile's provider."""
        has_fp4 = any(isinstance(weight.storage, Fp4) for weight, _ in self.placed)
        return f">={self.target.fp4_experts}" if has_fp4 else _loads_on(self.target, self.by_file.values())

    def sources(self) -> dict[str, bool]:
        """The checkpoint's tensors that weights are made of, and whether those keep their codes."""
        return {rows.tensor: weight.prequantized for weight, _ in self.placed for rows in weight.rows}

    def bytes_by_role(self) -> dict[str, int]:
        totals: dict[str, int] = {}
        for weight, tensors in self.placed:
            totals[weight.role] = totals.get(weight.role, 0) + sum(tensor.nbytes for tensor in tensors)
        return totals


def build_graphs(
    checkpoint: Checkpoint, profile: Profile, all_logits: bool = False, mtp: bool = False
) -> Graphs:
    """Build the graphs from the config and lay out the data file; reads no weight.

    Args:
        mtp: the MTP head is among them.

    Raises:
        UserError: the graphs of two of the profile's providers cannot share the weights.
    """
    asked = targets(profile)
    main = asked[profile.provider]
    layout = DataLayout()
    run = max(profile.prefill_chunk, _IMAGE_RUN_TOKENS) if checkpoint.vision else profile.prefill_chunk
    options = GraphOptions(run, all_logits, embeddings=checkpoint.vision is not None, hidden_states=mtp)
    recipe = _recipe(checkpoint, profile, main)
    by_file = _answering(checkpoint, recipe, layout, options)
    if mtp or speculates(checkpoint, profile):
        by_file |= _speculative(
            checkpoint, recipe, layout, replace(options, all_logits=False, embeddings=False)
        )
    if mtp:
        g = GraphBuilder(recipe.target, recipe.dtype, layout)
        mtp_head(g, checkpoint.config, recipe)
        by_file[MTP_FILE] = g.graph("qwen3_5_mtp")

    providers: dict[Target, list[str]] = {}
    for provider, target in asked.items():
        if target != main:
            providers.setdefault(target, []).append(provider)
    further = []
    for target, takers in providers.items():
        own = _answering(checkpoint, _recipe(checkpoint, profile, target), layout, options)
        replaced = {
            name: provider_file(name, takers[0])
            for name, graph in own.items()
            if not _equal(graph, by_file[name])
        }
        if replaced:
            own = {file: own[name] for name, file in replaced.items()}
            further.append(FurtherGraphs(tuple(takers), target, replaced, own, _longest(target, run)))
    return Graphs(main, by_file, further, layout.placed, layout.end, _longest(main, run))


def _loads_on(target: Target, graphs: Iterable[Graph]) -> str:
    nodes = (node for graph in graphs for node in graph.nodes)
    # onnxruntime 1.30 refuses a graph that has the attribute, 1.31 loads it (run).
    levels = any(node.op_type == "QMoE" and "accuracy_level" in node.attributes for node in nodes)
    return ">=1.31" if levels else target.onnxruntime


def speculates(checkpoint: Checkpoint, profile: Profile) -> bool:
    """Whether the decoder is exported for several tokens in a run too. It takes no adapter at run time."""
    runs = PROVIDERS[profile.provider].speculative and profile.lowering == FUSED.name
    return profile.speculative and runs and not checkpoint.switched_adapters


def _longest(target: Target, run: int) -> int | None:
    """Only the chunked Gated DeltaNet has a longest run."""
    return None if target.has("LinearAttention") else run


def targets(profile: Profile) -> dict[str, Target]:
    """Of the profile's provider, then of its fallbacks. All ask the same of the weights, which they share."""
    found = {}
    for provider in (profile.provider, *profile.fallbacks):
        has = profile.lowering in PROVIDERS[provider].lowerings
        found[provider] = target_for(profile.lowering if has else PORTABLE.name, provider)
    zero_points = any(target.zero_points_required for target in found.values())
    exact = any(target.exact_blocks for target in found.values())
    fp4 = {target.fp4_experts if target.has("QMoE") else None for target in found.values()}
    fp4_experts = fp4.pop() if len(fp4) == 1 else None
    return {
        provider: replace(
            target, zero_points_required=zero_points, exact_blocks=exact, fp4_experts=fp4_experts
        )
        for provider, target in found.items()
    }


def _recipe(checkpoint: Checkpoint, profile: Profile, target: Target) -> Recipe:
    config, vision = checkpoint.config, checkpoint.vision
    return Recipe(
        profile.weights,
        target,
        np.dtype(profile.activation_dtype),
        profile.accuracy_level,
        np.dtype(profile.scale_dtype or profile.activation_dtype),
        np.dtype(profile.kv_dtype),
        checkpoint.tensors,
        profile.layer_weights,
        profile.carry_over,
        {
            **config.tensors(),
            **mtp_tensors(config),
            **(vision.tensors() if vision else {}),
            **cache_specs(config),
        },
        frozenset(name for adapter in checkpoint.switched_adapters for name in adapter.updates),
        profile.frequent_tokens,
    )


def _answering(
    checkpoint: Checkpoint, recipe: Recipe, layout: DataLayout, options: GraphOptions
) -> dict[str, Graph]:
    """Decoder, and embedding and vision tower where there is one."""
    config, vision = checkpoint.config, checkpoint.vision
    g = GraphBuilder(recipe.target, recipe.dtype, layout)
    decoder(g, config, recipe, options)
    by_file = {MODEL_FILE: g.graph("qwen3_5")}
    if vision:
        g = GraphBuilder(recipe.target, recipe.dtype, layout)
        embedding(g, config, vision, recipe)
        by_file[EMBEDDING_FILE] = g.graph("qwen3_5_embedding")
        g = GraphBuilder(recipe.target, recipe.dtype, layout)
        vision_tower(g, vision, recipe)
        by_file[VISION_FILE] = g.graph("qwen3_5_vision")
    return by_file


def _speculative(
    checkpoint: Checkpoint, recipe: Recipe, layout: DataLayout, options: GraphOptions
) -> dict[str, Graph]:
    """The decoder for several tokens in a run, and the one for two with the bits of single ones."""
    several = GraphBuilder(recipe.target, recipe.dtype, layout)
    decoder(several, checkpoint.config, recipe, replace(options, pending=True))
    pairs = GraphBuilder(recipe.target, recipe.dtype, layout, pairs=True)
    decoder(pairs, checkpoint.config, recipe, options)
    return {
        SPECULATIVE_FILE: several.graph("qwen3_5_speculative"),
        PAIRS_FILE: pairs.graph("qwen3_5_pairs"),
    }


def _equal(one: Graph, other: Graph) -> bool:
    """Whether two graphs of the same inputs and weights compute the same in the same way."""
    return len(one.nodes) == len(other.nodes) and _content(one) == _content(other)


def _content(graph: Graph) -> tuple[object, ...]:
    nodes = [
        (node.op_type, node.name, *(value and value.name for value in node.inputs), dict(node.attributes))
        for node in graph.nodes
    ]
    constants = {v.name: v.tensor.tobytes() for v in graph.initializers if isinstance(v.tensor, np.ndarray)}
    return nodes, constants
