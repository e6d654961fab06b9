"""`--auto-precision`: it keeps to its size, and loses less than one precision for all at that size."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from qwen_common.errors import USER_ERROR, UserError
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.cli import main
from qwen_export.cli.auto_precision import byte_count
from qwen_export.planner.predictions import predict
from qwen_export.quantize.allocation import Choice, allocate
from qwen_export.quantize.auto_precision import Candidates, Limits, auto_precision, candidates, measured
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


def weights(source: Checkpoint) -> int:
    return sum(int(np.prod(tensor.shape)) for tensor in source.tensors.values())


def divergence(artifact: Path, checkpoint: Path) -> float:
    report = verify(artifact, Checkpoint.open(str(checkpoint)), Quiet(), tokens=1024, text=EVALUATION)
    return report["run"]["kl_divergence"]


@pytest.fixture(scope="module")
def own_kind(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration text of the kind that is measured on, and not measured on itself."""
    text = EVALUATION.read_text(encoding="utf-8")
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(text[len(text) // 2 :], encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "checkpoint, profile", [(TINY, directml_profile()), (TINY_MOE, load_profile("cpu"))], ids=["dense", "moe"]
)
def test_better_than_the_profiles_own_recipe_at_its_size(
    checkpoint: Path, profile: Profile, own_kind: Path, tmp_path: Path
) -> None:
    usual = make_artifact(checkpoint, profile, tmp_path / "usual", all_logits=False)
    source = Checkpoint.open(str(checkpoint))
    asked = Limits(bits=8 * data_size(usual) / weights(source))
    chosen = auto_precision(candidates(source, profile), own_kind, Quiet(), asked).profile
    artifact = make_artifact(checkpoint, chosen, tmp_path / "auto", all_logits=False)
    assert 0.97 * data_size(usual) < data_size(artifact) <= data_size(usual)
    assert divergence(artifact, checkpoint) < divergence(usual, checkpoint)


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", [TINY, TINY_MOE], ids=lambda path: path.name)
def test_more_bytes_are_nearer_to_transformers(checkpoint: Path, own_kind: Path, tmp_path: Path) -> None:
    """KL divergence falls with the size, and is less than that of the body in 2 bits at the same bytes."""
    source, body = Checkpoint.open(str(checkpoint)), WeightFormat(precision="int2", block_size=64)
    profile = load_profile("cpu", ["mtp=false"])
    uniform = {role: WeightFormat(precision="int4", block_size=64) for role in profile.weights}
    uniform |= {"mlp": body, "experts": body, "gate": profile.weights["gate"]}
    plain = make_artifact(
        checkpoint, profile.model_copy(update={"weights": uniform}), tmp_path / "plain", False
    )
    found = measured(candidates(source, profile), own_kind, Quiet())
    sizes = [data_size(plain) * 8 / weights(source), 4.5, 5.5, 6.5, 8]
    figures = []
    for bits in sizes:
        chosen = found.spend(Limits(bits=bits)).profile
        artifact = make_artifact(checkpoint, chosen, tmp_path / f"{bits}", all_logits=False)
        report = verify(
            artifact, source, Quiet(), tokens=1024, text=EVALUATION, with_transformers=bits == sizes[0]
        )
        assert report["transformers"] is None or report["transformers"]["agrees"]
        figures.append(report["run"]["kl_divergence"])
    assert figures == sorted(figures, reverse=True)
    assert figures[0] < divergence(plain, checkpoint)


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
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, 32))
    found = divergences(
        config,
        tensors,
        {part: dict.fromkeys(names, form) for part, names in parts.items()},
        ids,
        lambda: None,
    )

    def probabilities(weights: Weights) -> np.ndarray:
        *_, hidden = forward(config, weights, ids)
        return log_softmax(logits(config, weights, hidden))

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


