"""`--auto-precision`: a size is spent on the layers and roles where INT4 costs most.

What a part costs in INT4 is measured (`sensitivity`); in another form it costs in proportion to the squared
error of its weights, and parts' costs add up, as is true of small errors. Under these two assumptions a size
is spent by taking, again and again, the step that spares most for its bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

import numpy as np
from qwen_common.errors import UserError
from qwen_profiles.schema import Profile, Role, WeightFormat

from qwen_export.architecture.mtp import MTP
from qwen_export.architecture.tensors import layer_of
from qwen_export.backends.onnx.estimate import estimate
from qwen_export.backends.onnx.graphs import Graphs, build_graphs
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.graph.weights import Weight
from qwen_export.progress import Progress
from qwen_export.quantize.blockwise import Quantization
from qwen_export.quantize.calibration import calibration_samples
from qwen_export.quantize.sensitivity import LayerRole, divergences, steps, weight_errors

# Sensitivity is measured with the first.
_FORMS = (("int4", 128), ("int4", 64), ("int4", 32), ("int8", 128), ("int8", 32))
_CHOSEN_FOR: tuple[Role, ...] = tuple(role for role in get_args(Role) if role not in ("gate", "vision"))


@dataclass(frozen=True)
class Choice:
    """One form of one part: bytes in the data file, and the KL divergence that is expected of it."""

    form: WeightFormat
    size: int
    cost: float


@dataclass(frozen=True)
class Candidates:
    """What there is to choose from; measured once, any size can be spent on it.

    Attributes:
        profile: what is chosen for.
        choices: the forms of each part, with what each costs.
        weights: number of the checkpoint's weights.
        data_bytes, artifact_bytes: of what is not chosen for: in the data file, and in all files.
    """

    profile: Profile
    choices: Mapping[LayerRole, Sequence[Choice]]
    weights: int
    data_bytes: int
    artifact_bytes: int

    def spend(self, *, size: int | None = None, bits: float | None = None) -> Profile:
        """The profile with the format of every layer's roles chosen; as `auto_precision`."""
        return _with_formats(self.profile, allocate(self.choices, self.budget(size=size, bits=bits)))

    def budget(self, *, size: int | None = None, bits: float | None = None) -> int:
        """Bytes that there are for the choices.

        Raises:
            UserError: fewer than all parts take in their smallest form.
        """
        fixed = self.data_bytes if size is None else self.artifact_bytes
        asked = int((bits or 0) * self.weights / 8) if size is None else size
        whole = fixed + sum(min(choice.size for choice in options) for options in self.choices.values())
        if asked < whole:
            raise UserError(
                f"all in INT4 this is {whole / 1e9:.4g} GB, {whole * 8 / self.weights:.3g} bits per weight: "
                "give at least that, or choose a smaller model"
            )
        return asked - fixed


def auto_precision(
    checkpoint: Checkpoint,
    profile: Profile,
    text: Path | None,
    progress: Progress,
    *,
    size: int | None = None,
    bits: float | None = None,
) -> Profile:
    """`profile` with the format of every layer's roles chosen; give one of `size` and `bits`.

    Args:
        text: UTF-8 calibration text; None takes the shipped one.
        size: bytes of the whole artifact.
        bits: bits per weight, scales and unquantised weights included.

    Raises:
        UserError: the size is less than the least possible, or the text is too short.
    """
    _candidates(checkpoint, profile, None).budget(size=size, bits=bits)  # before the work, not after it
    return measured(checkpoint, profile, text, progress).spend(size=size, bits=bits)


def measured(checkpoint: Checkpoint, profile: Profile, text: Path | None, progress: Progress) -> Candidates:
    """What each form of each part costs; arguments and errors as `auto_precision`'s."""
    graphs = build_graphs(checkpoint, _uniform(profile, *_FORMS[0]))
    parts: dict[LayerRole, dict[str, Quantization]] = {}
    for name, (part, form) in _quantised(graphs).items():
        parts.setdefault(part, {})[name] = form
    (ids,) = calibration_samples(checkpoint, text, most=1)
    progress.start(steps(checkpoint.config, list(parts)))
    found = divergences(checkpoint.config, checkpoint.tensors, parts, ids, lambda: progress.advance(1))
    return _candidates(checkpoint, profile, found)


