"""Rows of frequent tokens in a form of their own: logits and embeddings against transformers in float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from qwen_common.errors import UserError
from qwen_export.backends.onnx.graphs import build_graphs
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.inspection import inspect
from qwen_profiles.schema import FrequentTokens, load_profile

from benchmarks.support.artifacts import float_profile, make_artifact
from benchmarks.support.session import Session, cosine
from tests.support.random_checkpoints import random_model, write_random_checkpoint, write_vision_checkpoint

FREQUENT = ["frequent_tokens.share=0.5", "frequent_tokens.precision=int8", "frequent_tokens.block_size=32"]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A checkpoint folder and transformers' float32 model of it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    write_random_checkpoint(folder, tie_word_embeddings=request.param)
    return folder, random_model(tie_word_embeddings=request.param)


def split_at(folder: Path, share: float) -> int:
    """The first id of the other tokens."""
    profile = load_profile("cpu", [f"frequent_tokens={{share={share},precision='int8'}}"])
    placed = build_graphs(Checkpoint.open(str(folder)), profile).placed
    (rows,) = {weight.row_count for weight, _ in placed if weight.name == "lm_head.frequent"}
    return rows


@pytest.mark.parametrize("coarse", ["frequent", "other"])
def test_each_token_has_the_rows_of_its_form(case, tmp_path: Path, coarse: str) -> None:
    """The one form is exact, the other is INT8: only what goes through the other's rows differs."""
    folder, model = case
    forms = {"frequent": "float", "other": "float"} | {coarse: "int8"}
    base = float_profile("fused")
    other = base.weights["lm_head"].model_copy(update={"precision": forms["other"]})
    profile = base.model_copy(
        update={
            "frequent_tokens": FrequentTokens(share=0.5, precision=forms["frequent"]),
            "weights": base.weights | {"lm_head": other, "embedding": other},
        }
    )
    session = Session(make_artifact(folder, profile, tmp_path / "artifact"))
    first, count = split_at(folder, 0.5), model.config.vocab_size
    sides = {"frequent": slice(0, first), "other": slice(first, count)}
    exact = sides["other" if coarse == "frequent" else "frequent"]
    ids = np.random.default_rng(0).permutation(np.arange(exact.start, exact.stop))[:40]
    ids[:2] = exact.start, exact.stop - 1
    with torch.no_grad():
        expected = model(torch.tensor(ids)[None]).logits.numpy()
    found = session.run(ids)

    assert 0 < first < count and found.shape == expected.shape
    np.testing.assert_allclose(found[..., exact], expected[..., exact], atol=1e-3)
    rounded = np.abs(found - expected)[..., sides[coarse]]
    assert 5e-3 < rounded.max() < 0.1

    session.reset()
    mixed = np.concatenate([ids[:20], np.arange(first - 3, first + 3)])
    with torch.no_grad():
        expected = model(torch.tensor(mixed)[None]).logits.numpy()
    found = session.run(mixed)
    np.testing.assert_allclose(found[:, :20, exact], expected[:, :20, exact], atol=1e-3)
    assert cosine(found, expected).min() > 0.99


def test_every_graph_of_an_artifact_shares_the_rows(tmp_path: Path) -> None:
    write_vision_checkpoint(tmp_path)
    graphs = build_graphs(Checkpoint.open(str(tmp_path)), load_profile("cpu", FREQUENT))
    for file in ("model.onnx", "embedding.onnx", "speculative.onnx", "pairs.onnx"):
        names = {value.name for value in graphs.every_file[file].initializers}
        assert {"lm_head", "lm_head.frequent"} <= names
    stored = [weight for weight, _ in graphs.placed if weight.name.startswith("lm_head")]
    rows = sorted((weight.rows[0].start, weight.rows[0].stop) for weight in stored)
    assert rows == [(0, rows[0][1]), (rows[0][1], graphs.every_file["model.onnx"].outputs[-1].shape[-1])]


def test_the_cpu_is_known_to_have_every_kernel(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "checkpoint")
    artifact = make_artifact(tmp_path / "checkpoint", load_profile("cpu", FREQUENT), tmp_path / "artifact")
    found = inspect(artifact)
    assert found["providers"]["cpu"]["runs"] is True
    assert found["roles"]["lm_head"]["precision"] == "int8, block 128; int8, block 32 in the first 0.5 of ids"


@pytest.mark.parametrize("provider", ["webgpu", "cuda"])
def test_what_no_other_provider_has_run_is_refused(provider: str) -> None:
    with pytest.raises(UserError, match=r"set frequent_tokens\.share=0"):
        load_profile("cpu", [f"provider={provider}", *FREQUENT])
    assert load_profile("cpu", [f"provider={provider}", *FREQUENT, "frequent_tokens.share=0"])


@pytest.mark.parametrize("share", ["1", "-0.1", "nan", "many"])
def test_a_share_is_a_part_of_all(share: str) -> None:
    with pytest.raises(UserError, match=r"frequent_tokens\.share"):
        load_profile("cpu", [*FREQUENT, f"frequent_tokens.share={share}"])


def test_a_precision_alone_is_no_share() -> None:
    with pytest.raises(UserError, match="write a table, such as"):
        load_profile("cpu", ["frequent_tokens=int8"])
