"""LoRA adapters made and saved by PEFT, with random values in place of a training's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

LINEAR = ["q_proj", "up_proj", "in_proj_qkv", "out_proj"]


def train(model: nn.Module, folder: Path, seed: int = 1, **config: Any) -> PeftModel:
    """Put LoRA on `model`, in place, give every trained value another, and save the adapter to `folder`."""
    adapted = get_peft_model(model, LoraConfig(**config))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.normal_(0.0, 0.3)
            elif parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(folder)
    return adapted


def as_module(tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """Modules in which each `X.weight` [out, in] of `tensors` is an nn.Linear called X."""
    root = nn.Module()
    for name, value in tensors.items():
        *path, last, _ = name.split(".")
        parent = root
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        linear = nn.Linear(value.shape[1], value.shape[0], bias=False)
        linear.weight.data = value.clone()
        parent.add_module(last, linear)
    return root