def _candidates(
    checkpoint: Checkpoint, profile: Profile, divergence: Mapping[LayerRole, float] | None
) -> Candidates:
    """`divergence` is what each part costs in the first form; without it, the sizes alone are right."""
    uniform = [_uniform(profile, *form) for form in _FORMS]
    uniform_graphs = [build_graphs(checkpoint, form) for form in uniform]
    tensors = [_quantised(graphs) for graphs in uniform_graphs]
    parts: dict[LayerRole, list[str]] = {}
    for name, (part, _) in tensors[0].items():
        parts.setdefault(part, []).append(name)
    errors: dict[str, list[float]] = {}
    if divergence is not None:
        forms = {
            name: [found[name][1] if name in found else None for found in tensors] for name in tensors[0]
        }
        errors = dict(weight_errors(checkpoint.tensors, forms))

    def cost(part: LayerRole, at: int) -> float:
        if divergence is None:
            return 0.0
        names = parts[part]
        return divergence[part] * _error(errors, names, at) / max(_error(errors, names, 0), 1e-30)

    sizes = [_sizes(graphs) for graphs in uniform_graphs]
    choices = {
        part: [
            Choice(form.weights[cast(Role, part.role)], sizes[at][part], cost(part, at))
            for at, form in enumerate(uniform)
        ]
        for part in parts
    }
    mtp = profile.mtp and any(name.startswith(MTP) for name in checkpoint.tensors)
    usual = build_graphs(checkpoint, profile, mtp=mtp)
    usual_sizes = _sizes(usual)
    chosen_for = sum(usual_sizes[part] for part in parts)
    return Candidates(
        profile,
        choices,
        weights=sum(int(np.prod(source.shape)) for source in checkpoint.tensors.values()),
        data_bytes=usual.data_bytes - chosen_for,
        artifact_bytes=estimate(checkpoint, profile, mtp).disk - chosen_for,
    )


def allocate(choices: Mapping[LayerRole, Sequence[Choice]], budget: int) -> dict[LayerRole, Choice]:
    """For each part one of its choices; together at most `budget` bytes.

    From the smallest on, each step goes from one part's choice to the larger one that spares most for its
    bytes, until none fits.
    """
    chosen = {
        part: min(options, key=lambda choice: (choice.size, choice.cost)) for part, options in choices.items()
    }
    left = budget - sum(choice.size for choice in chosen.values())
    while True:
        ways = [
            ((chosen[part].cost - option.cost) / (option.size - chosen[part].size), part, option)
            for part, options in choices.items()
            for option in options
            if option.cost < chosen[part].cost and chosen[part].size < option.size <= chosen[part].size + left
        ]
        if not ways:
            return chosen
        _, part, option = max(ways, key=lambda way: way[0])
        left -= option.size - chosen[part].size
        chosen[part] = option


def _uniform(profile: Profile, precision: str, block_size: int) -> Profile:
    """Every matrix that can be chosen for in one format; symmetric or not as the profile has its role."""
    forms = {
        role: form.model_copy(update={"precision": precision, "block_size": block_size})
        for role, form in profile.weights.items()
        if role in _CHOSEN_FOR
    }
    return profile.model_copy(update={"weights": {**profile.weights, **forms}, "layer_weights": {}})


def _quantised(graphs: Graphs) -> dict[str, tuple[LayerRole, Quantization]]:
    """The checkpoint's tensors that are quantised here, not already: the part and the form of each."""
    return {
        rows.tensor: (_layer_role(weight), weight.storage)
        for weight, _ in graphs.placed
        if isinstance(weight.storage, Quantization) and not weight.prequantized and weight.role in _CHOSEN_FOR
        for rows in weight.rows
        if not rows.tensor.startswith(MTP)
    }


def _sizes(graphs: Graphs) -> dict[LayerRole, int]:
    """Bytes in the data file."""
    sizes: Counter[LayerRole] = Counter()
    for weight, tensors in graphs.placed:
        sizes[_layer_role(weight)] += sum(tensor.nbytes for tensor in tensors)
    return sizes


def _layer_role(weight: Weight) -> LayerRole:
    layer = layer_of(weight.rows[0].tensor)
    return LayerRole(-1 if layer is None else layer, weight.role)


def _error(errors: Mapping[str, Sequence[float]], names: Iterable[str], at: int) -> float:
    return sum(errors[name][at] for name in names)


def _with_formats(profile: Profile, chosen: Mapping[LayerRole, Choice]) -> Profile:
    weights, layers = dict(profile.weights), dict[int, dict[Role, WeightFormat]]()
    for part, choice in chosen.items():
        role = cast(Role, part.role)
        if part.layer < 0:
            weights[role] = choice.form
        else:
            layers.setdefault(part.layer, {})[role] = choice.form
    return profile.model_copy(update={"weights": weights, "layer_weights": layers})
