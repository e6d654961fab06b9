"""Checkpoints, and every way in which one can be wrong."""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from qwen_common.errors import UserError
from qwen_export.architecture.mtp import mtp_tensors
from qwen_export.checkpoint import Checkpoint
from qwen_export.export import export
from qwen_profiles.schema import load_profile
from transformers import Qwen3_5ForCausalLM

from benchmarks import geometry
from benchmarks.support.artifacts import Quiet
from tests.support.random_checkpoints import (
    GEOMETRY,
    edit_config,
    load_tensors,
    save_shards,
    write_random_checkpoint,
)

NORM = "model.layers.2.input_layernorm.weight"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("wrap", [False, True])
def test_rows_are_those_that_were_saved(dtype: torch.dtype, shards: int, wrap: bool, tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path, dtype=dtype, shards=shards, wrap=wrap)
    checkpoint = Checkpoint.open(str(folder))
    checkpoint.check(checkpoint.config.tensors())
    saved = {name.replace("language_model.", ""): value for name, value in load_tensors(folder).items()}
    assert set(saved) == set(checkpoint.tensors)
    for name, value in saved.items():
        rows = len(value)
        start, stop = rows // 3, rows - rows // 4
        found = checkpoint.read(name, start, stop).astype(np.float32)
        np.testing.assert_array_equal(found, value[start:stop].float().numpy())


def damaged_config(**changes: object) -> Callable[[Path], None]:
    return partial(edit_config, **changes)


def edit_index(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index["weight_map"])
        path.write_text(json.dumps(index))

    return damage


def edit_tensors(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_tensors(folder)
        change(tensors)
        save_shards(folder, tensors, 2)

    return damage


def truncate(folder: Path) -> None:
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])


def poison(value: float, row: int) -> Callable[[dict], None]:
    def change(tensors: dict) -> None:
        tensors["model.embed_tokens.weight"][row, 3] = value

    return change


def duplicate(folder: Path) -> None:
    save_shards(folder, load_tensors(folder), 2)
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "model-00003-of-00002.safetensors")
    edit_index(lambda index: index.update({"extra": "model-00003-of-00002.safetensors"}))(folder)
    header_add(folder / "model-00003-of-00002.safetensors", "extra")


def header_add(path: Path, name: str) -> None:
    """Give a shard's first tensor a second name."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    first = next(key for key in header if key != "__metadata__")
    header[name] = header.pop(first)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "config is not JSON": (
        lambda folder: (folder / "config.json").write_text("{"),
        "config.json is not valid JSON",
    ),
    "another model": (damaged_config(model_type="llama"), "model type 'llama' is not supported"),
    "weights of a dense model": (
        damaged_config(model_type="qwen3_5_moe_text"),
        "has no tensor model.layers.0.mlp",
    ),
    "bad head count": (damaged_config(num_key_value_heads=3), "num_key_value_heads must divide"),
    "negative size": (damaged_config(hidden_size=-1), "config.json: hidden_size: "),
    "scaled rotary embedding": (
        damaged_config(rope_parameters={"rope_type": "longrope", "mrope_section": [2, 1, 1]}),
        "rope_parameters.rope_type: Input should be 'default' or 'yarn'",
    ),
    "missing shard": (
        lambda folder: (folder / "model-00002-of-00002.safetensors").unlink(),
        "shard model-00002-of-00002.safetensors is missing",
    ),
    "truncated shard": (truncate, "shard model-00002-of-00002.safetensors is truncated or damaged"),
    "index leads out": (
        edit_index(lambda index: index.update({NORM: "../other.safetensors"})),
        "names a file outside the folder: ../other.safetensors",
    ),
    "index leads to the root": (
        edit_index(lambda index: index.update({NORM: "/etc/passwd"})),
        "names a file outside the folder: /etc/passwd",
    ),
    "index names the wrong shard": (
        edit_index(lambda index: index.update({"model.nothing": "model-00001-of-00002.safetensors"})),
        "holds model.nothing, but it does not",
    ),
    "index is not one": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("[]"),
        "is not a shard index",
    ),
    "tensor in two shards": (duplicate, "is in both"),
    "tensor missing": (edit_tensors(lambda tensors: tensors.pop(NORM)), f"has no tensor {NORM}"),
    "another shape": (
        damaged_config(intermediate_size=100),
        "has shape (96, 64) where config.json says (100, 64)",
    ),
    "unsupported dtype": (
        edit_tensors(lambda tensors: tensors.update({NORM: tensors[NORM].to(torch.float64)})),
        f"tensor {NORM} is float64 without its scales, and config.json says no quantization_config",
    ),
    "NaN": (
        edit_tensors(poison(float("nan"), 500)),
        "tensor model.embed_tokens.weight in model-0000[12]-of-00002.safetensors holds NaN or Inf",
    ),
    "Inf": (
        edit_tensors(poison(float("-inf"), 0)),
        "tensor model.embed_tokens.weight in model-0000[12]-of-00002.safetensors holds NaN or Inf",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_damage_is_named(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "checkpoint", shards=2, dtype=dtype)
    damage, message = DAMAGE[name]
    damage(folder)
    pattern = message if "[12]" in message else re.escape(message)
    with pytest.raises(UserError, match=pattern) as caught:
        export(Checkpoint.open(str(folder)), load_profile("cpu"), tmp_path / "out", Quiet())
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_other_formats_are_refused(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "checkpoint")
    weights = folder / "model.safetensors"
    for name, message in {
        "pytorch_model.bin": "pickled weights, which are never loaded",
        "model.gguf": "holds GGUF: give one of its files, such as .*model.gguf",
    }.items():
        weights = weights.rename(folder / name)
        with pytest.raises(UserError, match=message):
            Checkpoint.open(str(folder))
        (folder / "config.json").rename(tmp_path / "elsewhere")
        with pytest.raises(UserError, match=message if "gguf" in name else "has no config.json"):
            Checkpoint.open(str(folder))
        (tmp_path / "elsewhere").rename(folder / "config.json")
    with pytest.raises(UserError, match=r"someone/Qwen3\.5-0\.8B-GGUF holds GGUF: download one of its files"):
        Checkpoint.open("someone/Qwen3.5-0.8B-GGUF")
    weights.unlink()
    with pytest.raises(UserError, match="is the download complete"):
        Checkpoint.open(str(folder))


def test_other_parts_of_a_multimodal_checkpoint_are_left_alone(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path, wrap=True, dtype=torch.bfloat16)
    others = {"mtp.fc.weight": torch.ones(4, 4).to(torch.float8_e4m3fn)}
    save_shards(folder, {**load_tensors(folder), **others}, 1)
    checkpoint = Checkpoint.open(str(folder))
    assert set(checkpoint.tensors) == {*checkpoint.config.tensors(), *others}
    assert not checkpoint.notes
    with pytest.raises(UserError, match=r"tensor mtp\.fc\.weight is float8_e4m3fn without its scales"):
        checkpoint.check(mtp_tensors(checkpoint.config))


def test_geometry_checkpoint_is_one_that_transformers_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(geometry, "_SHARD_BYTES", 100_000)
    monkeypatch.setattr(geometry, "_BLOCK", 10_001)
    folder = geometry.write_checkpoint(tmp_path / "checkpoint", GEOMETRY)
    checkpoint = Checkpoint.open(str(folder))
    checkpoint.check(checkpoint.config.tensors())
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
    mixture.check(mixture.config.tensors())
    assert mixture.config.num_experts == 4
