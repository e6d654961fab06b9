"""The vision tower: patches of one image, or of several of the same size, in; features out.

Shapes: N images of h x w patches each, P = h w, H hidden size. Patches come in blocks of m x m, the ones that
the merger joins, as the image processor orders them. Source: transformers' Qwen3_5VisionModel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from qwen_export.architecture.vision import VisionConfig
from qwen_export.graph.builder import GraphBuilder, Value
from qwen_export.graph.linear import linear
from qwen_export.graph.recipe import Recipe
from qwen_export.graph.rotary import Rotation, for_rotation, rotate
from qwen_export.graph.weights import Transform, Weight, flatten_rows

_ROPE_THETA = 10_000.0
_EPSILON = 1e-6  # of every norm; transformers writes it into the model
_INT64, _FLOAT32 = np.dtype(np.int64), np.dtype(np.float32)


@dataclass(frozen=True)
class Grid:
    """Where the patches lie, the same for each of the N images.

    Attributes:
        count: int64 [1], N.
        sides: float32 [1] each, h and w.
        places: float32 [P] each, the row and the column of every patch.
    """

    count: Value
    sides: tuple[Value, Value]
    places: tuple[Value, Value]


def vision_tower(g: GraphBuilder, config: VisionConfig, recipe: Recipe) -> None:
    """Build the vision tower into `g`.

    Inputs: pixel_values float32 [N P, patch_dim] as transformers' image processor makes them, and
    image_grid_thw int64 [N, 3] with N equal rows 1, h, w. ONNX Runtime GenAI runs images of different sizes
    one by one. Output: image_features [N P / m^2, out_hidden_size].
    """
    pixels = g.input("pixel_values", _FLOAT32, ("patches", config.patch_dim))
    grid = _grid(g, config, g.input("image_grid_thw", _INT64, ("images", 3)))

    with g.scope("model.visual"):
        name = "model.visual.patch_embed.proj"
        pixels = g.cast(pixels, g.dtype)
        x = _biased(g, recipe, name, pixels, flatten_rows)
        axes = g.op("Concat", grid.count, g.ints(-1, config.hidden_size), axis=0)
        x = g.op("Add", g.op("Reshape", x, axes), _position_embedding(g, config, recipe, grid))
        table = _rotation(g, config, grid)
        for index in range(config.depth):
            with g.scope(f"blocks.{index}"):
                x = _block(g, config, recipe, f"model.visual.blocks.{index}", x, table)
        features = _merge(g, config, recipe, x)
    g.output(features, "image_features", g.dtype, ("features", config.out_hidden_size))


def _grid(g: GraphBuilder, config: VisionConfig, image_grid_thw: Value) -> Grid:
    """Row and column of each patch: blocks row by row, and inside of each block row by row."""
    merge = config.spatial_merge_size
    first = g.op("Slice", image_grid_thw, g.ints(0), g.ints(1), g.ints(0))
    _, height, width = g.ops("Split", g.reshape(first, 3), outputs=3, axis=0, num_outputs=3)

    def axis(side: Value, *shape: int) -> Value:
        zero, one = g.constant(0, np.int64), g.constant(1, np.int64)
        numbers = g.op("Range", zero, g.op("Squeeze", side), one)
        return g.reshape(g.cast(numbers, np.float32), *shape)

    # [h/m, 1, m, 1] and [1, w/m, 1, m] spread to one shape by adding each to zeros of the other.
    rows, columns = axis(height, -1, 1, merge, 1), axis(width, 1, -1, 1, merge)
    nothing = g.constant(0, np.float32)
    spread_rows = g.op("Add", rows, g.op("Mul", columns, nothing))
    spread_columns = g.op("Add", columns, g.op("Mul", rows, nothing))
    return Grid(
        count=g.op("Shape", image_grid_thw, start=0, end=1),
        sides=(g.cast(height, np.float32), g.cast(width, np.float32)),
        places=(g.reshape(spread_rows, -1), g.reshape(spread_columns, -1)),
    )


def _position_embedding(g: GraphBuilder, config: VisionConfig, recipe: Recipe, grid: Grid) -> Value:
    """The learned square of embeddings, resampled bilinearly to h x w with corners on corners: [P, H]."""
    side = config.grid_side
    one = g.constant(1, np.float32)
    low, high = [], []  # (row or column of the table, its weight) below and above each patch's place
    for places, length in zip(grid.places, grid.sides, strict=True):
        # An image is at least one block wide, so `length` - 1 is not 0.
        steps = g.op("Mul", places, g.constant(side - 1, np.float32))
        exact = g.op("Div", steps, g.op("Sub", length, one))
        floor = g.op("Floor", exact)
        share = g.op("Sub", exact, floor)
        low.append((floor, g.op("Sub", one, share)))
        # On the last row the share is 0, and the row after it is the last one again.
        high.append((g.op("Min", g.op("Add", floor, one), g.constant(side - 1, np.float32)), share))
    (values,) = g.weight(recipe.floats("model.visual.pos_embed.weight"))
    total: Value | None = None
    for row, row_share in (low[0], high[0]):
        for column, column_share in (low[1], high[1]):
            index = g.op("Add", g.op("Mul", row, g.constant(side, np.float32)), column)
            share = g.op("Unsqueeze", g.op("Mul", row_share, column_share), g.ints(1))
            corner = g.op("Mul", g.op("Gather", values, g.cast(index, np.int64)), g.cast(share, g.dtype))
            total = corner if total is None else g.op("Add", total, corner)
    assert total is not None
    return total


def _rotation(g: GraphBuilder, config: VisionConfig, grid: Grid) -> Rotation:
    """cos and sin of the axial rotary embedding: the first half of a head's angles turn with the row, the
    second half with the column. Source: transformers' Qwen3_5VisionRotaryEmbedding.
    """
    half = config.head_dim // 2
    exponents = np.arange(0, half, 2, dtype=np.float32) / np.float32(half)
    frequencies = g.constant((1.0 / np.float32(_ROPE_THETA) ** exponents)[None], np.float32)
    angles = g.op(
        "Concat",
        *(g.op("Mul", g.op("Unsqueeze", places, g.ints(1)), frequencies) for places in grid.places),
        axis=1,
    )
    cos, sin = (g.cast(g.op(name, angles), g.dtype) for name in ("Cos", "Sin"))
    if not g.target.has("RotaryEmbedding"):
        return Rotation(g.op("Unsqueeze", cos, g.ints(0, 2)), g.op("Unsqueeze", sin, g.ints(0, 2)), None)
    patches = g.op("Shape", angles, start=0, end=1)
    every = g.op("Range", g.constant(0, np.int64), g.op("Squeeze", patches), g.constant(1, np.int64))
    rows = g.op("Expand", every, g.op("Concat", grid.count, patches, axis=0))
    return Rotation(cos, sin, rows)


def _block(
    g: GraphBuilder, config: VisionConfig, recipe: Recipe, name: str, x: Value, table: Rotation
) -> Value:
    """x [N, P, H] -> the same shape. Source: transformers' Qwen3_5VisionBlock."""
    normed = _layer_norm(g, recipe, f"{name}.norm1", x)
    projected = _biased(g, recipe, f"{name}.attn.qkv", normed)
    query, key, value = g.ops("Split", projected, outputs=3, axis=-1, num_outputs=3)
    query, key = (
        rotate(
            g,
            for_rotation(g, part, table, config.num_heads, config.head_dim),
            table,
            config.num_heads,
            config.head_dim,
            config.head_dim,
        )
        for part in (query, key)
    )
    attended = g.op("MultiHeadAttention", query, key, value, num_heads=config.num_heads)
    x = g.op("Add", x, _biased(g, recipe, f"{name}.attn.proj", attended))

    normed = _layer_norm(g, recipe, f"{name}.norm2", x)
    grown = _gelu_tanh(g, _biased(g, recipe, f"{name}.mlp.linear_fc1", normed))
    return g.op("Add", x, _biased(g, recipe, f"{name}.mlp.linear_fc2", grown))