def test_two_things_are_limited_at_once() -> None:
    parts = [LayerRole(layer, "mlp") for layer in range(2)]
    small, wide, long = (
        Choice(INT4, (100, 100), 1.0),
        Choice(INT8, (200, 110), 0.1),
        Choice(INT8, (110, 200), 0.2),
    )
    choices = {part: [small, wide, long] for part in parts}

    def taken(*budgets: float) -> list[Choice]:
        return list(allocate(choices, budgets).values())

    assert taken(400, math.inf) == [wide, wide]
    assert taken(math.inf, 220) == [wide, wide]
    assert sorted(taken(320, 320), key=lambda choice: choice.cost) == [wide, long]
    assert sorted(taken(210, 300), key=lambda choice: choice.cost) == [long, small]


def test_two_parts_exchange_what_one_step_cannot_reach() -> None:
    """A part goes back to its small form, where that pays for the large form of a part that suffers more."""
    one, two = LayerRole(0, "mlp"), LayerRole(1, "mlp")
    choices = {
        one: [Choice(INT4, (100,), 0.3), Choice(INT8, (150,), 0.0)],  # more for each byte, and taken first
        two: [Choice(INT4, (100,), 1.0), Choice(INT8, (300,), 0.0)],
    }
    assert [choice.form for choice in allocate(choices, [400]).values()] == [INT4, INT8]


@pytest.fixture(scope="module")
def moe() -> Candidates:
    return measured(candidates(Checkpoint.open(str(TINY_MOE)), load_profile("cpu")), None, Quiet())


@pytest.mark.parametrize("share", [0.05, 0.4, 0.8])
def test_what_is_asked_for_is_kept_to_and_used(moe: Candidates, share: float, tmp_path: Path) -> None:
    """By the files that are written, and by what `plan` says of the profile that was chosen."""
    least, most = moe.estimate(moe.smallest), moe.estimate(moe.largest)
    size = int(least.disk + share * (most.disk - least.disk))
    chosen = moe.spend(Limits(size=size))
    artifact = make_artifact(TINY_MOE, chosen.profile, tmp_path / "artifact", all_logits=False)
    assert 0.97 * size < sum(path.stat().st_size for path in artifact.iterdir()) <= size
    memory = int(least.resident + share * (most.resident - least.resident))
    found = moe.spend(Limits(memory=memory))
    assert predict(moe.checkpoint, found.profile).estimate.resident == found.estimate.resident
    assert 0.97 * memory < found.estimate.resident <= memory
    both = moe.spend(Limits(size=size, memory=memory)).estimate
    assert both.disk <= size and both.resident <= memory


def test_more_bytes_cost_less_and_all_three_widths_are_chosen(moe: Candidates) -> None:
    costs, used = [], set()
    for bits in (3.2, 3.6, 4, 4.5, 5, 6, 7, 9):
        chosen = moe.spend(Limits(bits=bits))
        costs.append(chosen.divergence)
        used |= {form.precision for form in chosen.formats.values()}
        experts = {form for part, form in chosen.formats.items() if part.role == "experts"}
        assert len(chosen.layers()["experts"]) == len({(f.precision, f.block_size) for f in experts})
    assert costs == sorted(costs, reverse=True) and used == {"int2", "int4", "int8"}
    assert moe.spend(Limits(bits=5)) == moe.spend(Limits(bits=5))


def test_above_the_largest_it_takes_the_largest(moe: Candidates) -> None:
    chosen = moe.spend(Limits(size=10**12))
    assert chosen.largest and {form.precision for form in chosen.formats.values()} == {"int8"}
    assert not moe.spend(Limits(bits=6)).largest


def test_two_bits_only_where_every_provider_has_them() -> None:
    source = Checkpoint.open(str(TINY_MOE))
    for profile, least in ((load_profile("cpu"), "int2"), (directml_profile(), "int4")):
        smallest = candidates(source, profile).smallest
        assert {form.precision for form in smallest.layer_weights[0].values()} == {least}


