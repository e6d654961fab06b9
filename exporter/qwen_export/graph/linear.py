"""Projections: y = x W^T, with W quantised block-wise or in the activations' dtype."""

from __future__ import annotations

from collections.abc import Sequence

from qwen_export.graph.builder import GraphBuilder, Value
from qwen_export.graph.recipe import Recipe
from qwen_export.graph.tokens import by_rows
from qwen_export.graph.weights import Rows, Storage, Weight
from qwen_export.quantize.blockwise import Quantization


def projection(recipe: Recipe, name: str, *rows: Rows) -> Weight:
    """The weight of one projection: rows of one or several checkpoint tensors of the same role and width."""
    tensors = [part.tensor for part in rows]
    role, (in_features,) = recipe.role(tensors[0]), recipe.specs[tensors[0]].shape[1:]
    return Weight(name, role, rows, (in_features,), recipe.storage(role, in_features, tensors))


def linear(g: GraphBuilder, recipe: Recipe, x: Value, weight: Weight) -> Value:
    """x [..., K] times the transpose of `weight` [N, K] -> [..., N].

    Where an adapter may change the weight at run time, x A B is added: A [K, rank] and B [rank, N] are inputs
    of the graph, and empty where ONNX Runtime is given no adapter.
    """
    n, k = weight.shape
    y = product(g, recipe, x, g.weight(weight), weight.storage, n, k)
    if not any(part.tensor in recipe.switched for part in weight.rows):
        return y
    rank = f"{weight.name}.rank"
    a, b = factor_names(weight)
    narrow = g.op("MatMul", x, g.optional_input(a, g.dtype, (k, rank)))
    return g.op("Add", y, g.op("MatMul", narrow, g.optional_input(b, g.dtype, (rank, n))))


def factor_names(weight: Weight) -> tuple[str, str]:
    """Of the inputs that an adapter's factors are."""
    return f"{weight.name}.lora_A", f"{weight.name}.lora_B"


def product(
    g: GraphBuilder,
    recipe: Recipe,
    x: Value,
    tensors: Sequence[Value],
    storage: Storage,
    n: int,
    k: int,
) -> Value:
    """x [..., K] times the transpose of the [N, K] that `tensors` hold in the form `storage` -> [..., N]."""
    if not isinstance(storage, Quantization):
        if g.target.has("FusedMatMul"):
            return by_rows(g, "float", x, lambda rows: g.op("FusedMatMul", rows, *tensors, transB=1))
        # ONNX Runtime transposes constants once, at load.
        transposed = g.op("Transpose", *tensors, perm=[1, 0])
        return by_rows(g, "float", x, lambda rows: g.op("MatMul", rows, transposed))
    codes, scales, *zero_points = tensors
    parameters = (_widened(g, scales, storage), *zero_points)
    attributes = {
        "N": n,
        "K": k,
        "bits": storage.bits,
        "block_size": storage.block_size,
        "accuracy_level": recipe.accuracy_level,
    }
    kernel = f"int{storage.bits}.{storage.block_size}"
    return by_rows(g, kernel, x, lambda rows: g.op("MatMulNBits", rows, codes, *parameters, **attributes))


def _widened(g: GraphBuilder, scales: Value, form: Quantization) -> Value:
    """In the activations' dtype, which MatMulNBits wants; ONNX Runtime does it once, at load."""
    return scales if form.scale_dtype == g.dtype else g.cast(scales, g.dtype)


def take_rows(g: GraphBuilder, ids: Value, weight: Weight) -> Value:
    """Rows of `weight` [N, K] by `ids` [batch, sequence] -> [batch, sequence, K].

    A quantised weight is dequantised after the gather, with operators that every target has, so that the
    embedding and a tied lm_head are the same bytes.
    """
    data, *parameters = g.weight(weight)
    form = weight.storage
    if not isinstance(form, Quantization):
        return g.op("Gather", data, ids, axis=0)
    _, k = weight.shape
    blocks = -(-k // form.block_size)
    gathered = [g.op("Gather", tensor, ids, axis=0) for tensor in (data, *parameters)]
    codes = _unpack(g, gathered[0], form.bits, blocks * form.block_size)
    codes = g.reshape(codes, 0, 0, blocks, form.block_size)
    if form.symmetric:
        zero = g.constant(1 << (form.bits - 1))
    else:
        zero_row = _unpack(g, gathered[2], form.bits, blocks + (-blocks % (8 // form.bits)))
        if blocks % (8 // form.bits):
            zero_row = g.op("Slice", zero_row, g.ints(0), g.ints(blocks), g.ints(2))
        zero = g.op("Unsqueeze", zero_row, g.ints(-1))
    scales = g.op("Unsqueeze", _widened(g, gathered[1], form), g.ints(-1))
    rows = g.op("Mul", g.op("Sub", codes, zero), scales)
    rows = g.reshape(rows, 0, 0, blocks * form.block_size)
    if k % form.block_size:
        rows = g.op("Slice", rows, g.ints(0), g.ints(k), g.ints(2))
    return rows


def _unpack(g: GraphBuilder, packed: Value, bits: int, count: int) -> Value:
    """uint8 [batch, sequence, ...] -> `count` codes per row [batch, sequence, count], lowest bits first."""
    codes = g.cast(packed, g.dtype)
    per_byte = 8 // bits
    if per_byte == 1:
        return g.reshape(codes, 0, 0, count)
    # In floating point because integer shifts have no DirectML kernel; bytes are exact in fp16 too.
    rest, places = g.reshape(codes, 0, 0, count // per_byte, 1), []
    for _ in range(per_byte - 1):
        higher = g.op("Floor", g.op("Mul", rest, g.constant(1 / (1 << bits))))
        places.append(g.op("Sub", rest, g.op("Mul", higher, g.constant(1 << bits))))
        rest = higher
    return g.reshape(g.op("Concat", *places, rest, axis=-1), 0, 0, count)
