"""Tensors by whatever names they were saved under, and those that no export may leave out in silence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from qwen_common.errors import UserError
from qwen_export.checkpoint import Checkpoint
from qwen_export.checkpoint.tensors.names import tensor_name
from qwen_export.export import export
from qwen_profiles.schema import load_profile

from benchmarks.support.artifacts import Quiet
from tests.support.random_checkpoints import (
    edit_config,
    load_tensors,
    save_shards,
    write_random_checkpoint,
    write_vision_checkpoint,
)

NORM = "model.layers.2.input_layernorm.weight"


def rename(folder: Path, change: Callable[[str], str]) -> None:
    save_shards(folder, {change(name): value for name, value in load_tensors(folder).items()}, 1)


def add(folder: Path, **tensors: torch.Tensor) -> None:
    named = {name.replace("__", "."): value for name, value in tensors.items()}
    save_shards(folder, {**load_tensors(folder), **named}, 1)


WRAPPINGS: dict[str, Callable[[str], str]] = {
    "as the hub has it": lambda name: name.replace("model.", "model.language_model.", 1),
    "older transformers": lambda name: f"language_model.{name}",
    "without its head": lambda name: name.removeprefix("model."),
    "without its head, in a vision-language model": lambda name: name.replace("model.", "language_model.", 1),
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "torch.compile of each layer": lambda name: name.replace("layers.1.", "layers.1._orig_mod."),
    "data parallel": lambda name: f"module.{name}",
    "a merged adapter": lambda name: f"base_model.model.{name}",
    "a trainer's own class": lambda name: f"model.{name}",
    "a trainer's own class around a vision-language model": lambda name: (
        "model." + name.replace("model.", "model.language_model.", 1)
    ),
    "data parallel within it": lambda name: f"model.module.{name}",
    "Lightning's Fabric": lambda name: f"_forward_module.{name}",
    "TRL's model with a value head": lambda name: f"pretrained_model.{name}",
    "MLX-VLM": lambda name: f"language_model.{name}",
    "all at once": lambda name: f"module._orig_mod.base_model.model.{name}".replace(
        "model.layers", "model.language_model.layers"
    ),
    "fully sharded": lambda name: f"_fsdp_wrapped_module.{name}".replace(
        "mlp.", "_checkpoint_wrapped_module.mlp."
    ),
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("untied", [False, True])
def test_names_of_a_wrapped_model(wrapping: str, untied: bool, tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path, tie_word_embeddings=not untied)
    saved = load_tensors(folder)
    rename(folder, WRAPPINGS[wrapping])
    assert set(load_tensors(folder)) != set(saved)
    checkpoint = Checkpoint.open(str(folder))
    checkpoint.check(checkpoint.config.tensors())
    assert set(checkpoint.tensors) == set(saved) and not checkpoint.notes
    for name, value in saved.items():
        np.testing.assert_array_equal(checkpoint.read(name, 0, len(value)), value.numpy())


@pytest.mark.parametrize("prefix", ["visual.", "module.visual.", "model._orig_mod.visual."])
def test_names_of_a_wrapped_vision_tower(prefix: str, tmp_path: Path) -> None:
    folder = write_vision_checkpoint(tmp_path)
    rename(folder, lambda name: name.replace("model.visual.", prefix))
    checkpoint = Checkpoint.open(str(folder))
    assert checkpoint.vision
    checkpoint.check({**checkpoint.config.tensors(), **checkpoint.vision.tensors()})
    assert not checkpoint.notes


@pytest.mark.parametrize(
    "prefix", ["", "model.", "language_model.", "module._orig_mod.", "base_model.model."]
)
def test_names_of_a_wrapped_mtp_head(prefix: str) -> None:
    assert tensor_name(f"{prefix}mtp.layers.0.mlp.up_proj.weight") == "mtp.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize("other", ["module.", "language_model.", "base_model.model."])
def test_one_tensor_under_two_names_is_refused(other: str, tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path)
    save_shards(folder, {**load_tensors(folder), other + NORM: torch.ones(64)}, 1)
    with pytest.raises(UserError, match=f"tensor {NORM} is in model.safetensors under two names") as caught:
        Checkpoint.open(str(folder))
    assert NORM in str(caught.value).partition("(")[2] and other + NORM in str(caught.value)


def test_names_that_no_table_has(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path)
    rename(folder, lambda name: f"critic.{name}")
    checkpoint = Checkpoint.open(str(folder))
    with pytest.raises(UserError) as caught:
        checkpoint.check(checkpoint.config.tensors())
    message = str(caught.value)
    assert message.count("critic.model.") == 10 and f" and {len(checkpoint.tensors) - 10} more" in message


PROJECTION = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    "name",
    [
        f"{PROJECTION}.lora_A.weight",
        f"base_model.model.{PROJECTION}.lora_B.default.weight",
        f"{PROJECTION}.lora_magnitude_vector",
        f"base_model.model.{PROJECTION}.base_layer.weight",
        "base_model.model.lm_head.modules_to_save.weight",
        "model.embed_tokens.lora_embedding_A",
    ],
)
def test_an_adapter_that_is_not_merged(name: str, tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path)
    save_shards(folder, {**load_tensors(folder), name: torch.ones(64, 8)}, 1)
    with pytest.raises(UserError) as caught:
        Checkpoint.open(str(folder))
    assert f"tensor {name} belongs to an adapter that is not merged" in str(caught.value)
    assert "merge_and_unload()" in str(caught.value)


UNREAD = {
    "model__layers__0__self_attn__rotary_emb__inv_freq": torch.ones(4),
    "model__layers__3__self_attn__q_proj__bias": torch.ones(256),
    "model__position_ids": torch.arange(16),
    "model__layers__0__attn_mask": torch.ones(4, 4, dtype=torch.bool),
    "model__layers__9__input_layernorm__weight": torch.ones(64, dtype=torch.float64),
    **{f"model__layers__{layer}__input_layernorm__weight": torch.ones(64) for layer in range(10, 17)},
}


def test_what_is_not_read_is_named(tmp_path: Path) -> None:
    """As transformers, which reports such tensors as unexpected, and answers without them."""
    folder = write_random_checkpoint(tmp_path / "checkpoint")
    plain = export(Checkpoint.open(str(folder)), load_profile("cpu"), tmp_path / "plain", Quiet())
    add(folder, **UNREAD, mtp__something=torch.ones(3), model__visual__pos_embed__weight=torch.ones(3))
    notes: list[str] = []

    class Notes(Quiet):
        def note(self, text: str) -> None:
            notes.append(text)

    found = export(Checkpoint.open(str(folder)), load_profile("cpu"), tmp_path / "more", Notes())
    assert found["files"]["model.onnx.data"] == plain["files"]["model.onnx.data"]
    assert found["files"]["model.onnx"] == plain["files"]["model.onnx"]
    (note,) = [note for note in notes if note.startswith("not read, because the model has no such tensors")]
    assert note.count("model.") == 10 and note.endswith(" and 3 more")
    (alone,) = Checkpoint.open(str(folder), text_only=True).notes
    assert alone.endswith(" and 2 more")  # a vision tower is left out because that was asked for


def test_files_that_are_no_shards_are_named(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path, shards=2)
    (folder / "mtp.safetensors").write_bytes((folder / "model-00001-of-00002.safetensors").read_bytes())
    assert Checkpoint.open(str(folder)).notes == (
        "not read, because they are not among the shards: mtp.safetensors",
    )


def test_a_tensor_of_the_model_in_a_dtype_that_no_weight_has(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path)
    save_shards(folder, load_tensors(folder) | {NORM: torch.arange(64)}, 1)
    checkpoint = Checkpoint.open(str(folder))
    with pytest.raises(
        UserError, match=f"tensor {NORM} is int64 without its scales, and config.json says no"
    ):
        checkpoint.check(checkpoint.config.tensors())


def test_text_weights_under_a_config_with_a_tower(tmp_path: Path) -> None:
    folder = write_vision_checkpoint(tmp_path / "checkpoint")
    tensors = {name: value for name, value in load_tensors(folder).items() if ".visual." not in name}
    save_shards(folder, tensors, 1)
    with pytest.raises(UserError, match=r"the shards have no vision tower: .* with --text-only"):
        export(Checkpoint.open(str(folder)), load_profile("cpu"), tmp_path / "out", Quiet())
    export(Checkpoint.open(str(folder), text_only=True), load_profile("cpu"), tmp_path / "out", Quiet())
    edit_config(folder, language_model_only=True)
    assert Checkpoint.open(str(folder)).vision is None
    edit_config(folder, language_model_only="yes")
    with pytest.raises(UserError, match=r"config\.json: language_model_only is neither true nor false"):
        Checkpoint.open(str(folder))