def test_the_profiles_memory_is_kept_to(moe: Candidates) -> None:
    least = moe.estimate(moe.leanest)
    hardware = load_profile("cpu").hardware.model_copy(
        update={"memory_budget_gb": (least.needed + 10**6) / 1e9}
    )
    small = replace(moe, profile=moe.profile.model_copy(update={"hardware": hardware}))
    assert small.spend(Limits(size=10**9, fit=True)).estimate.fits
    assert not small.spend(Limits(size=10**9)).estimate.fits


@pytest.mark.parametrize(
    "text, size",
    [
        ("11GB", 11 * 10**9),
        ("11 gb", 11 * 10**9),
        ("1.5GiB", 3 * 2**29),
        ("900MB", 900 * 10**6),
        ("123456", 123456),
        ("2k", 2000),
        ("7B", 7),
    ],
)
def test_units(text: str, size: int) -> None:
    assert byte_count(text, "--size") == size


@pytest.mark.parametrize(
    "text", ["", "GB", "-1GB", "1,5GB", "11GB or so", "1e9", "nan", "inf", "11Gbit", "3iB", "9" * 400]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UserError, match=r"--memory .* is no size: write 18GB"):
        byte_count(text, "--memory")


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
    assert 5.7 < data_size(output) * 8 / weights(Checkpoint.open(str(TINY))) <= 6
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


def test_plan_shows_both_ends(moe: Candidates) -> None:
    command = ["plan", str(TINY_MOE), "--profile", "cpu", "--auto-precision"]
    ends = json.loads(CliRunner().invoke(main, [*command, "--json"]).stdout)["auto_precision"]
    assert ends["size"] == [moe.estimate(moe.smallest).disk, moe.estimate(moe.largest).disk]
    assert ends["memory"][0] == moe.estimate(moe.leanest).resident
    assert "--auto-precision --memory: 0.08" in CliRunner().invoke(main, command).stdout
    refused = CliRunner().invoke(main, ["plan", "Qwen3.5-4B", "--auto-precision"])
    assert refused.exit_code == USER_ERROR and "name both" in refused.output


def test_mistakes(tmp_path: Path) -> None:
    start = ["--profile", "cpu", str(TINY), "-o", str(tmp_path / "out")]
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    cases = {
        "give --size 18GB, --memory 20GB or --bits 4.8": ["--auto-precision"],
        "is no size": ["--auto-precision", "--size", "large"],
        "'0x10' is no size": ["--auto-precision", "--memory", "0x10"],
        "say the same": ["--auto-precision", "--size", "3MB", "--bits", "5"],
        "is no number of bits": ["--auto-precision", "--bits", "nan"],
        "give at least that": ["--auto-precision", "--bits", "2"],
        "for cpu has 1.": ["--auto-precision", "--size", "1MB"],
        "of memory once it is loaded: give at": ["--auto-precision", "--memory", "70MB"],
        "are for --auto-precision": ["--bits", "5"],
        "--memory and --bits are for": ["--memory", "0"],
        "needs 0.1 GB and profile cpu": [
            "--auto-precision",
            "--size",
            "4MB",
            "--set",
            "hardware.memory_budget_gb=0.01",
        ],
        "--calibration is for --auto-precision, ": ["--calibration", str(short)],
        "is for ONNX Runtime": ["--profile", "intel-lunar-lake", "--auto-precision", "--bits", "5"],
        "backend onnx has no compression awq: choose data-free, gptq or gptaq": ["--set", "compression=awq"],
        "give a text of 128": ["--auto-precision", "--bits", "6", "--calibration", str(short)],
    }
    for message, options in cases.items():
        result = CliRunner().invoke(main, [*start, *options])
        assert result.exit_code == USER_ERROR and message in result.output, (message, result.output)
    with pytest.raises(UserError, match="give at least"):
        auto_precision(
            candidates(Checkpoint.open(str(TINY)), load_profile("cpu")), None, Quiet(), Limits(size=1000)
        )
    assert not (tmp_path / "out").exists()
