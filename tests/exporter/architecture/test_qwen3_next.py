"""Qwen3-Next against transformers in float32: fused projections, layers without experts, the head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og
import pytest
import torch
from click.testing import CliRunner
from qwen_common.errors import USER_ERROR, UserError
from qwen_export.adapters.merge import with_adapters
from qwen_export.adapters.switched import with_switched_adapters
from qwen_export.architecture.mtp import declares_mtp, mtp_tensors
from qwen_export.architecture.tensors import Fused
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.checkpoint.tensors.fused import RowRuns
from qwen_export.checkpoint.tensors.tensor import PrequantizedTensor
from qwen_export.cli import main
from qwen_export.planner.predictions import predict
from qwen_export.reference import Weights, forward, logits
from qwen_export.verify.transformers_reference import compare
from qwen_profiles.schema import WeightFormat, load_profile

from benchmarks.support.artifacts import float_profile, make_artifact
from benchmarks.support.mtp import with_head
from benchmarks.support.session import Session, cosine
from tests.exporter.adapters.test_merge import assert_answers_as
from tests.exporter.graph.test_moe import assert_same
from tests.runtime.speculative.test_sessions import named, random_head, run, with_mtp
from tests.support.adapters import train
from tests.support.greedy_tokens import check_greedy_tokens
from tests.support.quantized_checkpoints import Method, awq, gptq, write_quantized_checkpoint
from tests.support.random_checkpoints import (
    edit_config,
    load_tensors,
    random_model,
    save_shards,
    save_tensors,
    write_random_checkpoint,
)

NEXT: dict[str, Any] = {"model_type": "qwen3_next", "num_experts": 8}
SHAPES: dict[str, dict[str, Any]] = {
    "experts everywhere": NEXT,
    "uneven heads": {**NEXT, "linear_num_value_heads": 6, "linear_value_head_dim": 24},
    "one value head to a key head": {**NEXT, "linear_num_value_heads": 2, "tie_word_embeddings": False},
    "some layers without experts": {**NEXT, "mlp_only_layers": [0, 3, 99]},
    "experts in every second layer": {**NEXT, "decoder_sparse_step": 2, "mlp_only_layers": [1]},
    "uneven layers, YaRN": {
        **NEXT,
        "layer_types": ["full_attention", "full_attention", "linear_attention", "full_attention"],
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 5e5,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "partial_rotary_factor": 0.5,
        },
    },
    "experts' weights as they are": {**NEXT, "norm_topk_prob": False},
    "no experts": {**NEXT, "decoder_sparse_step": 9},
}


@pytest.fixture(scope="module", params=SHAPES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    shape, folder = SHAPES[request.param], tmp_path_factory.mktemp("checkpoint")
    return write_random_checkpoint(folder, **shape), random_model(**shape)


def test_the_reference(case) -> None:
    folder, model = case
    checkpoint = Checkpoint.open(str(folder))
    checkpoint.check(checkpoint.config.tensors())
    assert checkpoint.config.tensors().keys() == checkpoint.tensors.keys()
    ids = np.random.default_rng(3).integers(0, 512, (2, 70))
    with torch.no_grad():
        expected = model(torch.tensor(ids)).logits.numpy()
    weights = Weights(checkpoint.tensors)
    hidden = list(forward(checkpoint.config, weights, ids))[-1]
    assert cosine(logits(checkpoint.config, weights, hidden), expected).min() > 0.999999


@pytest.mark.parametrize("lowering", ["fused", "portable"])
def test_the_graphs(case, lowering: str, tmp_path: Path) -> None:
    folder, model = case
    assert_same(
        Session(make_artifact(folder, float_profile(lowering, prefill_chunk=128), tmp_path / "out")), model
    )


def test_as_it_is_published(tmp_path: Path) -> None:
    """Experts one by one, several shards, the rotary embedding at the top of config.json, bfloat16."""
    shape = {**NEXT, "vocab_size": 2048, "mlp_only_layers": [2]}
    folder, model = write_random_checkpoint(tmp_path / "checkpoint", **shape), random_model(**shape)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="300KB")
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    flat = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor")}
    (folder / "config.json").write_text(json.dumps({**config, **flat, "rope_scaling": None}))
    names = load_tensors(folder)
    assert "model.layers.0.mlp.experts.7.up_proj.weight" in names
    assert "model.layers.0.linear_attn.in_proj_qkvz.weight" in names
    assert len(list(folder.glob("*.safetensors"))) > 1
    found = compare(Checkpoint.open(str(folder)), list(range(3, 60)))
    assert found.agrees and found.cosine > 0.999999

    artifact = make_artifact(folder, float_profile("fused"), tmp_path / "artifact", all_logits=False)
    assert json.loads((artifact / "manifest.json").read_text())["model"]["model_type"] == "qwen3_next"
    options = ["--tokens", "256", "--json", "--no-progress"]
    result = CliRunner().invoke(main, ["verify", str(artifact), "--against", str(folder), *options])
    report = json.loads(result.stdout)
    assert report["passed"] and report["run"]["kl_divergence"] < 1e-6


def test_through_onnxruntime_genai(tmp_path: Path) -> None:
    shape = {**NEXT, "vocab_size": 2048, "mlp_only_layers": [1]}
    folder, model = write_random_checkpoint(tmp_path / "checkpoint", **shape), random_model(**shape)
    artifact = make_artifact(folder, float_profile("fused"), tmp_path / "out", all_logits=False)
    check_greedy_tokens(og.Model(str(artifact)), model)


def test_rows_of_a_fused_tensor() -> None:
    form = Fused("f.weight", 2, (("a.weight", 1), ("b.weight", 2), ("a.weight", 1)))
    assert form.split() == {
        "a.weight": (range(0, 1), range(4, 5), range(3, 4), range(7, 8)),
        "b.weight": (range(1, 3), range(5, 7)),
    }

    class Source:
        shape, nbytes, files = (8, 3), 96, frozenset[Path]()

        def __init__(self) -> None:
            self.rows = 0

        def read(self, start: int, stop: int) -> np.ndarray:
            self.rows += stop - start
            return np.arange(24).reshape(8, 3)[start:stop]

    tensor = RowRuns(Source(), form.split()["b.weight"])
    assert tensor.shape == (4, 3) and tensor.nbytes == 48
    whole = Source().read(0, 8)[[1, 2, 5, 6]]
    for start in range(5):
        for stop in range(start + 1, 5):
            source = Source()
            tensor = RowRuns(source, form.split()["b.weight"])
            np.testing.assert_array_equal(tensor.read(start, stop), whole[start:stop])
            assert source.rows == stop - start  # and no others, however large the fused tensor is


def test_another_number_of_heads_than_the_weights_have(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path, **NEXT)
    edit_config(folder, linear_num_value_heads=8)
    with pytest.raises(
        UserError, match=r"in_proj_qkvz.weight has shape \(192, 64\) where config.json says 320"
    ):
        Checkpoint.open(str(folder))


def test_damage_is_named(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "c", **NEXT)

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.linear_attn.in_proj_qkvz.weight"][5, 2] = float("inf")

    save_tensors(folder, random_model(**NEXT), damage)
    with pytest.raises(
        UserError, match=r"tensor model.layers.1.linear_attn.in_proj_qkvz.weight in .* holds NaN or Inf"
    ):
        make_artifact(folder, load_profile("cpu"), tmp_path / "out")

    def lose(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.0.linear_attn.in_proj_ba.weight"]

    save_tensors(folder, random_model(**NEXT), lose)
    with pytest.raises(UserError, match=r"has no tensor model.layers.0.linear_attn.in_proj_[ab].weight"):
        make_artifact(folder, load_profile("cpu"), tmp_path / "out")


def test_the_mtp_head_is_that_of_a_mixture(tmp_path: Path) -> None:
    """Its layer has experts whatever the decoder's first layer has."""
    folder = write_random_checkpoint(tmp_path, **NEXT, mlp_only_layers=[0])
    head = mtp_tensors(Checkpoint.open(str(folder)).config)
    assert "mtp.layers.0.mlp.experts.gate_up_proj" in head and "mtp.layers.0.mlp.gate_proj.weight" not in head


