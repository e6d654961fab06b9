"""Token embeddings, with image features in the places that the prompt keeps for them."""

from __future__ import annotations

import numpy as np

from qwen_export.architecture.models.qwen3_5 import TextConfig
from qwen_export.architecture.vision import VisionConfig
from qwen_export.graph.builder import GraphBuilder
from qwen_export.graph.recipe import Recipe
from qwen_export.graph.vocabulary import embed, vocabulary


def embedding(g: GraphBuilder, config: TextConfig, vision: VisionConfig, recipe: Recipe) -> None:
    """Build the embedding model into `g`.

    Inputs: input_ids int64 [batch, sequence] and image_features [features, hidden], in the prompt's order.
    Output: inputs_embeds [batch, sequence, hidden]. The n-th image token of the run takes the n-th feature;
    one for which there is none, such as one that the model writes itself, keeps its token embedding.
    Source: the scatter in transformers' Qwen3_5Model.
    """
    tokens = ("batch_size", "sequence_length")
    hidden = config.hidden_size
    input_ids = g.input("input_ids", np.dtype(np.int64), tokens)
    features = g.input("image_features", g.dtype, ("features", hidden))
    _, table = vocabulary(config, recipe)
    embeds = embed(g, input_ids, table)

    flat = g.reshape(input_ids, -1)
    is_image = g.cast(g.op("Equal", flat, g.constant(vision.image_token_id, np.int64)), np.int64)
    # Row 0 stands for "no feature", so that the gather also works when there are no images.
    place = g.op("Mul", is_image, g.op("CumSum", is_image, g.constant(0, np.int64)))
    inside = g.op("LessOrEqual", place, g.op("Shape", features, start=0, end=1))
    place = g.op("Mul", place, g.cast(inside, np.int64))
    rows = g.op("Concat", g.constant(np.zeros((1, hidden))), features, axis=0)
    places = g.op("Reshape", place, g.op("Shape", input_ids))
    taken = g.op("Greater", g.op("Unsqueeze", places, g.ints(2)), g.constant(0, np.int64))
    merged = g.op("Where", taken, g.op("Gather", rows, places, axis=0), embeds)
    g.output(merged, "inputs_embeds", g.dtype, (*tokens, hidden))
