"""Checkpoints in forms that are not read: each is named, and what to do about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from qwen_common.errors import UserError
from qwen_export.checkpoint import Checkpoint
from safetensors.torch import save_file

from tests.support.random_checkpoints import edit_config, load_tensors, write_random_checkpoint


@pytest.mark.parametrize(
    ("values", "named", "way"),
    [
        ({"quantization_config": {"quant_method": "exl2", "bits": 4.0}}, "EXL2", "bf16"),
        ({"quantization_config": {"quant_method": "hqq"}}, "HQQ", "bf16"),
        (
            {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ"}},
            "NVFP4_AWQ",
            "bf16",
        ),
        ({"quantization_config": {"quant_method": "of tomorrow"}}, "method 'of tomorrow'", "bf16"),
        ({"quantization_config": [1]}, "is not supported yet", "bf16"),
        ({"quantization_config": {"quant_method": 7}}, "is not supported yet", "bf16"),
    ],
)
def test_quantised_in_another_way(values: dict[str, Any], named: str, way: str, tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path)
    edit_config(folder, **values)
    with pytest.raises(UserError) as caught:
        Checkpoint.open(str(folder))
    assert named in str(caught.value) and way in str(caught.value) and "\n" not in str(caught.value)


def test_modelopts_older_file(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path)
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "INT4_AWQ"}}))
    with pytest.raises(UserError, match=r"modelopt\.quant_algo 'INT4_AWQ' is not supported yet"):
        Checkpoint.open(str(folder))
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": 7}))
    with pytest.raises(UserError, match=r"modelopt\.quant_algo .* is not supported yet"):
        Checkpoint.open(str(folder))
    (folder / "hf_quant_config.json").write_text('{"quantization": {')
    with pytest.raises(UserError, match=r"hf_quant_config\.json is not valid JSON: download"):
        Checkpoint.open(str(folder))


def test_modelopt_that_quantised_the_kv_cache_alone(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path)
    told = {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}
    (folder / "hf_quant_config.json").write_text(json.dumps(told))
    tensors = load_tensors(folder)
    tensors["model.layers.3.self_attn.k_proj.k_scale"] = torch.ones(())
    save_file(tensors, folder / "model.safetensors")
    checkpoint = Checkpoint.open(str(folder))
    assert "k_proj.k_scale" in checkpoint.notes[0] and len(checkpoint.notes) == 1


def test_what_scales_activations_is_refused(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path)
    tensors = load_tensors(folder)
    tensors["model.layers.0.mlp.gate_proj.pre_quant_scale"] = torch.ones(64)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match="pre_quant_scale scales a projection's inputs"):
        Checkpoint.open(str(folder))
