"""Mixtures of experts against transformers in float32."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime_genai as og
import pytest
import torch
from qwen_common.errors import UserError
from qwen_export.backends.onnx.graphs import build_graphs
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_profiles.schema import WeightFormat, load_profile
from transformers import AutoTokenizer, Qwen3_5MoeForCausalLM

from benchmarks.support.artifacts import float_profile, make_artifact
from benchmarks.support.checkpoints import TINY_MOE
from benchmarks.support.session import Session, cosine
from tests.support.greedy_tokens import check_greedy_tokens
from tests.support.random_checkpoints import random_model, save_tensors, write_random_checkpoint

LOWERINGS = ("fused", "portable")
SHAPES: dict[str, dict[str, Any]] = {
    "two of eight": {"num_experts": 8},
    "all of four": {"num_experts": 4, "num_experts_per_tok": 4},
    "one of five, untied": {"num_experts": 5, "num_experts_per_tok": 1, "tie_word_embeddings": False},
    "experts wider than the model": {"num_experts": 8, "moe_intermediate_size": 160},
}


@pytest.fixture(params=SHAPES)
def case(request: pytest.FixtureRequest, tmp_path: Path):
    shape = SHAPES[request.param]
    return write_random_checkpoint(tmp_path / "checkpoint", **shape), random_model(**shape)


def assert_same(session: Session, model, length: int = 80) -> None:
    """Logits at once and in pieces, then 64 greedy tokens."""
    ids = np.random.default_rng(1).integers(2, 512, length)
    with torch.no_grad():
        expected = model(torch.tensor(ids)[None]).logits.numpy()
        answer = model.generate(
            torch.tensor(ids)[None], max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, length:].tolist()
    found = np.concatenate([session.run(part) for part in np.split(ids, [30, 31])], axis=1)
    assert cosine(found, expected).min() > 0.99999
    session.reset()
    logits, tokens = session.run(ids), []
    assert cosine(logits, expected).min() > 0.99999
    for _ in range(64):
        tokens.append(int(logits[0, -1].argmax()))
        logits = session.run(tokens[-1:])
    assert tokens == answer


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_float_experts(case, lowering: str, tmp_path: Path) -> None:
    checkpoint, model = case
    profile = float_profile(lowering, prefill_chunk=128)
    assert_same(Session(make_artifact(checkpoint, profile, tmp_path / "out")), model)


@pytest.mark.parametrize("lowering,symmetric", [("fused", True), ("fused", False), ("portable", False)])
def test_int4_experts_that_lie_on_a_grid(case, lowering: str, symmetric: bool, tmp_path: Path) -> None:
    """Experts whose weights INT4 holds exactly: the quantised operator must then agree to float32."""
    checkpoint, model = case
    snap(model, bits=4)
    save_tensors(checkpoint, model)
    profile = float_profile(lowering, prefill_chunk=128)
    experts = WeightFormat(precision="int4", block_size=32, symmetric=symmetric)
    profile = profile.model_copy(update={"weights": profile.weights | {"experts": experts}})
    artifact = make_artifact(checkpoint, profile, tmp_path / "out")
    assert_same(Session(artifact), model)


def snap(model, bits: int) -> None:
    """Experts of random codes, both ends used in each block, so that the grid is determined."""
    generator, levels = np.random.default_rng(0), 1 << bits
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." in name:
                codes = generator.integers(0, levels, tuple(parameter.shape))
                codes[..., ::16], codes[..., 1::16] = 0, levels - 1
                parameter.copy_(torch.tensor((codes - levels // 2) * 0.5 / levels))


@pytest.mark.parametrize("lowering,symmetric", [("fused", True), ("fused", False), ("portable", False)])
def test_int2_experts_that_lie_on_a_grid(lowering: str, symmetric: bool, tmp_path: Path) -> None:
    """The portable graph agrees to float32. QMoE rounds activations to 8 bits, which moves some choices."""
    shape = {"num_experts": 8, "hidden_size": 128, "moe_intermediate_size": 128}
    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", **shape)
    model = random_model(**shape)
    snap(model, bits=2)
    save_tensors(checkpoint, model)
    profile = float_profile(lowering, prefill_chunk=128)
    experts = WeightFormat(precision="int2", block_size=32, symmetric=symmetric)
    profile = profile.model_copy(
        update={"provider": "cpu", "fallbacks": (), "weights": profile.weights | {"experts": experts}}
    )
    session = Session(make_artifact(checkpoint, profile, tmp_path / "out"))
    if lowering == "portable":
        assert_same(session, model)
        return
    ids = np.random.default_rng(1).integers(2, 512, 80)
    with torch.no_grad():
        expected = model(torch.tensor(ids)[None]).logits.numpy()
    assert np.median(cosine(session.run(ids), expected)) > 0.9999


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("trained", [False, True])
def test_choices_of_experts(trained: bool, lowering: str, tmp_path: Path) -> None:
    """Every layer's router sends every token where transformers does."""
    if trained:
        checkpoint = TINY_MOE
        model = Qwen3_5MoeForCausalLM.from_pretrained(TINY_MOE, dtype=torch.float32).eval()
        text = (TINY_MOE.parent / "eval.txt").read_text(encoding="utf-8")
        ids = np.asarray(AutoTokenizer.from_pretrained(TINY_MOE)(text)["input_ids"][:60])
    else:
        checkpoint = write_random_checkpoint(tmp_path / "checkpoint", num_experts=8)
        model = random_model(num_experts=8)
        ids = np.random.default_rng(1).integers(2, 512, 60)
    expected = watch_choices(model)
    with torch.no_grad():
        model(torch.tensor(ids)[None])
    artifact = make_artifact(checkpoint, float_profile(lowering), tmp_path / "out")
    graph = onnx.load(artifact / "model.onnx")
    nodes = {node.name: node for node in graph.graph.node}
    product = {"fused": "FusedMatMul", "portable": "MatMul"}[lowering]
    logits = [nodes[f"model.layers.{layer}.mlp.{product}"].output[0] for layer in range(4)]
    for name in logits:
        graph.graph.output.add().name = name
    onnx.save(graph, artifact / "model.onnx")
    found = Session(artifact).run_all(ids)
    for name, choice in zip(logits, expected, strict=True):
        best = np.argsort(-found[name].reshape(60, 8), axis=-1)[:, :2]
        assert (np.sort(best) == np.sort(choice.numpy())).all()


