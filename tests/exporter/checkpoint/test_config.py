"""Configurations as other people write them, and what they may not say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from qwen_common.errors import UserError
from qwen_export.checkpoint import Checkpoint
from qwen_export.checkpoint.config import load_config, load_vision_config
from transformers import Qwen3_5TextConfig

from tests.support.random_checkpoints import GEOMETRY, write_random_checkpoint, write_vision_checkpoint


def write_config(folder: Path, **values: Any) -> Path:
    content = {"model_type": "qwen3_5_text", **GEOMETRY, **values}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    "values",
    [
        {"rope_parameters": {"rope_theta": 5e6, "mrope_section": [2, 1, 1]}},
        {"rope_theta": 5e6, "rope_parameters": {"mrope_section": [2, 1, 1]}},
        {"rope_theta": 5e6, "rope_scaling": {"type": "default", "mrope_section": [2, 1, 1]}},
        {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e6, "mrope_section": [2, 1, 1]}},
        {"partial_rotary_factor": 0.5, "rope_parameters": {"rope_theta": 5e6, "mrope_section": [4, 2, 2]}},
        {"rope_parameters": {"mrope_section": [2, 1, 1]}},
        {"rope_parameters": None, "head_dim": 256},
    ],
)
def test_rotary_embedding_wherever_it_is_written(values: dict[str, Any], tmp_path: Path) -> None:
    """Older configurations put it in other places; a wrong base would go unnoticed until long prompts."""
    base = {name: value for name, value in GEOMETRY.items() if name != "rope_parameters"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_5_text", **base, **values}))
    found = load_config(tmp_path).rope_parameters
    expected = Qwen3_5TextConfig(**{**base, **values}).rope_parameters
    assert found.rope_theta == expected["rope_theta"]
    assert found.partial_rotary_factor == expected["partial_rotary_factor"]
    assert found.rope_type == expected["rope_type"]


def test_a_text_model_under_the_name_of_the_whole(tmp_path: Path) -> None:
    """As AutoRound writes it for vLLM: nothing is in a section."""
    flat = load_config(write_config(tmp_path, model_type="qwen3_5"))
    assert flat == load_config(write_config(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_5"}))
    with pytest.raises(UserError, match=r"is not a model configuration \(KeyError\('text_config'\)\)"):
        load_config(tmp_path)


def test_layer_types_default_as_in_transformers(tmp_path: Path) -> None:
    for values in ({"layer_types": None}, {"full_attention_interval": 3}, {"num_hidden_layers": 9}):
        expected = Qwen3_5TextConfig(**{**GEOMETRY, **values}).layer_types
        assert list(load_config(write_config(tmp_path, **values)).layer_types) == expected


def test_layer_types_follow_the_interval(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    del config["layer_types"]
    config["full_attention_interval"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    assert load_config(folder).layer_types == ("linear_attention", "full_attention") * 2


@pytest.mark.parametrize(("inner", "outer"), [(False, True), (True, False), (None, True), (True, None)])
def test_the_outer_model_decides_on_tied_embeddings(
    inner: bool | None, outer: bool | None, tmp_path: Path
) -> None:
    text = {name: value for name, value in GEOMETRY.items() if name != "tie_word_embeddings"}
    content: dict[str, Any] = {"model_type": "qwen3_5", "text_config": text}
    if inner is not None:
        text["tie_word_embeddings"] = inner
    if outer is not None:
        content["tie_word_embeddings"] = outer
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert load_config(tmp_path).tie_word_embeddings == (inner if outer is None else outer)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rope_parameters": {"type": "yarn"}}, "rope_type yarn needs a factor"),
        ({"rope_scaling": {"rope_type": "linear"}}, "'linear' is not supported yet"),
        ({"rope_parameters": [1]}, "config.json: rope_parameters: "),
        ({"rope_parameters": {"mrope_section": [3, 1, 1]}}, "mrope_section must add up"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "one rotary embedding for all layers"),
        ({"layer_types": ["linear_attention"]}, "layer_types must name each of num_hidden_layers"),
        ({"layer_types": ["mamba"] * 4}, "'mamba' is not supported yet"),
        ({"full_attention_interval": 0}, "config.json: full_attention_interval: "),
        ({"num_hidden_layers": "many"}, "config.json: num_hidden_layers: "),
        ({"num_hidden_layers": None}, "config.json: num_hidden_layers: "),
        ({"linear_num_value_heads": 5}, "linear_num_key_heads must divide"),
        ({"hidden_act": "gelu"}, "hidden_act: Input should be 'silu'"),
        ({"attention_bias": True}, "attention_bias: "),
        ({"attn_output_gate": False}, "attn_output_gate: "),
        ({"output_gate_type": "sigmoid"}, "output_gate_type: "),
        ({"model_type": "qwen3_5", "text_config": None}, "config.json is not a model configuration"),
        ({"model_type": ["qwen3_5"]}, "is not supported: supported are qwen3_5_text, qwen3_5"),
    ],
)
def test_config_that_cannot_be_exported(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_config(tmp_path, **values)
    with pytest.raises(UserError) as caught:
        load_config(tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model_type", ["qwen3_5_moe_text", "qwen3_next"])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_experts": 0}, "config.json: num_experts: "),
        ({"num_experts": 1}, "num_experts_per_tok must be at most num_experts"),
        ({"norm_topk_prob": 0}, "norm_topk_prob: "),
        ({"shared_expert_intermediate_size": 0}, "config.json: shared_expert_intermediate_size: "),
        ({"decoder_sparse_step": 0}, "config.json: decoder_sparse_step: "),
        ({"mlp_only_layers": [-1]}, "config.json: mlp_only_layers.0: "),
        ({"mlp_only_layers": "0"}, "config.json: mlp_only_layers: "),
    ],
)
def test_mixture_that_cannot_be_exported(
    model_type: str, values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_config(tmp_path, model_type=model_type, **values)
    with pytest.raises(UserError) as caught:
        load_config(tmp_path)
    assert message in str(caught.value)


def test_weights_that_are_not_normalised(tmp_path: Path) -> None:
    """transformers' Qwen3_5Moe ignores the field, and Qwen3Next has it."""
    write_config(tmp_path, model_type="qwen3_5_moe_text", norm_topk_prob=False)
    with pytest.raises(UserError, match="norm_topk_prob: false is not supported: qwen3_5_moe_text always"):
        load_config(tmp_path)


