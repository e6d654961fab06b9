"""Folders that are no checkpoint though they look like one: each is named, and what to do about it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from qwen_common.errors import UserError
from qwen_export.checkpoint import Checkpoint
from qwen_export.planner.models import configured
from safetensors.torch import save_file

from tests.support.random_checkpoints import write_random_checkpoint


def write_adapter(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    save_file({name: torch.ones(8, 64)}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "base_model_name_or_path": "Qwen/Qwen3.5-0.8B"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def test_an_adapter_beside_the_model(tmp_path: Path) -> None:
    """Where PEFT is installed, transformers answers with it."""
    folder = write_random_checkpoint(tmp_path)
    write_adapter(folder)
    for present in ("adapter_config.json", "adapter_model.safetensors"):
        with pytest.raises(UserError, match=rf"has an adapter \({present}\) beside the model.*--adapter"):
            Checkpoint.open(str(folder))
        with pytest.raises(UserError, match="beside the model"):
            configured(str(folder))
        (folder / present).unlink()
    Checkpoint.open(str(folder))


def test_an_adapter_alone(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter")
    for open_it in (Checkpoint.open, configured):
        with pytest.raises(UserError, match=r"is an adapter for Qwen/Qwen3\.5-0\.8B and no model") as caught:
            open_it(str(tmp_path / "adapter"))
        assert f"qwen-export --profile NAME Qwen/Qwen3.5-0.8B --adapter {tmp_path / 'adapter'}" in str(
            caught.value
        )
    (tmp_path / "adapter" / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="is an adapter and no model"):
        Checkpoint.open(str(tmp_path / "adapter"))
