"""config.json ties lm_head to the embedding, and the shards have something to say about it, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnxruntime import InferenceSession
from qwen_common.errors import UserError
from qwen_export.checkpoint import Checkpoint
from qwen_export.export import export
from qwen_export.reference import Weights, forward, logits
from transformers import AutoModelForCausalLM, Qwen3_5ForConditionalGeneration

from benchmarks.support.artifacts import Quiet, float_profile, make_artifact
from benchmarks.support.session import Session, cosine
from tests.support.random_checkpoints import (
    load_tensors,
    save_shards,
    store_head,
    write_random_checkpoint,
    write_vision_checkpoint,
)

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "experts": {"num_experts": 4},
    "wrapped": {"wrap": True},
}
IDS = np.random.default_rng(2).integers(0, 512, (1, 30))


def write_with_head(folder: Path, kind: str) -> tuple[Path, torch.Tensor]:
    """A tied checkpoint with another head in its shards."""
    if kind == "vision":
        write_vision_checkpoint(folder)
    else:
        write_random_checkpoint(folder, **MODELS[kind])
    return folder, store_head(folder)


def truth(folder: Path, ids: np.ndarray = IDS) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.numpy()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("lowering", ["fused", "portable"])
def test_a_head_of_its_own_is_used(kind: str, lowering: str, tmp_path: Path) -> None:
    folder, _ = write_with_head(tmp_path / "checkpoint", kind)
    expected = truth(folder)
    checkpoint = Checkpoint.open(str(folder))
    assert "lm_head.weight and the embedding differ" in checkpoint.notes[0]
    *_, hidden = forward(checkpoint.config, weights := Weights(checkpoint.tensors), IDS)
    assert cosine(logits(checkpoint.config, weights, hidden), expected).min() > 0.999999
    artifact = make_artifact(folder, float_profile(lowering), tmp_path / "artifact")
    assert cosine(Session(artifact).run(IDS), expected).min() > 0.99999


def test_a_head_of_its_own_beside_a_vision_tower(tmp_path: Path) -> None:
    folder, head = write_with_head(tmp_path / "checkpoint", "vision")
    model = Qwen3_5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    torch.testing.assert_close(model.lm_head.weight, head)
    with torch.no_grad():
        expected = model(torch.tensor(IDS)).logits.numpy()
        embedded = model.get_input_embeddings()(torch.tensor(IDS)).numpy()
    checkpoint = Checkpoint.open(str(folder))
    *_, hidden = forward(checkpoint.config, weights := Weights(checkpoint.tensors), IDS)
    assert cosine(logits(checkpoint.config, weights, hidden), expected).min() > 0.999999
    artifact = make_artifact(folder, float_profile("fused"), tmp_path / "artifact")
    features = np.zeros((0, embedded.shape[-1]), np.float32)
    (found,) = InferenceSession(artifact / "embedding.onnx").run(
        None, {"input_ids": IDS, "image_features": features}
    )
    np.testing.assert_allclose(found, embedded, atol=1e-6)
    session = InferenceSession(artifact / "model.onnx")
    feeds = {
        "inputs_embeds": found,
        "attention_mask": np.ones(IDS.shape, np.int64),
        "position_ids": np.broadcast_to(np.arange(IDS.shape[1]), (3, *IDS.shape)).copy(),
    }
    for value in session.get_inputs():
        if value.name not in feeds:
            axes = [{"batch_size": 1, "past_sequence_length": 0}.get(axis, axis) for axis in value.shape]
            feeds[value.name] = np.zeros(axes, np.float32)
    assert cosine(session.run(["logits"], feeds)[0], expected).min() > 0.99999


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_equal_head_changes_nothing(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Some tools save both; the values count, in whatever dtype."""
    folder = write_random_checkpoint(tmp_path / "checkpoint", dtype=dtype, **MODELS[kind])
    plain = make_artifact(folder, float_profile("fused"), tmp_path / "plain")
    store_head(folder, equal=True)
    checkpoint = Checkpoint.open(str(folder))
    assert checkpoint.config.tie_word_embeddings and not checkpoint.notes
    both = make_artifact(folder, float_profile("fused"), tmp_path / "both")
    for name in ("model.onnx", "model.onnx.data"):
        assert (both / name).read_bytes() == (plain / name).read_bytes()


@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_a_head_alone_is_the_embedding(kind: str, tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "checkpoint", **MODELS[kind])
    expected = truth(folder)
    tensors = load_tensors(folder)
    tensors[HEAD] = tensors.pop(EMBEDDING)
    save_shards(folder, tensors, 1)
    np.testing.assert_allclose(truth(folder), expected, atol=1e-5)
    artifact = make_artifact(folder, float_profile("fused"), tmp_path / "artifact")
    assert cosine(Session(artifact).run(IDS), expected).min() > 0.99999


def test_a_head_of_another_shape_is_refused(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "checkpoint")
    save_shards(folder, {**load_tensors(folder), HEAD: torch.ones(500, 64)}, 1)
    with pytest.raises(UserError, match=r"tensor lm_head\.weight has shape \(500, 64\)"):
        export(Checkpoint.open(str(folder)), float_profile("fused"), tmp_path / "out", Quiet())
