"""`--auto-precision`: the format of each role in each layer, so that the artifact keeps to a size or memory.

What a part costs is measured (`sensitivity`): the KL divergence that it alone causes in one form of each
precision, and how its outputs' errors in other forms compare with those in that one. What it takes is what
`plan` predicts. `allocation` makes the choice, and `plan`'s figures of the whole have the last word.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from qwen_common.errors import UserError
from qwen_profiles.schema import Profile

from qwen_export.architecture.mtp import MTP, declares_mtp
from qwen_export.backends.onnx.estimate import estimate
from qwen_export.backends.onnx.graphs import build_graphs
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.planner.estimate import Estimate
from qwen_export.progress import Progress
from qwen_export.quantize.allocation import Choice, allocate, smallest
from qwen_export.quantize.blockwise import Quantization
from qwen_export.quantize.calibration import calibration_samples
from qwen_export.quantize.choosable import (
    Form,
    Formats,
    data_sizes,
    format_of,
    forms_for,
    quantised_tensors,
    uniform,
    with_formats,
)
from qwen_export.quantize.sensitivity import LayerRole, divergence_steps, divergences, output_errors

# By precision the form in which the KL divergence is measured. INT8 causes so little that the mean over few
# positions would not tell it: it is found from the last of these.
_MEASURED = {"int2": Form("int2", 64), "int4": Form("int4", 128)}
_LEAST_COST = 1e-12  # nats: what was measured to cost nothing may still have a finer form


class Bounds(NamedTuple):
    """Bytes of an artifact, as `plan` predicts them, or the most of them; infinity: as much as it will.

    Attributes:
        disk: all files.
        resident: memory once loaded.
    """

    disk: float = math.inf
    resident: float = math.inf

    @staticmethod
    def of(found: Estimate) -> Bounds:
        return Bounds(found.disk, found.resident)

    def minus(self, other: Bounds) -> Bounds:
        return Bounds(*(a - b for a, b in zip(self, other, strict=True)))


@dataclass(frozen=True)
class Limits:
    """What is asked for.

    Attributes:
        size: bytes of the whole artifact, without the report of its verification.
        memory: bytes once it is loaded, before the first prompt.
        bits: bits per weight in the data file, scales and unquantised weights included.
        fit: it must keep to the profile's memory too, with a context of 1024 tokens.
    """

    size: int | None = None
    memory: int | None = None
    bits: float | None = None
    fit: bool = False


@dataclass(frozen=True)
class Chosen:
    """A profile with the format of every layer's roles chosen.

    Attributes:
        estimate: what it will take.
        divergence: the KL divergence that is expected of its weights, in nats.
        largest: all is in the best form that there is.
        formats: as they were chosen.
    """

    profile: Profile
    estimate: Estimate
    divergence: float
    largest: bool
    formats: Formats

    def layers(self) -> dict[str, dict[str, int]]:
        """By role, the number of layers in each format, such as `{"int4/128": 12, "int8/32": 4}`."""
        found: dict[str, Counter[str]] = {}
        for part, form in sorted(self.formats.items()):
            found.setdefault(part.role, Counter())[f"{form.precision}/{form.block_size}"] += 1
        return {role: dict(sorted(counts.items())) for role, counts in found.items()}


@dataclass(frozen=True)
class Candidates:
    """What there is to choose from; once `measured`, any bounds can be spent on it.

    Attributes:
        checkpoint, profile: what is chosen for.
        choices: the forms of each part, with what they take, in the order of `Bounds`, and cost.
        beside: what all else takes.
    """

    checkpoint: Checkpoint
    profile: Profile
    choices: Mapping[LayerRole, Sequence[Choice]]
    beside: Bounds

    def bounds(self, asked: Limits) -> Bounds:
        """What is asked for, in bytes.

        Raises:
            UserError: there is no choice within them; says the least that can be reached.
        """
        if not self.choices:
            raise UserError("--auto-precision has nothing to choose: no weight is quantised by this export")
        disk = math.inf if asked.size is None else asked.size
        if asked.bits is not None:
            disk = min(disk, self._beside_the_data() + asked.bits * self._weights() / 8)
        resident = math.inf if asked.memory is None else asked.memory
        least_disk, least_memory = self.estimate(self.smallest), self.estimate(self.leanest)
        name = f"{Path(self.checkpoint.source).name} for {self.profile.name}"
        if disk < least_disk.disk:
            bits = math.ceil(800 * (least_disk.disk - self._beside_the_data()) / self._weights()) / 100
            raise UserError(
                f"the smallest artifact of {name} has {amount(least_disk.disk)}, {bits:g} bits per weight: "
                "give at least that, or choose a smaller model"
            )
        if resident < least_memory.resident:
            raise UserError(
                f"{name} takes at least {amount(least_memory.resident)} of memory once it is loaded: give at "
                "least that, or choose a smaller model"
            )
        if asked.fit:
            room = least_memory.budget - (least_memory.needed - least_memory.resident)
            resident = min(resident, max(room, least_memory.resident))
        return Bounds(disk, resident)

    def spend(self, asked: Limits) -> Chosen:
        """The best choice within what is asked for.

        Raises:
            UserError: as `bounds`, or size and memory cannot be kept to at once.
        """
        bounds = self.bounds(asked)
        budget = bounds.minus(self.beside)
        before: Mapping[LayerRole, Choice] = {}
        while True:
            taken = allocate(self.choices, budget)
            formats = {part: choice.form for part, choice in taken.items()}
            profile = with_formats(self.profile, formats)
            found = self.estimate(profile)
            over = Bounds(*(max(0, excess) for excess in Bounds.of(found).minus(bounds)))
            if asked.bits is not None:  # of the data file, which an estimate does not tell from the graphs
                data = self._data_bytes(profile) - asked.bits * self._weights() / 8
                over = Bounds(max(over.disk, data), over.resident)
            if not any(over):
                break
            if taken == before:
                raise UserError("no choice keeps to the size and to the memory: give more of one")
            # The parts' figures are those of their role, shared out, and without the gaps between tensors.
            sums = (sum(choice.takes[at] for choice in taken.values()) for at in range(len(over)))
            before = taken
            budget = Bounds(
                *(
                    total - more if more else most
                    for most, total, more in zip(budget, sums, over, strict=True)
                )
            )
        return Chosen(
            profile,
            found,
            sum(choice.cost for choice in taken.values()),
            all(choice.cost == min(other.cost for other in self.choices[p]) for p, choice in taken.items()),
            formats,
        )

    @cached_property
    def smallest(self) -> Profile:
        """With all parts in the forms that take least on disk."""
        return self._least((1, 1e-6))

    @cached_property
    def leanest(self) -> Profile:
        """With all parts in the forms that take least memory."""
        return self._least((1e-6, 1))

    @cached_property
    def largest(self) -> Profile:
        """With all parts in the last form, which is the best."""
        return with_formats(self.profile, {part: options[-1].form for part, options in self.choices.items()})

    def _least(self, prices: tuple[float, float]) -> Profile:
        taken = smallest(self.choices, prices)
        return with_formats(self.profile, {part: choice.form for part, choice in taken.items()})

    def priced(self, cost: Callable[[LayerRole, Form], float]) -> Candidates:
        """The same with the KL divergence in nats that each form of each part is expected to cause."""
        forms = forms_for(self.profile)
        choices = {
            part: [
                replace(choice, cost=cost(part, form)) for form, choice in zip(forms, options, strict=True)
            ]
            for part, options in self.choices.items()
        }
        return replace(self, choices=choices)

    def estimate(self, profile: Profile) -> Estimate:
        """What the whole artifact takes with a profile of these formats."""
        return _estimate(self.checkpoint, profile)

    def _data_bytes(self, profile: Profile) -> int:
        return build_graphs(self.checkpoint, profile, mtp=_mtp(self.checkpoint, profile)).data_bytes

    def _beside_the_data(self) -> int:
        """Bytes of all files but the data file, with formats for each layer in the manifest."""
        return self.estimate(self.smallest).disk - self._data_bytes(self.smallest)

    def _weights(self) -> int:
        config, vision = self.checkpoint.config, self.checkpoint.vision
        shapes = [tensor.shape for tensor in self.checkpoint.tensors.values()]
        if not shapes:
            specs = {**config.tensors(), **(vision.tensors() if vision else {})}
            shapes = [spec.shape for spec in specs.values()]
        return sum(math.prod(shape) for shape in shapes)


def auto_precision(found: Candidates, text: Path | None, progress: Progress, asked: Limits) -> Chosen:
    """The profile of `found` with the format of every layer's roles chosen.

    Args:
        text: UTF-8 calibration text; None takes the shipped one.

    Raises:
        UserError: less than the least possible, or the text is too short.
    """
    found.bounds(asked)  # before the work, not after it
    return measured(found, text, progress).spend(asked)


def measured(found: Candidates, text: Path | None, progress: Progress) -> Candidates:
    """`found` with what each form of each part costs; arguments and errors as `auto_precision`'s."""
    checkpoint, profile = found.checkpoint, found.profile
    forms = forms_for(profile)
    quantised = {form: quantised_tensors(build_graphs(checkpoint, uniform(profile, form))) for form in forms}
    ids = calibration_samples(checkpoint, text, most=1)
    config, tensors = checkpoint.config, checkpoint.tensors
    trials: dict[Form, dict[LayerRole, dict[str, Quantization]]] = {}
    for form in [form for form in _MEASURED.values() if form in forms]:
        trials[form] = {}
        for name, (part, stored) in quantised[form].items():
            trials[form].setdefault(part, {})[name] = stored
    progress.start(config.num_hidden_layers + sum(divergence_steps(config, list(t)) for t in trials.values()))

    def advance() -> None:
        progress.advance(1)

    names = dict.fromkeys(name for of_form in quantised.values() for name in of_form)
    stored_as = {
        name: [quantised[form][name][1] if name in quantised[form] else None for form in forms]
        for name in names
    }
    errors = output_errors(config, tensors, stored_as, ids, advance)
    alone = {form: divergences(config, tensors, trial, ids, advance) for form, trial in trials.items()}
    belongs = {name: part for of_form in quantised.values() for name, (part, _) in of_form.items()}

    def cost(part: LayerRole, form: Form) -> float:
        reference = _MEASURED.get(form.precision, list(_MEASURED.values())[-1])
        wanted, known = (
            sum(errors[name][forms.index(which)] for name in names if belongs[name] == part)
            for which in (form, reference)
        )
        divergence = max(alone[reference].get(part, 0.0), _LEAST_COST)
        return divergence * wanted / known if known else 0.0

    return found.priced(cost)


