"""The tables of tensors are what transformers' own models have: every name, every shape, nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from qwen_export.architecture.mtp import mtp_tensors
from qwen_export.architecture.registry import recipe_role
from qwen_export.architecture.tensors import TensorSpec, layer_of
from qwen_export.checkpoint import Checkpoint
from qwen_export.checkpoint.config import load_config, load_vision_config
from qwen_profiles.schema import ROLES

from tests.support.mtp import MtpHead
from tests.support.random_checkpoints import (
    random_model,
    random_vision_model,
    write_random_checkpoint,
    write_vision_checkpoint,
)

MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "untied": {"tie_word_embeddings": False},
    "uneven heads": {"linear_num_value_heads": 6, "linear_value_head_dim": 24, "linear_conv_kernel_dim": 3},
    "layers by name": {"num_hidden_layers": 3, "layer_types": ["full_attention", *["linear_attention"] * 2]},
    "experts": {"num_experts": 8},
    "untied experts": {"num_experts": 5, "tie_word_embeddings": False, "moe_intermediate_size": 160},
}


def shapes(tensors: dict[str, TensorSpec]) -> dict[str, tuple[int, ...]]:
    return {name: spec.shape for name, spec in tensors.items()}


def state(module: torch.nn.Module, prefix: str = "") -> dict[str, tuple[int, ...]]:
    return {prefix + name: tuple(value.shape) for name, value in module.state_dict().items()}


@pytest.mark.parametrize("case", MODELS)
def test_text_models(case: str, tmp_path: Path) -> None:
    overrides = MODELS[case]
    config = load_config(write_random_checkpoint(tmp_path, **overrides))
    expected = state(random_model(**overrides))
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]
    assert shapes(config.tensors()) == expected


@pytest.mark.parametrize("case", ["dense", "experts"])
def test_vision_language_models(case: str, tmp_path: Path) -> None:
    """Text model and tower together are the whole model."""
    overrides = MODELS[case]
    folder = write_vision_checkpoint(tmp_path, **overrides)
    vision = load_vision_config(folder)
    assert vision is not None
    expected = state(random_vision_model(**overrides))
    del expected["lm_head.weight"]
    found = {**load_config(folder).tensors(), **vision.tensors()}
    assert shapes(found) == {name.replace("language_model.", ""): shape for name, shape in expected.items()}
    Checkpoint.open(str(folder)).check(found)


@pytest.mark.parametrize("case", ["dense", "experts"])
def test_mtp_heads(case: str, tmp_path: Path) -> None:
    """transformers has no such class: the head is made of its layers, as in vLLM."""
    overrides = MODELS[case]
    config = load_config(write_random_checkpoint(tmp_path, **overrides))
    assert shapes(mtp_tensors(config)) == state(MtpHead(random_model(**overrides)), "mtp.")


@pytest.mark.parametrize("case", MODELS)
def test_roles(case: str, tmp_path: Path) -> None:
    """A matrix has a role of the recipe, by which profiles choose its format; what is small has none."""
    overrides = MODELS[case]
    tensors = load_config(write_random_checkpoint(tmp_path, **overrides)).tensors()
    modules = dict(random_model(**overrides).named_modules())
    for name, spec in tensors.items():
        owner = modules[name.rpartition(".")[0]]
        linear = isinstance(owner, (torch.nn.Linear, torch.nn.Embedding)) or "experts." in name
        router = name.endswith(("mlp.gate.weight", "shared_expert_gate.weight"))
        assert (spec.recipe_role is not None) == (linear and not router), name
        assert spec.recipe_role in (None, spec.role) and (spec.role in ROLES or spec.recipe_role is None)
        tied = name.startswith("model.embed") and "lm_head.weight" not in tensors
        assert recipe_role(name) == ("embedding" if tied else spec.recipe_role)
    embedding = tensors["model.embed_tokens.weight"].role
    assert embedding == ("embedding" if "lm_head.weight" in tensors else "lm_head")


def test_names_that_no_model_has() -> None:
    for name in ("model.layers.x.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight.more", "weight", ""):
        assert recipe_role(name) is None
    assert recipe_role("model.layers.12.mlp.up_proj.weight") == "mlp"
    assert recipe_role("model.visual.blocks.7.attn.qkv.weight") == "vision"
    assert recipe_role("model.visual.pos_embed.weight") is None
    assert layer_of("model.layers.12.mlp.up_proj.weight") == 12
    assert layer_of("mtp.layers.0.mlp.up_proj.weight") is layer_of("lm_head.weight") is None
