"""Merged tensors against PEFT's merge_and_unload, and logits where PEFT's merge is not what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from qwen_common.errors import UserError
from qwen_export import reference
from qwen_export.adapters.merge import with_adapters
from qwen_export.checkpoint import Checkpoint
from qwen_export.checkpoint.tensors.names import tensor_name
from qwen_export.reference import Weights

from tests.support.adapters import LINEAR, as_module, train
from tests.support.quantized_checkpoints import unfuse
from tests.support.random_checkpoints import (
    load_tensors,
    random_model,
    random_vision_model,
    save_shards,
    write_random_checkpoint,
    write_vision_checkpoint,
)

UNTIED = {"tie_word_embeddings": False}
EXPERTS = {"num_experts": 4}
IDS = np.arange(1, 25, dtype=np.int64)[None]


def read(checkpoint: Checkpoint, step: int | None = None) -> dict[str, np.ndarray]:
    """Every tensor, in pieces of `step` rows."""
    found = {}
    for name, tensor in checkpoint.tensors.items():
        rows = tensor.shape[0]
        pieces = [tensor.read(i, min(i + (step or rows), rows)) for i in range(0, rows, step or rows)]
        found[name] = np.concatenate(pieces).astype(np.float32)
    return found


def assert_same(checkpoint: Checkpoint, expected: torch.nn.Module) -> None:
    """That every tensor is that of the module `expected`, whatever pieces it is read in."""
    wanted = {tensor_name(name): value.float().numpy() for name, value in expected.state_dict().items()}
    for step in (None, 7):
        found = read(checkpoint, step)
        assert set(found) <= set(wanted)
        for name, value in found.items():
            np.testing.assert_allclose(value, wanted[name], rtol=1e-5, atol=2e-6, err_msg=name)


def logits(checkpoint: Checkpoint) -> np.ndarray:
    weights, hidden = Weights(checkpoint.tensors), np.empty(0)
    for found in reference.forward(checkpoint.config, weights, IDS):
        hidden = found
    return reference.logits(checkpoint.config, weights, hidden)[0]


def assert_answers_as(checkpoint: Checkpoint, model: torch.nn.Module) -> None:
    with torch.no_grad():
        expected = model(input_ids=torch.from_numpy(IDS)).logits[0].numpy()
    np.testing.assert_allclose(logits(checkpoint), expected, rtol=1e-3, atol=1e-3)


TEXT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "LoRA": ({}, {"target_modules": LINEAR}),
    "rsLoRA": ({}, {"target_modules": LINEAR, "use_rslora": True, "r": 4, "lora_alpha": 3}),
    "DoRA": ({}, {"target_modules": LINEAR, "use_dora": True}),
    "patterns": (
        {},
        {
            "target_modules": r".*\.layers\.(0|3)\..*_proj",
            "rank_pattern": {"q_proj": 4, r"layers.0.mlp.up_proj": 2},
            "alpha_pattern": {"v_proj": 32},
        },
    ),
    "some layers": ({}, {"target_modules": LINEAR, "layers_to_transform": [1, 3], "fan_in_fan_out": True}),
    "all linear but some": ({}, {"target_modules": "all-linear", "exclude_modules": ["o_proj"]}),
    "embedding and head": (UNTIED, {"target_modules": ["lm_head", "embed_tokens", "q_proj"]}),
    "embedding and head, DoRA": (
        UNTIED,
        {"target_modules": ["lm_head", "embed_tokens", "q_proj"], "use_dora": True},
    ),
    "modules to save": (
        UNTIED,
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "input_layernorm"]},
    ),
    "both of a tied model saved": (
        {},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    ),
    "biases": ({}, {"target_modules": ["q_proj"], "bias": "all"}),
    "tokens": ({}, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}),
    "tokens of both": (
        UNTIED,
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [3]}},
    ),
    "fused experts": (
        EXPERTS,
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
    ),
    "one of the fused": (
        EXPERTS,
        {
            "target_modules": [],
            "target_parameters": ["experts.down_proj"],
            "rank_pattern": {"experts.down_proj": 4},
        },
    ),
    "other parameters": (
        EXPERTS,
        {
            "target_modules": [],
            "target_parameters": [
                "experts.gate_up_proj",
                "mlp.gate.weight",
                "q_proj.weight",
                "conv1d.weight",
            ],
            "r": 3,
        },
    ),
    "shared experts": (EXPERTS, {"target_modules": ["gate_proj", "up_proj", "down_proj"]}),
}


@pytest.mark.parametrize("case", TEXT)
def test_text_model(case: str, tmp_path: Path) -> None:
    overrides, config = TEXT[case]
    folder = write_random_checkpoint(tmp_path / "base", **overrides)
    adapted = train(random_model(**overrides), tmp_path / "adapter", **config)
    merged = with_adapters(Checkpoint.open(str(folder)), [str(tmp_path / "adapter")])
    assert_same(merged, adapted.merge_and_unload())
    assert not [note for note in merged.notes if "tensors for modules" in note]


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["qkv", "q_proj", "proj", "linear_fc1"], "bias": "lora_only"},
        {"target_modules": ["qkv", "q_proj", "proj", "linear_fc1"], "use_dora": True},
        {"target_modules": ["qkv", "linear_fc2"], "lora_bias": True},
        {"target_modules": ["pos_embed"]},
        {"target_modules": ["qkv"], "modules_to_save": ["merger"]},
    ],
    ids=str,
)
def test_vision_tower(config: dict[str, Any], tmp_path: Path) -> None:
    folder = write_vision_checkpoint(tmp_path / "base")
    adapted = train(random_vision_model(), tmp_path / "adapter", **config)
    merged = with_adapters(Checkpoint.open(str(folder)), [str(tmp_path / "adapter")])
    assert_same(merged, adapted.merge_and_unload())


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({"target_modules": ["lm_head"]}, False),
        ({"target_modules": ["embed_tokens"]}, False),
        ({"target_modules": ["lm_head", "embed_tokens"]}, False),
        ({"target_modules": ["lm_head", "embed_tokens"], "ensure_weight_tying": True}, True),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, False),
        (
            {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
            True,
        ),
    ],
    ids=str,
)
def test_an_adapter_of_one_end_of_a_tied_model(config: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    """PEFT's merge adds to the one parameter that both share, so the model as it was trained is the truth."""
    folder = write_random_checkpoint(tmp_path / "base")
    adapted = train(random_model(), tmp_path / "adapter", **config)
    merged = with_adapters(Checkpoint.open(str(folder)), [str(tmp_path / "adapter")])
    assert_answers_as(merged, adapted)
    assert merged.config.tie_word_embeddings == tied
    assert tied == (not any("exported as two tensors" in note for note in merged.notes))


