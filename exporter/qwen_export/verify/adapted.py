"""A model of transformers' with adapters put on it by PEFT, and not merged: as it was trained.

Merged by PEFT, an adapter of a tied embedding or head would answer otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_common.errors import UserError, one_line

if TYPE_CHECKING:
    from torch import nn

_MOST_SHOWN = 200  # characters of somebody else's message
_OTHERWISE = "verify without --reference transformers"


def adapted(loads: Sequence[Callable[[], nn.Module]], adapters: Sequence[tuple[Path, float]]) -> nn.Module:
    """The first of the models that has the modules of every adapter, with these on it.

    Args:
        loads: ways to load the model, which differ in its classes.
        adapters: folders, and what their scalings are multiplied with.

    Raises:
        UserError: no model has the modules of an adapter, or PEFT does not take it.
    """
    if not adapters:
        return loads[0]()
    fault = ""
    for load in loads:
        model, fault = _adapted(load(), adapters)
        if not fault:
            return model.eval()
    raise UserError(f"{fault}: {_OTHERWISE}")


def _adapted(model: nn.Module, adapters: Sequence[tuple[Path, float]]) -> tuple[nn.Module, str]:
    """The model, and a line about what does not fit it, or ""."""
    from peft import LoraConfig, PeftModel
    from peft.tuners.lora import LoraLayer

    names = [f"adapter_{at}" for at in range(len(adapters))]  # a folder's name may have dots
    found: Any = None
    for name, (folder, weight) in zip(names, adapters, strict=True):
        try:
            config = LoraConfig.from_pretrained(str(folder))
            config.init_lora_weights = True  # else the base would be looked at
            if found is None:
                found = PeftModel(model, config, name)
            else:
                found.add_adapter(name, config)
            strange = found.load_adapter(folder, name).unexpected_keys
        except Exception as error:  # whatever the libraries raise
            return model, f"PEFT does not take {folder} ({one_line(str(error))[:_MOST_SHOWN]})"
        if strange:
            return model, f"transformers' model has no module for {strange[0]} of {folder}"
        for module in found.modules():
            if isinstance(module, LoraLayer) and name in module.scaling:
                module.scaling[name] *= weight
    try:
        found.base_model.set_adapter(names)
    except Exception as error:
        return model, f"PEFT does not take these adapters together ({one_line(str(error))[:_MOST_SHOWN]})"
    return found, ""