def watch_choices(model) -> list[torch.Tensor]:
    """Each layer's experts [tokens, chosen], once the model runs."""
    chosen: list[torch.Tensor] = []

    def keep(_gate, _inputs, outputs) -> None:
        chosen.append(outputs[2])

    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(keep)
    return chosen


def test_portable_decode_reads_only_the_chosen_experts(tmp_path: Path) -> None:
    """Experts that a token does not choose overflow: alone it does not notice, in a run it does."""
    model = random_model(num_experts=8)
    chosen = watch_choices(model)
    with torch.no_grad():
        expected = model(torch.tensor([[7]])).logits.numpy()
        for layer, choices in zip(model.model.layers, chosen, strict=True):
            others = [expert for expert in range(8) if expert not in choices]
            layer.mlp.experts.gate_up_proj[others] *= 1e30
    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", num_experts=8)
    save_tensors(checkpoint, model)
    session = Session(make_artifact(checkpoint, float_profile("portable"), tmp_path / "out"))
    assert cosine(session.run([7]), expected).min() > 0.99999
    session.reset()
    assert np.isnan(session.run([7, 7])[0, 1]).all()


@pytest.mark.parametrize("wrap,shards,dtype", [(False, 1, torch.bfloat16), (True, 3, torch.bfloat16)])
def test_shipped_recipe(wrap: bool, shards: int, dtype: torch.dtype, tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(
        tmp_path / "checkpoint", num_experts=8, wrap=wrap, shards=shards, dtype=dtype
    )
    artifact = make_artifact(checkpoint, load_profile("cpu"), tmp_path / "out")
    model = random_model(num_experts=8)
    ids = np.random.default_rng(1).integers(2, 512, 60)
    with torch.no_grad():
        expected = model(torch.tensor(ids)[None]).logits.numpy()
    assert cosine(Session(artifact).run(ids), expected).mean() > 0.8  # INT4 moves some choices of experts


def test_through_onnxruntime_genai(tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", num_experts=8, vocab_size=2048)
    artifact = make_artifact(checkpoint, float_profile("fused"), tmp_path / "out", all_logits=False)
    loaded = og.Model(str(artifact))
    assert loaded.type == "qwen3_5_moe_text"
    check_greedy_tokens(loaded, random_model(num_experts=8, vocab_size=2048))


def test_router_and_gates_stay_float(tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", num_experts=8)
    graphs = build_graphs(Checkpoint.open(str(checkpoint)), load_profile("cpu"))
    storage = {weight.name: weight.storage for weight, _ in graphs.placed}
    routers = [name for name in storage if name.endswith((".gate.weight", "shared_expert_gate.weight"))]
    assert len(routers) == 8 and all(storage[name] == np.float32 for name in routers)


def damaged_experts(tensors: dict) -> None:
    tensors["model.layers.1.mlp.experts.down_proj"][3, 2, 1] = float("nan")


def missing_router(tensors: dict) -> None:
    del tensors["model.layers.1.mlp.gate.weight"]


@pytest.mark.parametrize(
    "damage,message",
    [
        (damaged_experts, "tensor model.layers.1.mlp.experts.down_proj in .* holds NaN"),
        (missing_router, "has no tensor model.layers.1.mlp.gate.weight"),
    ],
)
def test_damage_is_named(damage: Callable[[dict], None], message: str, tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", num_experts=8)
    save_tensors(checkpoint, random_model(num_experts=8), damage)
    with pytest.raises(UserError, match=message):
        make_artifact(checkpoint, load_profile("cpu"), tmp_path / "out")


@pytest.mark.skipif(sys.platform != "linux", reason="pages that were used are read from /proc")
def test_a_decode_step_touches_the_chosen_experts_alone(tmp_path: Path) -> None:
    shape = {
        "num_experts": 64,
        "num_experts_per_tok": 4,
        "hidden_size": 512,
        "moe_intermediate_size": 1024,
        "num_hidden_layers": 1,
        "layer_types": ["full_attention"],
    }
    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", dtype=torch.bfloat16, **shape)
    profile = load_profile("cpu")
    artifact = make_artifact(checkpoint, profile, tmp_path / "out", all_logits=False)
    script = Path(__file__).parents[2] / "support" / "touched_bytes.py"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(script), str(artifact)]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    sizes = build_graphs(Checkpoint.open(str(checkpoint)), profile).bytes_by_role()
    needed = sum(sizes.values()) - sizes["experts"] + sizes["experts"] * 4 // 64
    # More than the weights, for activations and the interpreter are in memory too, but far from all experts.
    assert needed <= int(found.stdout) < sizes["experts"] / 4
