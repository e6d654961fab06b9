"""adapter_config.json of a PEFT adapter: what is merged, with which scaling, and what is refused by name.

Source: PEFT's LoraConfig, check_target_module_exists and get_pattern_key, 0.21.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError, model_validator
from qwen_common.errors import UserError, one_line
from qwen_common.files import read_json

from qwen_export.checkpoint.config import in_words

ADAPTER_CONFIG = "adapter_config.json"
_MERGE_ELSEWHERE = "merge it with PEFT's merge_and_unload(), save that, and give its folder as CHECKPOINT"
_PROMPTS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING", "CPT", "ADAPTION_PROMPT")
# Fields that make LoRA something else, by what it is then.
_VARIANTS = {
    "alora_invocation_tokens": "Activated LoRA, which acts on some tokens only",
    "arrow_config": "Arrow, which chooses adapters token by token",
    "kasa_config": "KaSA, which changes the base",
    "layer_replication": "of a model with replicated layers",
    "megatron_config": "of a Megatron model",
    "monteclora_config": "MonteCLoRA",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QA-LoRA",
    "velora_config": "VeLoRA",
}
# Values of init_lora_weights that leave the base as it is.
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica")
_MOST_SHOWN = 60  # characters of what the file says

_Index = Annotated[int, Field(strict=True)]
_Rank = Annotated[int, Field(gt=0, strict=True)]
_Alpha = Annotated[float, Field(allow_inf_nan=False, strict=True)]
_Names = str | list[str]


class AdapterConfig(BaseModel):
    """The fields that say what the tensors of a LoRA adapter mean, named as PEFT names them."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    r: _Rank = 8
    lora_alpha: _Alpha = 8.0
    use_rslora: StrictBool = False
    use_dora: StrictBool = False
    rank_pattern: dict[str, _Rank] = {}
    alpha_pattern: dict[str, _Alpha] = {}
    target_modules: _Names | None = None
    exclude_modules: _Names = []
    target_parameters: list[str] = []
    layers_to_transform: _Index | list[_Index] = []
    layers_pattern: _Names = []
    modules_to_save: list[str] = []
    trainable_token_indices: list[_Index] | dict[str, list[_Index]] = []
    ensure_weight_tying: StrictBool = False
    base_model_name_or_path: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if value is not None}

    @model_validator(mode="after")
    def _patterns_are_valid(self) -> AdapterConfig:
        patterns = [*self.rank_pattern, *self.alpha_pattern, *_listed(self.layers_pattern)]
        patterns += [names for names in (self.target_modules, self.exclude_modules) if isinstance(names, str)]
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                shown = pattern[:_MOST_SHOWN]
                raise ValueError(f"{shown!r} is no regular expression ({error})") from error
        return self

    def rank(self, module: str) -> int:
        """Of the factors of `module`, a name without `base_model.model.`."""
        return int(_by_pattern(self.rank_pattern, module, self.r))

    def scaling(self, module: str) -> float:
        """What the product of the factors of `module` is multiplied with."""
        rank, alpha = self.rank(module), _by_pattern(self.alpha_pattern, module, self.lora_alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def targets(self, module: str) -> bool:
        """Whether PEFT puts LoRA on `module`, a name without `base_model.model.`."""
        if isinstance(self.exclude_modules, str):
            if re.fullmatch(self.exclude_modules, module):
                return False
        elif _ends_with_one(module, self.exclude_modules):
            return False
        if self.target_modules is None:  # chosen by PEFT for the model's type
            return not self.target_parameters
        if isinstance(self.target_modules, str):
            everything = self.target_modules == "all-linear"
            return everything or re.fullmatch(self.target_modules, module) is not None
        return _ends_with_one(module, self.target_modules) and self._in_its_layers(module)

    def targets_parameter(self, parameter: str) -> bool:
        return _ends_with_one(parameter, self.target_parameters)

    def _in_its_layers(self, module: str) -> bool:
        layers = self.layers_to_transform
        if isinstance(layers, list) and not layers:
            return True
        patterns = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in _listed(self.layers_pattern)]
        found = (re.match(pattern, module) for pattern in patterns or [r".*?\.[^.]*\.(\d+)\."])
        index = next((int(match[1]) for match in found if match), None)
        return index is not None and index in (layers if isinstance(layers, list) else [layers])


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Raises:
    UserError: it is missing or malformed, of another type than LoRA, or of a variant that is not merged.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        raise UserError(f"{folder} has no {ADAPTER_CONFIG}: give the folder of a PEFT adapter with --adapter")
    content = read_json(path, "save the adapter again with PEFT's save_pretrained()")
    found = content.get("peft_type")
    if found != "LORA":
        shown = one_line(str(found))[:_MOST_SHOWN]
        way = "no weights hold that" if found in _PROMPTS else _MERGE_ELSEWHERE
        raise UserError(f"{folder} is an adapter of the type {shown}, and only LoRA is merged here: {way}")
    for field, what in _VARIANTS.items():
        if content.get(field):
            raise UserError(
                f"{path}: {field}: the adapter is {what}, which is not merged here: {_MERGE_ELSEWHERE}"
            )
    start = content.get("init_lora_weights", True)
    if start is not None and start not in _PLAIN_STARTS:
        shown = one_line(str(start))[:_MOST_SHOWN]
        raise UserError(
            f"{path}: init_lora_weights is {shown}, which changes the base before training: save the adapter "
            "with path_initial_model_for_weight_conversion, which makes it plain LoRA"
        )
    try:
        return AdapterConfig.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{path}: {in_words(error)}") from error


def _by_pattern(values: Mapping[str, float], module: str, default: float) -> float:
    """By the first pattern that the end of `module` matches."""
    matching = (value for key, value in values.items() if re.match(rf"(.*\.)?({key})$", module))
    return next(matching, default)


def _ends_with_one(name: str, ends: list[str]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)


def _listed(names: _Names) -> list[str]:
    return [names] if isinstance(names, str) else names
