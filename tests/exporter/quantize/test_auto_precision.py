"""`--auto-precision`: it keeps to its size, and loses less than one precision for all at that size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from qwen_common.errors import USER_ERROR, UserError
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.cli import main
from qwen_export.quantize.auto_precision import Limits, auto_precision
from qwen_export.quantize.allocation import Choice, allocate
from qwen_export.quantize.blockwise import Quantization
from qwen_export.quantize.sensitivity import LayerRole, _Requantised, divergences
from qwen_export.reference import Weights, forward, log_softmax, logits
from qwen_export.verify.verification import verify
from qwen_profiles.schema import Profile, WeightFormat, load_profile
from qwen_runtime import Model

from benchmarks.support.artifacts import Quiet, directml_profile, make_artifact
from benchmarks.support.checkpoints import EVALUATION, TINY, TINY_MOE

INT4, INT8 = WeightFormat(precision="int4"), WeightFormat(precision="int8")


def data_size(artifact: Path) -> int:
    return (artifact / "model.onnx.data").stat().st_size


def divergence(artifact: Path, checkpoint: Path) -> float:
    report = verify(artifact, Checkpoint.open(str(checkpoint)), Quiet(), tokens=1024, text=EVALUATION)
    return report["run"]["kl_divergence"]


@pytest.mark.parametrize("checkpoint", [TINY, TINY_MOE], ids=lambda path: path.name)
@pytest.mark.parametrize("profile", [load_profile("cpu"), directml_profile()], ids=lambda p: p.name)
def test_better_than_the_profiles_own_recipe_at_its_size(
    checkpoint: Path, profile: Profile, tmp_path: Path
) -> None:
    usual = make_artifact(checkpoint, profile, tmp_path / "usual", all_logits=False)
    size = sum(path.stat().st_size for path in usual.iterdir())
    source = Checkpoint.open(str(checkpoint))
    chosen = auto_precision(source, profile, None, Quiet(), Limits(size=size)).profile
    artifact = make_artifact(checkpoint, chosen, tmp_path / "auto", all_logits=False)
    assert 0.97 * data_size(usual) < data_size(artifact) <= data_size(usual)
    assert divergence(artifact, checkpoint) < divergence(usual, checkpoint)


def test_a_part_costs_what_it_costs_alone() -> None:
    """The streams' KL divergence, against whole forward passes with that part's weights quantised."""
    source = Checkpoint.open(str(TINY))
    config, tensors = source.config, source.tensors
    form = Quantization(4, 32, True, np.dtype(np.float32))
    parts = {
        LayerRole(2, "mlp"): [f"model.layers.2.mlp.{name}_proj.weight" for name in ("gate", "up", "down")],
        LayerRole(3, "attention"): [f"model.layers.3.self_attn.{name}_proj.weight" for name in "qkvo"],
        LayerRole(-1, "lm_head"): ["model.embed_tokens.weight"],
    }
    ids = np.random.default_rng(0).integers(0, config.vocab_size, 64)
    found = divergences(
        config,
        tensors,
        {part: dict.fromkeys(names, form) for part, names in parts.items()},
        ids,
        lambda: None,
    )

    def probabilities(weights: Weights) -> np.ndarray:
        *_, hidden = forward(config, weights, ids[None])
        return log_softmax(logits(config, weights, hidden[0]))

    expected = probabilities(Weights(tensors))
    for part, names in parts.items():
        changed = {name: _Requantised(tensors[name], form) for name in names}
        alone = probabilities(Weights({**tensors, **changed}))
        assert found[part] == pytest.approx((np.exp(expected) * (expected - alone)).sum(-1).mean(), rel=1e-3)
        assert found[part] > 1e-5


def test_bytes_go_where_they_spare_most() -> None:
    parts = [LayerRole(layer, "mlp") for layer in range(3)]
    choices = {
        part: [Choice(INT4, (100,), cost), Choice(INT8, (200,), cost / 256)]
        for part, cost in zip(parts, (0.1, 0.5, 0.2), strict=True)
    }

    def in_int8(budget: int) -> list[int]:
        return [part.layer for part, choice in allocate(choices, [budget]).items() if choice.form == INT8]

    assert in_int8(300) == []
    assert in_int8(450) == [1]
    assert in_int8(500) == [1, 2]
    assert in_int8(10_000) == [0, 1, 2]


def test_command(tmp_path: Path) -> None:
    output = tmp_path / "artifact"
    command = [
        "--profile",
        "strix-halo",
        str(TINY),
        "-o",
        str(output),
        "--auto-precision",
        "--bits",
        "6",
        "--json",
    ]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    manifest = json.loads(result.stdout)
    weights = sum(int(np.prod(source.shape)) for source in Checkpoint.open(str(TINY)).tensors.values())
    assert 5.7 < data_size(output) * 8 / weights <= 6
    assert manifest["settings"]["layer_weights"].keys() == {str(layer) for layer in range(8)}
    inspected = json.loads(CliRunner().invoke(main, ["inspect", str(output), "--json"]).stdout)
    assert (
        "int8" in inspected["roles"]["mlp"]["precision"] and "int4" in inspected["roles"]["mlp"]["precision"]
    )
    with Model.load(output) as model:
        assert "".join(model.generate("def", max_tokens=5))


def test_one_layer_by_hand(tmp_path: Path) -> None:
    profile = load_profile("cpu", ["layer_weights.3.mlp=int8"])
    artifact = make_artifact(TINY, profile, tmp_path / "artifact", all_logits=False)
    report = verify(artifact, Checkpoint.open(str(TINY)), Quiet(), tokens=256)
    errors = {layer["layer"]: layer["error"] for layer in report["layers"] if layer["role"] == "mlp"}
    assert errors[3] < 0.1 * min(error for layer, error in errors.items() if layer != 3)


def test_mistakes(tmp_path: Path) -> None:
    start = ["--profile", "cpu", str(TINY), "-o", str(tmp_path / "out")]
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    cases = {
        "give --size 18GB, --memory 20GB or --bits 4.8": ["--auto-precision"],
        "is no size": ["--auto-precision", "--size", "large"],
        "give at least that": ["--auto-precision", "--bits", "2"],
        "are for --auto-precision": ["--bits", "5"],
        "--calibration is for --auto-precision and": ["--calibration", str(short)],
        "is for ONNX Runtime": ["--profile", "intel-lunar-lake", "--auto-precision", "--bits", "5"],
        "compression awq is for backend openvino": ["--set", "compression=awq"],
        "give a text of 128": ["--auto-precision", "--bits", "6", "--calibration", str(short)],
    }
    for message, options in cases.items():
        result = CliRunner().invoke(main, [*start, *options])
        assert result.exit_code == USER_ERROR and message in result.output, (message, result.output)
    with pytest.raises(UserError, match="give at least"):
        auto_precision(Checkpoint.open(str(TINY)), load_profile("cpu"), None, Quiet(), Limits(size=1000))
    assert not (tmp_path / "out").exists()
