"""Adapters on the weights in a file, against PEFT on the model that these weights make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from qwen_export import reference
from qwen_export.adapters.merge import with_adapters
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.checkpoint.tensors.names import tensor_name
from qwen_export.opening import open_checkpoint
from torch import nn
from transformers import AutoModelForCausalLM

from benchmarks.support.checkpoints import TINY, TINY_MOE
from benchmarks.support.session import cosine
from tests.support.adapters import LINEAR, train
from tests.support.gguf_checkpoints import write_gguf

IDS = np.arange(1, 40, dtype=np.int64)[None]


def of_weights(source: Path, checkpoint: Checkpoint) -> nn.Module:
    """transformers' model of the checkpoint in the folder `source`, with the weights of `checkpoint`."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = checkpoint.tensors[tensor_name(name)]
            parameter.copy_(torch.from_numpy(value.read(0, value.shape[0]).astype(np.float32)))
    return model


@pytest.mark.parametrize(
    ("source", "kind", "config"),
    [
        (TINY, Kind.Q4_0, {"target_modules": LINEAR}),
        (TINY, Kind.Q8_0, {"target_modules": LINEAR, "use_dora": True}),
        (TINY, Kind.F16, {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]}),
        (TINY_MOE, Kind.Q8_0, {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}),
    ],
    ids=str,
)
def test_adapters_are_merged_into_the_files_weights(
    source: Path, kind: Kind, config: dict[str, Any], tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(write_gguf(source, tmp_path / "model.gguf", kind)))
    plain = of_weights(source, checkpoint)
    adapted = train(plain, tmp_path / "adapter", **config).eval()
    merged = with_adapters(checkpoint, [str(tmp_path / "adapter")])
    with torch.no_grad():
        expected = adapted(input_ids=torch.from_numpy(IDS)).logits[0].numpy()
    for opened, same in ((merged, True), (checkpoint, False)):
        *_, hidden = reference.forward(opened.config, reference.Weights(opened.tensors), IDS)
        logits = reference.logits(opened.config, reference.Weights(opened.tensors), hidden)[0]
        assert (cosine(logits, expected).min() > 0.9999) == same
