"""The parts of a model whose format can be chosen, and the forms that there are for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple, cast, get_args

from qwen_profiles.schema import Profile, Role, WeightFormat

from qwen_export.architecture.mtp import MTP
from qwen_export.architecture.tensors import layer_of
from qwen_export.backends.onnx.graphs import Graphs
from qwen_export.graph.weights import Weight
from qwen_export.quantize.blockwise import Quantization
from qwen_export.quantize.sensitivity import LayerRole

Formats = Mapping[LayerRole, WeightFormat]
_CHOSEN_FOR: tuple[Role, ...] = tuple(role for role in get_args(Role) if role not in ("gate", "vision"))


class Form(NamedTuple):
    precision: str
    block_size: int


# In the order of their bits; the last is the best.
FORMS = (
    Form("int2", 128),
    Form("int2", 64),
    Form("int2", 32),
    Form("int4", 128),
    Form("int4", 64),
    Form("int4", 32),
    Form("int8", 128),
    Form("int8", 32),
)


def forms_for(profile: Profile) -> list[Form]:
    """Those that each of the profile's providers has kernels for."""
    return [form for form in FORMS if int(form.precision.removeprefix("int")) in profile.weight_bits]


def format_of(profile: Profile, role: str, form: Form) -> WeightFormat:
    symmetric = profile.weights[cast(Role, role)].symmetric
    return WeightFormat.model_validate({**form._asdict(), "symmetric": symmetric})


def uniform(profile: Profile, form: Form) -> Profile:
    """Every matrix that can be chosen for in one format."""
    forms = {role: format_of(profile, role, form) for role in _CHOSEN_FOR}
    return profile.model_copy(update={"weights": {**profile.weights, **forms}, "layer_weights": {}})


def quantised_tensors(graphs: Graphs) -> dict[str, tuple[LayerRole, Quantization]]:
    """The checkpoint's tensors that are quantised here, not already: the part and the form of each."""
    return {
        rows.tensor: (_layer_role(weight), weight.storage)
        for weight, _ in graphs.placed
        if isinstance(weight.storage, Quantization) and not weight.prequantized and weight.role in _CHOSEN_FOR
        for rows in weight.rows
        if not rows.tensor.startswith(MTP)
    }


def data_sizes(graphs: Graphs) -> Counter[LayerRole]:
    """Bytes in the data file."""
    sizes: Counter[LayerRole] = Counter()
    for weight, tensors in graphs.placed:
        sizes[_layer_role(weight)] += sum(tensor.nbytes for tensor in tensors)
    return sizes


def _layer_role(weight: Weight) -> LayerRole:
    layer = layer_of(weight.rows[0].tensor)
    return LayerRole(-1 if layer is None else layer, weight.role)


def with_formats(profile: Profile, chosen: Formats) -> Profile:
    weights = dict(profile.weights)
    layers = {layer: dict(forms) for layer, forms in profile.layer_weights.items()}
    for part, form in chosen.items():
        role = cast(Role, part.role)
        if part.layer < 0:
            weights[role] = form
        else:
            layers.setdefault(part.layer, {})[role] = form
    return profile.model_copy(update={"weights": weights, "layer_weights": layers})
