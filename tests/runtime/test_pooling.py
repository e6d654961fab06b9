"""Embeddings are transformers' hidden states, pooled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from qwen_common.errors import UserError
from qwen_runtime import Model
from transformers import AutoModelForCausalLM

from benchmarks.support.checkpoints import TINY


def test_vectors_are_those_of_transformers(seeing: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    with Model.load(seeing) as model:
        for text in ("A", "A list is mutable.", "A tuple is not, and a set is. " * 9):
            tokens = model.encode(text)
            with torch.no_grad():
                hidden = reference.model(torch.tensor([tokens])).last_hidden_state[0].numpy()
            for pooling, expected in (("mean", hidden.mean(axis=0)), ("last", hidden[-1])):
                found = model.embed(tokens, pooling)  # type: ignore[arg-type]
                assert found.dtype == np.float32 and np.linalg.norm(found) == pytest.approx(1)
                np.testing.assert_allclose(found, expected / np.linalg.norm(expected), atol=1e-4)
        assert len(tokens) > 48


def test_what_has_no_vector(seeing: Path, cpu_artifact: Path) -> None:
    with Model.load(seeing) as model:
        for tokens, says in (
            ([], "no tokens"),
            ([-1], "no token -1"),
            ([10**6], "no token 1000000"),
            ([1] * model.info.context_length, "and the context is"),
        ):
            with pytest.raises(UserError, match=says):
                model.embed(tokens)
    with Model.load(cpu_artifact) as model, pytest.raises(UserError, match=r"no hidden states.*mtp=true"):
        model.embed([1])
