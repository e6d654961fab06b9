"""Configurations and shards as other people write them, and bytes that only look like numbers."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from qwen_common.errors import UserError
from qwen_export.architecture.text_config import expected_shapes, load_config
from qwen_export.checkpoint.checkpoint import Checkpoint
from safetensors.torch import save_file
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

from benchmarks import geometry
from tests.support.random_checkpoints import (
    GEOMETRY,
    load_tensors,
    random_model,
    save_shards,
    write_random_checkpoint,
)

NORM = "model.norm.weight"
EMBEDDING = "model.embed_tokens.weight"


def write_config(folder: Path, **values: Any) -> Path:
    content = {"model_type": "qwen3_5_text", **GEOMETRY, **values}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def write_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A checkpoint of these tensors alone, which `Checkpoint.open` does not compare with the config."""
    folder.mkdir(exist_ok=True)
    save_file(tensors, write_config(folder) / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"tie_word_embeddings": False},
        {"linear_num_value_heads": 6, "linear_value_head_dim": 24, "linear_conv_kernel_dim": 3},
        {"num_hidden_layers": 3, "layer_types": ["full_attention", *["linear_attention"] * 2]},
    ],
)
def test_expected_shapes_are_those_of_transformers(overrides: dict[str, Any], tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path, **overrides))
    state = {name: tuple(value.shape) for name, value in random_model(**overrides).state_dict().items()}
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    assert expected_shapes(config) == state


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


def test_layer_types_default_as_in_transformers(tmp_path: Path) -> None:
    for values in ({"layer_types": None}, {"full_attention_interval": 3}, {"num_hidden_layers": 9}):
        expected = Qwen3_5TextConfig(**{**GEOMETRY, **values}).layer_types
        assert list(load_config(write_config(tmp_path, **values)).layer_types) == expected


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
        ({"layer_types": ["linear_attention"]}, "layer_types must name each of num_hidden_layers"),
        ({"layer_types": ["mamba"] * 4}, "'mamba' is not supported yet"),
        ({"full_attention_interval": 0}, "config.json: full_attention_interval: "),
        ({"num_hidden_layers": "many"}, "config.json: num_hidden_layers: "),
        ({"num_hidden_layers": None}, "config.json: num_hidden_layers: "),
        ({"linear_num_value_heads": 5}, "linear_num_key_heads must divide"),
        ({"hidden_act": "gelu"}, "hidden_act: Input should be 'silu'"),
        ({"attention_bias": True}, "attention_bias: "),
        ({"model_type": "qwen3_5"}, "config.json is not a model configuration (KeyError('text_config'))"),
        ({"model_type": "qwen3_5", "text_config": None}, "config.json is not a model configuration"),
        ({"model_type": ["qwen3_5"]}, "is not Qwen3.5: supported are qwen3_5_text, qwen3_5"),
    ],
)
def test_config_that_cannot_be_exported(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_config(tmp_path, **values)
    with pytest.raises(UserError) as caught:
        load_config(tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_number_in_row_1000(dtype: torch.dtype, value: float, tmp_path: Path) -> None:
    tensor = torch.full((4096, 256), torch.finfo(dtype).max, dtype=dtype)
    tensor[::2] = torch.finfo(dtype).min
    tensor[1000, 255] = value
    checkpoint = Checkpoint.open(str(write_tensors(tmp_path, {EMBEDDING: tensor})))
    for start, stop in ((0, 1000), (1001, 4096)):
        assert np.abs(checkpoint.read(EMBEDDING, start, stop)).min() == torch.finfo(dtype).max
    for start, stop in ((0, 4096), (1000, 1001)):
        with pytest.raises(UserError, match=rf"tensor {EMBEDDING} in model.safetensors holds NaN or Inf"):
            checkpoint.read(EMBEDDING, start, stop)


def test_reads_from_many_threads(tmp_path: Path) -> None:
    value = torch.arange(4000 * 64).reshape(4000, 64).float()
    checkpoint = Checkpoint.open(str(write_tensors(tmp_path, {EMBEDDING: value})))
    with ThreadPoolExecutor(8) as pool:
        parts = list(
            pool.map(lambda start: checkpoint.read(EMBEDDING, start, start + 10), range(0, 4000, 10))
        )
    np.testing.assert_array_equal(np.concatenate(parts), value.numpy())


def test_shard_that_became_shorter(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(str(write_tensors(tmp_path, {EMBEDDING: torch.ones(100, 64)})))
    shard = tmp_path / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(UserError, match=f"model.safetensors ends inside tensor {EMBEDDING}"):
        checkpoint.read(EMBEDDING, 0, 100)


def test_other_parts_of_a_multimodal_checkpoint_are_left_alone(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path, wrap=True, dtype=torch.bfloat16)
    others = {"mtp.fc.weight": torch.ones(4, 4).to(torch.float8_e4m3fn)}
    save_shards(folder, {**load_tensors(folder), **others}, 1)
    checkpoint = Checkpoint.open(str(folder))
    assert set(checkpoint.tensors) == set(expected_shapes(checkpoint.config))
    assert checkpoint.mtp_problem is not None and "mtp.fc.weight" in checkpoint.mtp_problem


def test_a_tensor_under_both_of_its_names(tmp_path: Path) -> None:
    names = (NORM, NORM.replace("model.", "model.language_model."))
    write_tensors(tmp_path, {name: torch.ones(64) for name in names})
    with pytest.raises(UserError, match=f"tensor {NORM} is in both"):
        Checkpoint.open(str(tmp_path))


def test_a_whole_file_comes_before_an_index(tmp_path: Path) -> None:
    """As in transformers: a fine-tune saved over its base may leave the base's index behind."""
    write_tensors(tmp_path, {NORM: torch.ones(64)})
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"x": "gone.safetensors"}}')
    assert set(Checkpoint.open(str(tmp_path)).tensors) == {NORM}


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "merges.txt"])
def test_links_out_of_the_folder_are_refused(name: str, tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "checkpoint")
    outside = tmp_path / "outside"
    if (folder / name).exists():
        (folder / name).rename(outside)
    else:
        outside.write_text("secret")
    (folder / name).symlink_to(outside)
    with pytest.raises(UserError, match=f"{name} is a link out of .*: put the file itself there"):
        Checkpoint.open(str(folder))