def candidates(checkpoint: Checkpoint, profile: Profile) -> Candidates:
    """What each form of each part takes, as if all cost the same; reads no weight."""
    kinds = forms_for(profile)
    every = [build_graphs(checkpoint, uniform(profile, form)) for form in kinds]
    sizes = data_sizes(every[0])
    parts = list(dict.fromkeys(part for graphs in every for part, _ in quantised_tensors(graphs).values()))
    formats = {form: {part: format_of(profile, part.role, form) for part in parts} for form in kinds}
    start = Bounds.of(_estimate(checkpoint, with_formats(profile, formats[kinds[0]])))
    of_role: Counter[str] = Counter()
    for part in parts:
        of_role[part.role] += sizes[part]
    more: dict[tuple[str, Form], Bounds] = {}  # that a role takes in a form than in the first
    for role in of_role:
        for form in kinds:
            changed = {part: formats[form if part.role == role else kinds[0]][part] for part in parts}
            more[role, form] = Bounds.of(_estimate(checkpoint, with_formats(profile, changed))).minus(start)
    choices = {
        part: [
            Choice(
                formats[form][part],
                tuple(
                    sizes[part] + each * sizes[part] / of_role[part.role] for each in more[part.role, form]
                ),
                0.0,
            )
            for form in kinds
        ]
        for part in parts
    }
    data = sum(sizes[part] for part in parts)
    return Candidates(checkpoint, profile, choices, start.minus(Bounds(data, data)))


def amount(size: float) -> str:
    """Bytes for a message, rounded up to what can be given."""
    unit, name = (1e9, "GB") if size >= 1e9 else (1e6, "MB")
    digits = 10 ** max(0, 3 - len(str(int(size / unit))))
    return f"{math.ceil(digits * size / unit) / digits:g}{name}"


def _estimate(checkpoint: Checkpoint, profile: Profile) -> Estimate:
    return estimate(checkpoint, profile, _mtp(checkpoint, profile))


def _mtp(checkpoint: Checkpoint, profile: Profile) -> bool:
    """Whether the head is exported: as far as the configuration tells where there are no weights."""
    there = any(name.startswith(MTP) for name in checkpoint.tensors)
    return profile.mtp and (there if checkpoint.tensors else declares_mtp(checkpoint.config))
