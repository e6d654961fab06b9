"""Which of the model's tensors an adapter's tensors change, and how; what fits none is refused by name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod

from qwen_common.errors import UserError

from qwen_export.adapters.adapter import ADAPTER_TENSORS, Adapter, Part
from qwen_export.adapters.config import ADAPTER_CONFIG
from qwen_export.adapters.updates import (
    AddedBias,
    EmbeddingLowRank,
    ExpertPart,
    ExpertsApart,
    ExpertsLowRank,
    LowRank,
    Replacement,
    TokenRows,
    Update,
    keeping_some,
)
from qwen_export.architecture.models.qwen3_5 import EMBEDDING, LM_HEAD
from qwen_export.architecture.mtp import MTP
from qwen_export.checkpoint.tensors.plain import PlainTensor
from qwen_export.checkpoint.tensors.tensor import CheckpointTensor

_BASE_LAYER = ".base_layer"
_EXPERTS = ".mlp.experts"
_STACKS = ("gate_up_proj", "down_proj")  # in the order in which transformers' module has them
_EXPERT = re.compile(r"(.+\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj")
_AGAIN = "save the adapter again"


@dataclass
class Placed:
    """What an adapter does to a model.

    Attributes:
        bases: tensors that it stores as they were before its own change, in place of the checkpoint's.
        updates: by the tensor's name, in the order of the file.
        missing: modules that its configuration names and its file has nothing for.
    """

    bases: dict[str, CheckpointTensor] = field(default_factory=dict)
    updates: list[tuple[str, Update]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def place(adapter: Adapter, tensors: Mapping[str, CheckpointTensor], tied: bool) -> Placed:
    """What `adapter` does to the model of `tensors`, by their names in the model.

    Args:
        tied: lm_head is the embedding; `tensors` has it under both names.

    Raises:
        UserError: a tensor of the adapter fits no module, or not its shape; factors without their like, of
            another rank than adapter_config.json says, or of modules that it leaves out; or a weight for what
            cannot be weighted.
    """
    return _Placing(adapter, tensors, tied).placed()


class _Placing:
    def __init__(self, adapter: Adapter, tensors: Mapping[str, CheckpointTensor], tied: bool) -> None:
        self._adapter, self._tensors, self._tied = adapter, tensors, tied
        self._config = adapter.config
        self._found = Placed()
        self._apart: dict[str, dict[int, list[ExpertPart]]] = {}
        self._by_expert = keeping_some()

    def placed(self) -> Placed:
        whole = [kinds[""] for kinds in self._adapter.parts.values() if "" in kinds]
        for part in whole:
            if _BASE_LAYER in part.module:
                self._base(part)
        for part in whole:
            if _BASE_LAYER not in part.module and not self._follows_the_embedding(part.module):
                self._replace(part)
        for module, kinds in self._adapter.parts.items():
            factors = {kind: part for kind, part in kinds.items() if kind}
            if factors and not self._follows_the_embedding(f"{module}.weight"):
                self._module(module, factors)
        self._found.updates += [(stack, ExpertsApart(parts)) for stack, parts in self._apart.items()]
        self._check_saved(whole)
        self._found.missing = list(self._missing())
        return self._found

    def _follows_the_embedding(self, name: str) -> bool:
        """PEFT stores what it ties twice."""
        return self._tied and self._config.ensure_weight_tying and name == LM_HEAD

    def _add(self, name: str, update: Update) -> None:
        self._found.updates.append((name, update))
        both = self._config.ensure_weight_tying or isinstance(update, TokenRows)
        if self._tied and name == EMBEDDING and both:
            self._found.updates.append((LM_HEAD, update))

    def _base(self, part: Part) -> None:
        name = part.module.replace(_BASE_LAYER, "")
        self._fits(part, name, self._shape(name, part))
        for one in (EMBEDDING, LM_HEAD) if self._tied and name in (EMBEDDING, LM_HEAD) else (name,):
            self._found.bases[one] = part.tensor

    def _replace(self, part: Part) -> None:
        self._fits(part, part.module, self._shape(part.module, part))
        self._not_weighted(part)
        self._add(part.module, Replacement(part.tensor))

    def _module(self, module: str, factors: Mapping[str, Part]) -> None:
        first = next(iter(factors.values()))
        if "token_adapter" in factors:
            self._tokens(f"{module}.weight", factors["token_adapter"])
            for kind in factors.keys() - {"token_adapter"}:
                raise self._fits_none(factors[kind])
            return
        if f"{module}.weight" in self._tensors:
            self._whole_module(module, factors, first)
        elif match := _EXPERT.fullmatch(module):
            self._one_expert(match, factors, first)
        elif module.replace(_BASE_LAYER, "").endswith(_EXPERTS):
            self._stack_of_experts(module, factors, first)
        else:
            raise self._fits_none(first)

    def _whole_module(self, module: str, factors: Mapping[str, Part], first: Part) -> None:
        name, parameter = f"{module}.weight", f"{first.key}.weight"
        as_parameter = self._config.targets_parameter(parameter)
        if not as_parameter and not self._config.targets(first.key):
            raise self._left_out(first)
        key = parameter if as_parameter else first.key
        shape = self._shape(name, first)
        if "lora_embedding_A" in factors or "lora_embedding_B" in factors:
            rank = self._config.rank(key)
            a, b = self._pair(factors, "lora_embedding_", key, rank)
            self._fits(a, name, (rank, shape[0]))
            self._fits(b, name, (shape[1], rank))
            base = self._found.bases.get(name, self._tensors[name])
            magnitude = self._magnitude(factors, shape[1])
            self._add(name, EmbeddingLowRank(a.tensor, b.tensor, self._scaling(key), magnitude, base))
        elif as_parameter and len(shape) == 3:
            self._add(name, self._stacked(name, shape, factors, key))
        else:
            self._add(name, self._low_rank(name, shape, factors, key))
        if bias := factors.get("lora_B.bias"):
            self._fits(bias, f"{module}.bias", self._shape(f"{module}.bias", bias))
            self._add(f"{module}.bias", AddedBias(bias.tensor, self._scaling(key)))

    def _one_expert(self, match: re.Match[str], factors: Mapping[str, Part], first: Part) -> None:
        prefix, expert, kind = match[1], int(match[2]), match[3]
        stack = f"{prefix}.{'down_proj' if kind == 'down' else 'gate_up_proj'}"
        experts, rows, inputs = self._shape(stack, first)
        if expert >= experts or "lora_B.bias" in factors:
            raise self._fits_none(first)
        if not self._config.targets(first.key):
            raise self._left_out(first)
        rows //= 1 if kind == "down" else 2
        update = self._low_rank(match[0], (rows, inputs), factors, first.key)
        parts = self._apart.setdefault(stack, {}).setdefault(expert, [])
        parts.append(ExpertPart(rows if kind == "up" else 0, rows, update))

    def _stack_of_experts(self, module: str, factors: Mapping[str, Part], first: Part) -> None:
        """PEFT wraps the module once for each parameter; the last one's factors have no base_layer."""
        experts, depth = module.replace(_BASE_LAYER, ""), module.count(_BASE_LAYER)
        wrapped = [stack for stack in _STACKS if self._config.targets_parameter(f"{first.key}.{stack}")]
        if depth >= len(wrapped):
            raise self._left_out(first)
        stack = wrapped[-1 - depth]
        name = f"{experts}.{stack}"
        shape = self._shape(name, first)
        self._add(name, self._stacked(name, shape, factors, f"{first.key}.{stack}"))

    def _stacked(
        self, name: str, shape: tuple[int, ...], factors: Mapping[str, Part], key: str
    ) -> ExpertsLowRank:
        experts, rows, inputs = shape
        ranks = experts * self._config.rank(key)
        a, b = self._pair(factors, "lora_", key, ranks)
        self._fits(a, name, (ranks, inputs))
        self._fits(b, name, (rows, ranks))
        for kind in factors.keys() - {"lora_A", "lora_B"}:
            raise self._fits_none(factors[kind])
        return ExpertsLowRank(a.tensor, b.tensor, self._scaling(key), experts, self._by_expert)

    def _low_rank(self, name: str, shape: tuple[int, ...], factors: Mapping[str, Part], key: str) -> LowRank:
        rank = self._config.rank(key)
        a, b = self._pair(factors, "lora_", key, rank)
        self._fits(a, name, (rank, *shape[1:]))
        self._fits(b, name, (shape[0], rank, *[1] * (len(shape) - 2)))  # two axes, or a convolution's
        return LowRank(a.tensor, b.tensor, self._scaling(key), self._magnitude(factors, shape[0]))

    def _pair(self, factors: Mapping[str, Part], prefix: str, key: str, ranks: int) -> tuple[Part, Part]:
        """Both factors of `key`; `ranks` is the length of the first axis of A."""
        for kind in (f"{prefix}A", f"{prefix}B"):
            if kind not in factors:
                raise UserError(f"{self._file} has no {kind} for {key}: is it complete? {_AGAIN}")
        for kind in factors.keys() - {f"{prefix}A", f"{prefix}B", "lora_B.bias", "lora_magnitude_vector"}:
            raise self._fits_none(factors[kind])
        a, b = factors[f"{prefix}A"], factors[f"{prefix}B"]
        if a.tensor.shape[0] != ranks:
            raise UserError(
                f"{self._file}: {a.stored_name} has shape {a.tensor.shape}, and {ADAPTER_CONFIG} says rank "
                f"{self._config.rank(key)}: are both of one adapter? {_AGAIN}"
            )
        return a, b

    def _magnitude(self, factors: Mapping[str, Part], count: int) -> PlainTensor | None:
        found = factors.get("lora_magnitude_vector")
        if (found is not None) != self._config.use_dora:
            key = next(iter(factors.values())).key
            what = "has no" if found is None else "has a"
            raise UserError(
                f"{self._file} {what} lora_magnitude_vector for {key}, and {ADAPTER_CONFIG} says use_dora "
                f"{str(self._config.use_dora).lower()}: are both of one adapter? {_AGAIN}"
            )
        if found is None:
            return None
        if prod(found.tensor.shape) != count:
            raise self._misfit(found, found.module, (count,))
        return found.tensor

    def _tokens(self, name: str, part: Part) -> None:
        given = self._config.trainable_token_indices
        if isinstance(given, dict):
            ends = (tokens for end, tokens in given.items() if f".{part.key}".endswith(f".{end}"))
            given = next(ends, [])
        rows, hidden = self._shape(name, part)
        self._fits(part, name, (len(given), hidden))
        if any(not 0 <= token < rows for token in given):
            raise UserError(
                f"{self._adapter.root / ADAPTER_CONFIG}: trainable_token_indices go beyond the {rows} tokens "
                "of the model: is the adapter for a model with more?"
            )
        self._not_weighted(part)
        self._add(name, TokenRows(part.tensor, tuple(given)))

    def _scaling(self, key: str) -> float:
        return self._adapter.weight * self._config.scaling(key)

    @property
    def _file(self) -> str:
        return f"{self._adapter.root / ADAPTER_TENSORS}"

    def _shape(self, name: str, part: Part) -> tuple[int, ...]:
        if name not in self._tensors:
            raise self._fits_none(part)
        return self._tensors[name].shape

    def _fits(self, part: Part, name: str, expected: tuple[int, ...]) -> None:
        if part.tensor.shape != expected:
            raise self._misfit(part, name, expected)

    def _misfit(self, part: Part, name: str, expected: tuple[int, ...]) -> UserError:
        base = self._config.base_model_name_or_path
        return UserError(
            f"{self._file}: {part.stored_name} has shape {part.tensor.shape}, and {name} of this model asks "
            f"for {expected}: the adapter is for another model{f', {base}' if base else ''}"
        )

    def _fits_none(self, part: Part) -> UserError:
        base = self._config.base_model_name_or_path
        return UserError(
            f"{self._file}: {part.stored_name} fits no module of this model: is the adapter for another one"
            f"{f' ({base})' if base else ''}, or CHECKPOINT without a part that it changes?"
        )

    def _left_out(self, part: Part) -> UserError:
        return UserError(
            f"{self._file} has {part.stored_name}, which {ADAPTER_CONFIG} leaves out (target_modules, "
            "target_parameters, exclude_modules, layers_to_transform), so PEFT would not load it: are both "
            f"of one adapter? {_AGAIN}"
        )

    def _not_weighted(self, part: Part) -> None:
        if self._adapter.weight != 1:
            raise UserError(
                f"{self._adapter.name} has {part.module} in full, which cannot have the weight "
                f"{self._adapter.weight:g}: give the adapter without one"
            )

    def _check_saved(self, whole: list[Part]) -> None:
        modules = {name.rpartition(".")[0] for name in self._tensors}
        stored = {part.module.rpartition(".")[0] for part in whole}
        for end in self._config.modules_to_save:

            def named(names: set[str], end: str = end) -> bool:
                return any(f".{name}".endswith(f".{end}") for name in names)

            if named(modules) and not named(stored):
                raise UserError(
                    f"{self._adapter.root / ADAPTER_CONFIG}: modules_to_save names {end}, which "
                    f"{ADAPTER_TENSORS} does not have: {_AGAIN}"
                )

    def _missing(self) -> Iterator[str]:
        if not isinstance(self._config.target_modules, list):
            return  # patterns are for the names that the model had in training
        for name, tensor in self._tensors.items():
            module = name.removesuffix(".weight")
            linear = module != name and len(tensor.shape) == 2 and not name.startswith(MTP)
            if linear and self._config.targets(module) and module not in self._adapter.parts:
                yield module
