"""Shards as other people write them, and bytes that only look like numbers."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from qwen_common.errors import UserError
from qwen_export.checkpoint import Checkpoint
from safetensors.torch import save_file

from tests.support.random_checkpoints import GEOMETRY

NORM = "model.norm.weight"
EMBEDDING = "model.embed_tokens.weight"


def write_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A checkpoint of these tensors alone, which `Checkpoint.open` does not compare with the config."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_5_text", **GEOMETRY}))
    save_file(tensors, folder / "model.safetensors")
    return folder


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


def test_a_tensor_under_both_of_its_names(tmp_path: Path) -> None:
    names = (NORM, NORM.replace("model.", "model.language_model."))
    write_tensors(tmp_path, {name: torch.ones(64) for name in names})
    with pytest.raises(UserError, match=f"tensor {NORM} is in model.safetensors under two names"):
        Checkpoint.open(str(tmp_path))


def test_a_whole_file_comes_before_an_index(tmp_path: Path) -> None:
    """As in transformers: a fine-tune saved over its base may leave the base's index behind."""
    write_tensors(tmp_path, {NORM: torch.ones(64)})
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"x": "gone.safetensors"}}')
    assert set(Checkpoint.open(str(tmp_path)).tensors) == {NORM}


@pytest.mark.parametrize("index", ['{"weight_map": {}}', '{"weight_map": []}', "[" * 100_000, "\ufeff{}", ""])
def test_an_index_that_is_none(index: str, tmp_path: Path) -> None:
    folder = write_tensors(tmp_path, {NORM: torch.ones(64)})
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    with pytest.raises(UserError, match=r"\.index\.json (is not a shard index|names no tensor)"):
        Checkpoint.open(str(folder))
