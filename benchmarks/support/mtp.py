"""A checkpoint with a multi-token-prediction head of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file


def with_head(source: Path, tensors: dict[str, torch.Tensor], folder: Path) -> Path:
    """A copy of the one-file checkpoint `source` with `tensors`, named `mtp.*`, in a shard of their own."""
    shutil.copytree(source, folder)
    body, head = folder / "model-00001-of-00002.safetensors", folder / "model-00002-of-00002.safetensors"
    (folder / "model.safetensors").rename(body)
    save_file(tensors, head, metadata={"format": "pt"})
    weight_map = {}
    for shard in (body, head):
        with safe_open(shard, "pt") as file:
            weight_map |= dict.fromkeys(file.keys(), shard.name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text())
    text = config.get("text_config", config)
    text |= {"mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
