"""The numpy reference against transformers in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.reference import Weights, forward, logits
from transformers import AutoModelForCausalLM

from benchmarks.support.checkpoints import TINY, TINY_MOE
from benchmarks.support.session import cosine
from tests.support.random_checkpoints import random_model, write_random_checkpoint

SHAPES: dict[str, dict[str, Any]] = {
    "more value heads": {"linear_num_value_heads": 6},
    "untied": {"tie_word_embeddings": False},
    "wide values, odd kernel": {"linear_value_head_dim": 24, "linear_conv_kernel_dim": 3},
}


@pytest.mark.parametrize("name", [*SHAPES, "trained", "trained experts"])
def test_hidden_states_and_logits(name: str, tmp_path: Path) -> None:
    if name in SHAPES:
        folder, model = tmp_path, random_model(**SHAPES[name])
        write_random_checkpoint(folder, **SHAPES[name])
    else:
        folder = {"trained": TINY, "trained experts": TINY_MOE}[name]
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = np.random.default_rng(3).integers(0, model.config.vocab_size, (2, 90))
    with torch.no_grad():
        expected = model(torch.tensor(ids), output_hidden_states=True)
    checkpoint = Checkpoint.open(str(folder), text_only=True)
    weights = Weights(checkpoint.tensors)
    found = list(forward(checkpoint.config, weights, ids))
    # The last of transformers' hidden states is normed already.
    for ours, theirs in zip(found[:-1], expected.hidden_states[:-1], strict=True):
        assert cosine(ours, theirs.numpy()).min() > 0.999999
    theirs = expected.logits.numpy()
    ours = logits(checkpoint.config, weights, found[-1])
    assert cosine(ours, theirs).min() > 0.999999
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())