@pytest.mark.parametrize("values", [{"mlp_only_layers": [1]}, {"decoder_sparse_step": 2}])
def test_layers_without_experts_where_transformers_has_none(values: dict[str, Any], tmp_path: Path) -> None:
    """Its Qwen3_5Moe ignores both fields: the weights of such a model would be another's."""
    write_config(tmp_path, model_type="qwen3_5_moe_text", **values)
    with pytest.raises(
        UserError, match=r"mlp_only_layers and decoder_sparse_step take the experts from layer"
    ):
        load_config(tmp_path)
    write_config(tmp_path, model_type="qwen3_5_moe_text", mlp_only_layers=[], decoder_sparse_step=1)
    assert load_config(tmp_path).dense_layers == frozenset()


@pytest.mark.parametrize("name", [None, "swish", "silu"])
def test_fields_that_later_models_publish(name: str | None, tmp_path: Path) -> None:
    """Qwen3.6 and 3.8 say what transformers' class does in any case."""
    write_config(tmp_path, output_gate_type=name, attn_output_gate=True, mamba_ssm_dtype="float32")
    assert load_config(tmp_path).output_gate_type == name


def test_a_checkpoint_without_a_tower_has_no_vision_config(tmp_path: Path) -> None:
    assert load_vision_config(write_random_checkpoint(tmp_path / "text")) is None
    assert load_vision_config(write_random_checkpoint(tmp_path / "wrapped", wrap=True)) is None


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"deepstack_visual_indexes": [1]}, "deepstack_visual_indexes"),
        ({"num_position_embeddings": 50}, "must be a square"),
        ({"num_heads": 5}, "multiple of 4 num_heads"),
        ({"out_hidden_size": 65}, "out_hidden_size is 65"),
        ({"temporal_patch_size": 1}, "temporal_patch_size"),
    ],
)
def test_vision_config_that_is_not_supported(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = write_vision_checkpoint(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        Checkpoint.open(str(folder))