def _merge(g: GraphBuilder, config: VisionConfig, recipe: Recipe, x: Value) -> Value:
    """Each block of m x m patches becomes one feature: [N, P, H] -> [N P / m^2, out_hidden_size]."""
    name = "model.visual.merger"
    x = g.reshape(_layer_norm(g, recipe, f"{name}.norm", x), -1, config.merged_dim)
    x = g.op("Gelu", _biased(g, recipe, f"{name}.linear_fc1", x))
    return _biased(g, recipe, f"{name}.linear_fc2", x)


def _gelu_tanh(g: GraphBuilder, x: Value) -> Value:
    """GELU by its tanh formula, as x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)) where FastGelu is missing."""
    if g.target.has("FastGelu"):
        return g.op("FastGelu", x)
    # x (a + b x^2): one factor fewer than x^3, and within float16's range for longer.
    scale = 2 * (2 / np.pi) ** 0.5
    square = g.op("Mul", g.op("Mul", x, x), g.constant(0.044715 * scale))
    inner = g.op("Mul", x, g.op("Add", square, g.constant(scale)))
    return g.op("Mul", x, g.op("Sigmoid", inner))


def _layer_norm(g: GraphBuilder, recipe: Recipe, name: str, x: Value) -> Value:
    (scale,), (bias,) = (g.weight(recipe.floats(f"{name}.{part}")) for part in ("weight", "bias"))
    return g.op("LayerNormalization", x, scale, bias, axis=-1, epsilon=_EPSILON)


def _biased(
    g: GraphBuilder, recipe: Recipe, name: str, x: Value, transform: Transform | None = None
) -> Value:
    """x W^T + b."""
    tensor = f"{name}.weight"
    role, in_features = recipe.role(tensor), math.prod(recipe.specs[tensor].shape[1:])
    storage = recipe.storage(role, in_features)
    weight = Weight(name, role, (recipe.whole(tensor),), (in_features,), storage, transform)
    return g.op("Add", linear(g, recipe, x, weight), *g.weight(recipe.floats(f"{name}.bias")))
