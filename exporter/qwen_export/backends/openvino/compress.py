"""Weights of the IR in the precisions of a profile's recipe, by NNCF, and a look at what really came of it.

A weight's role is that of the checkpoint's tensor, which is told from the module that the node which uses it
was traced from: the recipe's roles say everything, and no list of layers is written by hand.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qwen_common.errors import UserError
from qwen_profiles.schema import Role, WeightFormat

from qwen_export.architecture.registry import recipe_role
from qwen_export.backends.openvino.names import tensor_of

_OPERANDS = {"MatMul": 2, "Gather": 1}  # of each kind of node that has a weight, those that may be one
_NEVER = ["Convolution", "GroupConvolution"]  # NNCF would take them along
_STORED = {
    "int4": {"i4", "u4"},
    "int8": {"i8", "u8"},
    "float": {"bf16", "f16", "f32"},
}
_BETWEEN = {"Convert", "Multiply", "Subtract", "Reshape", "Transpose"}  # what decompression is made of


@dataclass(frozen=True)
class Weight:
    """One use of a weight in the IR.

    Attributes:
        node: the node that uses it.
        tensor: its name in the checkpoint.
        part: which of the parts that stand after each other in that tensor.
        stored: element type of its constant, as OpenVINO calls it.
        sizes: bytes of that constant, its scales and zero points, by name. A tied weight is used twice.
    """

    node: str
    tensor: str
    part: int
    role: Role
    stored: str
    sizes: Mapping[str, int]


def compress(model: Any, recipe: Mapping[Role, WeightFormat], ir: str = "", **options: Any) -> Any:
    """Compress the weights of an openvino.Model, each by the format of its role; returns the model.

    The whole model is in memory. `fill` makes the same constants in little memory, without `options`.

    Args:
        ir: name of the file, without its ending, for a model that was traced from one module.
        options: for nncf.compress_weights where weights get 4 bits: what it finds their scales and codes by.
    """
    import nncf

    by_format: dict[WeightFormat, set[str]] = defaultdict(set)
    for weight in weights(model, ir):
        by_format[recipe[weight.role]].add(weight.node)
    candidates = [node.get_friendly_name() for node in model.get_ops() if node.get_type_name() in _OPERANDS]
    for form, chosen in by_format.items():
        if form.precision == "float":
            continue
        int4 = form.precision == "int4"
        model = nncf.compress_weights(
            model,
            mode=nncf_mode(form),
            group_size=int(form.block_size) if int4 else -1,  # 8-bit weights have one scale a row
            all_layers=True
            if int4
            else None,  # else NNCF gives embedding and lm_head 8 bits of its own accord
            ignored_scope=nncf.IgnoredScope(
                names=[name for name in candidates if name not in chosen],
                types=_NEVER,
                validate=False,
            ),
            advanced_parameters=nncf.AdvancedCompressionParameters(
                group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST
            )
            if int4
            else None,
            **(options if int4 else {}),
        )
    return model


def nncf_mode(form: WeightFormat) -> Any:
    """How NNCF calls a format of 4 or 8 bits."""
    import nncf

    return nncf.CompressWeightsMode(f"{form.precision}_{'sym' if form.symmetric else 'asym'}")


def weights(model: Any, ir: str = "") -> Iterator[Weight]:
    """Every weight that a role of the recipe is for; `ir` as for `compress`."""
    for node in model.get_ops():
        if node.get_type_name() not in _OPERANDS:
            continue
        found = tensor_of(node.get_friendly_name(), ir)
        role = recipe_role(found[0]) if found else None
        if found is None or role is None:
            continue
        operands = node.input_values()[: _OPERANDS[node.get_type_name()]]
        for constants in filter(None, (_constants(value.get_node()) for value in operands)):
            weight = max(constants, key=lambda constant: math.prod(constant.output(0).shape))
            sizes = {constant.get_friendly_name(): constant.get_byte_size() for constant in constants}
            stored = weight.get_element_type().get_type_name()
            yield Weight(node.get_friendly_name(), *found, role, stored, sizes)


def check(model: Any, recipe: Mapping[Role, WeightFormat], ir: str = "") -> dict[Role, int]:
    """Compare what is stored with the recipe; returns bytes by role. What is tied counts for one role only.

    Raises:
        UserError: a weight is stored otherwise.
    """
    totals: dict[Role, int] = {}
    counted: set[str] = set()
    for weight in weights(model, ir):
        precision = recipe[weight.role].precision
        if weight.stored not in _STORED[precision]:
            raise UserError(
                f"{weight.node} is stored as {weight.stored}, where the recipe says {precision} for "
                f"{weight.role}: choose another block size or precision with --set weights.{weight.role}=..."
            )
        new = {name: size for name, size in weight.sizes.items() if name not in counted}
        counted |= new.keys()
        totals[weight.role] = totals.get(weight.role, 0) + sum(new.values())
    return totals


def _constants(node: Any) -> list[Any]:
    """The constants that `node` is computed from, if from nothing else."""
    if node.get_type_name() == "Constant":
        return [node]
    if node.get_type_name() not in _BETWEEN:
        return []
    parts = [_constants(value.get_node()) for value in node.input_values()]
    return [constant for part in parts for constant in part] if all(parts) else []