def test_links_inside_the_folder_and_to_the_folder(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "checkpoint")
    (folder / "model.safetensors").rename(folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")
    (tmp_path / "link").symlink_to(folder)
    assert NORM in Checkpoint.open(str(tmp_path / "link")).tensors


def test_hub_snapshot_given_as_a_folder(tmp_path: Path) -> None:
    source = write_random_checkpoint(tmp_path / "source")
    snapshot, blobs = tmp_path / "cache" / "snapshots" / "abc", tmp_path / "cache" / "blobs"
    snapshot.mkdir(parents=True)
    shutil.move(source, blobs)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    assert NORM in Checkpoint.open(str(snapshot)).tensors


def test_connection_lost_during_a_download(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*args: object, **kwargs: object) -> str:
        raise RuntimeError("peer closed connection\nand more lines")  # stands for any HTTP client's error

    monkeypatch.setattr("huggingface_hub.snapshot_download", lost)
    with pytest.raises(
        UserError, match=r"the hub did not give it \(peer closed connection\): check"
    ) as caught:
        Checkpoint.open("Qwen/Qwen3.5-0.8B")
    assert "\n" not in str(caught.value)


def test_only_data_is_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub.utils import filter_repo_objects

    asked: dict[str, Any] = {}

    def download(source: str, **kwargs: Any) -> str:
        asked.update(kwargs, source=source)
        return str(write_random_checkpoint(tmp_path / "snapshots" / "abc"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert Checkpoint.open("someone/tiny", "v1").revision == "abc"
    assert (asked["source"], asked["revision"]) == ("someone/tiny", "v1")
    files = [
        "a.safetensors",
        "config.json",
        "chat_template.jinja",
        "merges.txt",
        "a.bin",
        "a.pt",
        "a.py",
        "a.pkl",
    ]
    assert list(filter_repo_objects(files, allow_patterns=asked["allow_patterns"])) == files[:4]


def test_geometry_checkpoint_is_one_that_transformers_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(geometry, "_SHARD_BYTES", 100_000)
    monkeypatch.setattr(geometry, "_BLOCK", 10_001)
    folder = geometry.write_checkpoint(tmp_path / "checkpoint", GEOMETRY)
    checkpoint = Checkpoint.open(str(folder))
    checkpoint.check(expected_shapes(checkpoint.config))
    assert len({info.file for info in checkpoint.tensors.values()}) > 2
    model = Qwen3_5ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for name, value in model.state_dict().items():
        if name in checkpoint.tensors:
            found = checkpoint.read(name, 0, len(value))
            assert found.dtype == ml_dtypes.bfloat16
            np.testing.assert_array_equal(found.view(np.int16), value.view(torch.int16).numpy())
    again = geometry.write_checkpoint(tmp_path / "again", GEOMETRY)
    assert all(path.read_bytes() == (again / path.name).read_bytes() for path in folder.iterdir())
    experts = {**GEOMETRY, "model_type": "qwen3_5_moe_text", "num_experts": 4}
    mixture = Checkpoint.open(str(geometry.write_checkpoint(tmp_path / "mixture", experts)))
    mixture.check(expected_shapes(mixture.config))
    assert mixture.config.num_experts == 4
