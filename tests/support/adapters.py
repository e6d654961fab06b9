"""LoRA adapters made and saved by PEFT, with random values in place of a training's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from qwen_export.adapters.switched import with_switched_adapters
from qwen_export.backends.onnx.beside import write_beside
from qwen_export.checkpoint import Checkpoint
from qwen_export.export import export
from torch import nn

from benchmarks.support.artifacts import Quiet, float_profile
from tests.support.random_checkpoints import random_model, write_random_checkpoint

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


@dataclass(frozen=True)
class Adapted:
    """In `folder`: an `artifact` of the checkpoint `base` with the adapters `style`, of weight 0.5, and
    `tools`; and `words`, an adapter beside it, whose file is `words.onnx_adapter`. Nothing is quantised."""

    folder: Path
    shape: Mapping[str, Any] = field(default_factory=dict)
    _models: dict[str | None, nn.Module] = field(default_factory=dict)

    @property
    def artifact(self) -> Path:
        return self.folder / "artifact"

    @property
    def words(self) -> Path:
        return self.folder / "words.onnx_adapter"

    def model(self, adapter: str | None) -> Any:
        """PEFT's, in float32, merged."""
        if adapter not in self._models:
            model: Any = random_model(**self.shape)
            if adapter is not None:
                model = PeftModel.from_pretrained(model, self.folder / adapter)
                for module in model.modules():
                    if hasattr(module, "set_scale"):
                        module.set_scale("default", 0.5 if adapter == "style" else 1)
                model = model.merge_and_unload()
            self._models[adapter] = model
        return self._models[adapter]

    def greedy(self, adapter: str | None, prompt: Sequence[int], count: int) -> list[int]:
        """The tokens that PEFT's model goes on with, up to one that ends its answer."""
        model = self.model(adapter)
        with torch.no_grad():
            found = model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False)
        tokens: list[int] = found[0, len(prompt) :].tolist()
        end = model.config.eos_token_id
        return tokens[: tokens.index(end)] if end in tokens else tokens


def make_adapted(folder: Path, **shape: Any) -> Adapted:
    base = write_random_checkpoint(folder / "base", **shape)
    train(random_model(**shape), folder / "style", seed=1, target_modules=LINEAR, r=4)
    router = {"target_parameters": ["mlp.gate.weight"]} if shape else {}
    tools = {"target_modules": "all-linear", "r": 2, "use_rslora": True, **router}
    train(random_model(**shape), folder / "tools", seed=2, **tools)
    train(random_model(**shape), folder / "words", seed=3, target_modules=["v_proj", "down_proj"], r=3)
    profile = float_profile("fused")
    checkpoint = Checkpoint.open(str(base))
    given = [f"{folder / 'style'}=0.5", f"{folder / 'tools'}"]
    export(
        with_switched_adapters(checkpoint, given, profile),
        profile,
        folder / "artifact",
        Quiet(),
        all_logits=True,
    )
    write_beside(folder / "artifact", checkpoint, [f"{folder / 'words'}"], folder)
    return Adapted(folder, shape)