def test_the_mtp_head_agrees_with_pytorch(tmp_path: Path) -> None:
    """As published: config.json tells nothing of the head."""
    shape = {**NEXT, "vocab_size": 2048}
    write_random_checkpoint(tmp_path / "body", **shape)
    model = random_model(**shape)
    head = random_head(model)
    folder = with_head(tmp_path / "body", named(head), tmp_path / "whole")
    config = json.loads((folder / "config.json").read_text())
    config = {name: value for name, value in config.items() if not name.startswith("mtp_")}
    (folder / "config.json").write_text(json.dumps(config))
    artifact = make_artifact(folder, with_mtp(float_profile("fused")), tmp_path / "out")
    ids = np.random.default_rng(1).integers(0, 2048, 41)
    with torch.no_grad():
        hidden = model.model(input_ids=torch.tensor(ids[None, :-1])).last_hidden_state
        guesses = head(model, torch.tensor(ids[None, 1:]), hidden).numpy()
    guessed = run(artifact, "mtp.onnx")(ids[1:].tolist(), hidden_states=hidden.numpy())["logits"]
    assert cosine(guessed, guesses[:, -1:]).min() > 0.99999


ADAPTERS: dict[str, dict[str, Any]] = {
    "LoRA": {"target_modules": ["in_proj_qkvz", "in_proj_ba", "out_proj", "q_proj"]},
    "DoRA": {"target_modules": ["in_proj_qkvz", "k_proj"], "use_dora": True},
    "all linear": {"target_modules": "all-linear", "use_rslora": True},
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_of_fused_projections(kind: str, tmp_path: Path) -> None:
    """They change the tensors as the checkpoint has them, before these are split."""
    folder = write_random_checkpoint(tmp_path / "checkpoint", **NEXT)
    merged = train(random_model(**NEXT), tmp_path / "adapter", **ADAPTERS[kind]).merge_and_unload()
    checkpoint = with_adapters(Checkpoint.open(str(folder)), [str(tmp_path / "adapter")])
    assert checkpoint.adapters and not checkpoint.notes
    assert_answers_as(checkpoint, merged)


def test_adapters_of_fused_projections_are_not_switched(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "checkpoint", **NEXT)
    profile = load_profile("cpu")
    train(random_model(**NEXT), tmp_path / "one", target_modules=["q_proj", "out_proj"])
    kept = with_switched_adapters(Checkpoint.open(str(folder)), [str(tmp_path / "one")], profile)
    assert kept.switched_adapters
    train(random_model(**NEXT), tmp_path / "two", target_modules=["in_proj_qkvz"])
    with pytest.raises(UserError, match=r"in_proj_qkvz.weight in a way that cannot be switched at run time"):
        with_switched_adapters(Checkpoint.open(str(folder)), [str(tmp_path / "two")], profile)


@pytest.mark.parametrize("method", [gptq(), awq()], ids=["gptq", "awq"])
def test_codes_of_fused_projections_are_kept(method: Method, tmp_path: Path) -> None:
    """Rows put into another order are the same codes."""

    def as_published(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        config |= config.pop("text_config")

    shape = {**NEXT, "linear_num_value_heads": 8}
    chosen = ("in_proj_qkvz", "in_proj_ba", "out_proj")
    folder, model = write_quantized_checkpoint(tmp_path / "c", method, chosen, as_published, **shape)
    checkpoint = Checkpoint.open(str(folder))
    for part in ("qkv", "z", "a", "b"):
        tensor = checkpoint.tensors[f"model.layers.0.linear_attn.in_proj_{part}.weight"]
        assert isinstance(tensor, PrequantizedTensor) and tensor.scheme is not None
    profile = float_profile("fused", prefill_chunk=128)
    int4 = WeightFormat(precision="int4", block_size=32, symmetric=False)
    profile = profile.model_copy(
        update={"weights": profile.weights | dict.fromkeys(("linear_attention", "gate"), int4)}
    )
    artifact = make_artifact(folder, profile, tmp_path / "out")
    assert json.loads((artifact / "manifest.json").read_text())["carried_over"]
    ids = np.random.default_rng(1).integers(2, 512, 60)
    with torch.no_grad():
        expected = model(torch.tensor(ids)[None]).logits.numpy()
    assert cosine(Session(artifact).run(ids), expected).min() > 0.9999


@pytest.mark.parametrize("name", ["mtp_num_hidden_layers", "num_nextn_predict_layers"])
def test_heads_of_several_layers_are_told(name: str, tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path, **NEXT)
    assert declares_mtp(Checkpoint.open(str(folder)).config)
    edit_config(folder, **{name: 2})
    assert not declares_mtp(Checkpoint.open(str(folder)).config)


def test_openvino_is_refused(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "checkpoint", **NEXT)
    result = CliRunner().invoke(
        main, ["--profile", "intel-lunar-lake", str(folder), "-o", str(tmp_path / "out")]
    )
    assert result.exit_code == USER_ERROR
    assert "exported to ONNX only, not to OpenVINO" in result.stderr and result.stderr.count("\n") == 1
    planned = predict(Checkpoint.open(str(folder)), load_profile("intel-lunar-lake"))
    assert planned.reason is not None and planned.estimate.fits


def test_weights_of_qwen3_next_under_another_model_type(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path, num_experts=8)
    tensors = {
        name.replace("in_proj_qkv.", "in_proj_qkvz."): value for name, value in load_tensors(folder).items()
    }
    save_shards(folder, tensors, 1)
    checkpoint = Checkpoint.open(str(folder))
    with pytest.raises(
        UserError, match=r"names that the model has not: .*in_proj_qkvz.weight.*another model's"
    ):
        checkpoint.check(checkpoint.config.tensors())