def test_experts_and_mtp_head_one_by_one(tmp_path: Path) -> None:
    """Such as adapters of vLLM's or of transformers 4 have it: a module for each expert."""
    folder = write_random_checkpoint(tmp_path / "base", **EXPERTS)
    torch.manual_seed(3)
    mtp = {f"mtp.layers.0.mlp.{name}_proj.weight": torch.randn(96, 64) for name in ("gate", "up")}
    tensors = load_tensors(folder) | mtp
    save_shards(folder, tensors, 1)
    apart = unfuse(tensors)
    linear = {name: value for name, value in apart.items() if ".experts." in name or name in mtp}
    for config in ({}, {"use_dora": True}):
        adapted = train(
            as_module(linear), tmp_path / str(config), target_modules=["gate_proj", "up_proj"], **config
        )
        merged = with_adapters(Checkpoint.open(str(folder)), [str(tmp_path / str(config))])
        expected = {name: value.numpy() for name, value in adapted.merge_and_unload().state_dict().items()}
        found = unfuse({name: torch.from_numpy(value) for name, value in read(merged, 3).items()})
        for name, value in expected.items():
            np.testing.assert_allclose(found[name].numpy(), value, rtol=1e-5, atol=2e-6, err_msg=name)
            assert np.array_equal(value, apart[name].numpy()) == (".down_proj." in name)


def test_several_with_weights(tmp_path: Path) -> None:
    """One after the other, which for LoRA is what add_weighted_adapter calls "cat"."""
    folder = write_random_checkpoint(tmp_path / "base")
    train(random_model(), tmp_path / "a", seed=1, target_modules=LINEAR)
    train(random_model(), tmp_path / "b=2", seed=2, target_modules=["q_proj", "k_proj"], r=4)
    both = with_adapters(Checkpoint.open(str(folder)), [f"{tmp_path / 'a'}=0.5", f"{tmp_path / 'b=2'}=-0.25"])
    adapted = PeftModel.from_pretrained(random_model(), tmp_path / "a", adapter_name="a")
    adapted.load_adapter(tmp_path / "b=2", adapter_name="b")
    adapted.add_weighted_adapter(["a", "b"], [0.5, -0.25], "cat", combination_type="cat")
    adapted.set_adapter("cat")
    assert_same(both, adapted.merge_and_unload())
    assert [(adapter["name"], adapter["weight"]) for adapter in both.adapters] == [("a", 0.5), ("b=2", -0.25)]


def test_dora_after_another(tmp_path: Path) -> None:
    """Norms are those of the checkpoint's own rows; a weight multiplies the scaling, as set_scale does."""
    folder = write_random_checkpoint(tmp_path / "base")
    train(random_model(), tmp_path / "a", seed=1, target_modules=LINEAR)
    train(random_model(), tmp_path / "b", seed=2, target_modules=LINEAR, use_dora=True)
    both = with_adapters(Checkpoint.open(str(folder)), [str(tmp_path / "a"), f"{tmp_path / 'b'}=0.5"])
    adapted = PeftModel.from_pretrained(random_model(), tmp_path / "a", adapter_name="a")
    adapted.load_adapter(tmp_path / "b", adapter_name="b")
    for module in adapted.modules():
        if hasattr(module, "set_scale") and "b" in module.scaling:
            module.set_scale("b", 0.5)
    assert_same(both, adapted.merge_and_unload(adapter_names=["a", "b"]))


def test_the_text_model_of_a_vision_checkpoint(tmp_path: Path) -> None:
    """Trained as one of the two, merged into the other: the names are the model's in both."""
    folder = write_vision_checkpoint(tmp_path / "base")
    text = random_vision_model()
    adapted = train(text, tmp_path / "adapter", target_modules=["q_proj", "up_proj"])
    names = load_tensors(tmp_path / "adapter")
    save_shards(
        tmp_path / "adapter", {name.replace("language_model.", ""): v for name, v in names.items()}, 1
    )
    (tmp_path / "adapter" / "model.safetensors").rename(tmp_path / "adapter" / "adapter_model.safetensors")
    merged = with_adapters(Checkpoint.open(str(folder), text_only=True), [str(tmp_path / "adapter")])
    assert_same(merged, adapted.merge_and_unload())


def test_no_adapter_leaves_the_checkpoint(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(str(write_random_checkpoint(tmp_path)))
    assert with_adapters(checkpoint, []) is checkpoint


def test_what_overflows_is_said(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "base")
    train(random_model(), tmp_path / "adapter", target_modules=["q_proj"], lora_alpha=int(1e38))
    merged = with_adapters(Checkpoint.open(str(folder)), [f"{tmp_path / 'adapter'}=1e30"])
    with pytest.raises(UserError, match=r"q_proj.weight is not finite once the adapter is merged"):
        read(merged)
