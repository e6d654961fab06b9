"""`qwen-export verify --reference transformers`: the one comparison that shares no code with the export."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from qwen_common.errors import BELOW_THE_BAR, USER_ERROR, UserError
from qwen_export import reference
from qwen_export.adapters.merge import with_adapters
from qwen_export.checkpoint import Checkpoint
from qwen_export.cli import main
from qwen_export.verify import transformers_reference
from qwen_export.verify.transformers_reference import agreement, compare
from qwen_profiles.schema import load_profile

from benchmarks.support.artifacts import make_artifact
from benchmarks.support.checkpoints import TINY, TINY_MOE, TINY_VL
from tests.support.adapters import LINEAR, as_module, train
from tests.support.compressed_checkpoints import scheme, write_compressed_model
from tests.support.quantized_checkpoints import FP8, write_quantized_checkpoint
from tests.support.random_checkpoints import (
    load_tensors,
    random_model,
    random_vision_model,
    save_shards,
    store_head,
    write_random_checkpoint,
    write_vision_checkpoint,
)
from tests.support.record_quantized import RECORDED

IDS = list(range(3, 60))


@pytest.mark.parametrize("checkpoint", [TINY, TINY_MOE, TINY_VL], ids=lambda path: path.name)
def test_shipped_checkpoints(checkpoint: Path) -> None:
    found = compare(Checkpoint.open(str(checkpoint)), IDS)
    assert found.agrees and found.cosine > 0.999999 and abs(found.kl_divergence) < 1e-8
    assert found.tokens == len(IDS)


def test_where_the_files_contradict_each_other(tmp_path: Path) -> None:
    store_head(write_random_checkpoint(tmp_path / "head"))
    assert compare(Checkpoint.open(str(tmp_path / "head")), IDS).agrees


def test_fp8(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers reads no FP8 without it")
    write_quantized_checkpoint(tmp_path / "fp8", FP8)
    assert compare(Checkpoint.open(str(tmp_path / "fp8")), IDS).agrees


ONE_SCHEME = {
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
    "ignore": ["lm_head", "re:.*in_proj_[ab]$"],
}
INT4 = scheme(strategy="group", group_size=32, symmetric=False)
MXFP4 = scheme(type="float", strategy="group", group_size=32, scale_dtype="torch.uint8")
NVFP4 = scheme(type="float", strategy="tensor_group", group_size=16)


@pytest.mark.parametrize(
    ("name", "group"), [("pack-quantized", INT4), ("mxfp4-pack-quantized", MXFP4)], ids=["int4", "mxfp4"]
)
def test_compressed_tensors(name: str, group: dict[str, Any], tmp_path: Path) -> None:
    """Packed zero points, and what transformers dequantises to bfloat16, too."""
    config = {**ONE_SCHEME, "format": name, "config_groups": {"group_0": group}}
    folder, _ = write_compressed_model(tmp_path / "checkpoint", config)
    assert compare(Checkpoint.open(str(folder)), IDS).agrees


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("mlx", "takes MLX's layout for its own"),
        ("mlx-4", "takes MLX's layout for its own"),
        ("modelopt-fp8", "leaves ModelOpt's scales out"),
        ("bitsandbytes-nf4", "rounds weights in NF4 to bfloat16"),
        ("torchao-int8", "cannot run .*torchao"),
    ],
)
def test_forms_that_transformers_does_not_read(form: str, message: str) -> None:
    with pytest.raises(UserError, match=f"{message}.*: verify without --reference transformers"):
        compare(Checkpoint.open(str(RECORDED / form)), IDS)


def test_nvfp4_and_weights_that_transformers_does_not_find(tmp_path: Path) -> None:
    config = {**ONE_SCHEME, "format": "nvfp4-pack-quantized", "config_groups": {"group_0": NVFP4}}
    folder, _ = write_compressed_model(tmp_path / "nvfp4", config)
    with pytest.raises(UserError, match="rounds weights in NVFP4 to bfloat16"):
        compare(Checkpoint.open(str(folder)), IDS)
    wrapped = write_random_checkpoint(tmp_path / "wrapped")
    tensors = {f"_orig_mod.{name}": value for name, value in load_tensors(wrapped).items()}
    save_shards(wrapped, tensors, 1)
    with pytest.raises(UserError, match=r"transformers finds in .* no lm_head\.weight"):
        compare(Checkpoint.open(str(wrapped)), IDS)


EXPERTS = {"num_experts": 4}
ADAPTERS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "LoRA": ({}, [{"target_modules": LINEAR, "use_rslora": True}]),
    "DoRA": ({}, [{"target_modules": LINEAR, "use_dora": True}]),
    "a tied head": ({}, [{"target_modules": ["lm_head", "q_proj"]}]),
    "modules to save": ({}, [{"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]}]),
    "experts": (EXPERTS, [{"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}]),
    "several": ({}, [{"target_modules": LINEAR}, {"target_modules": ["q_proj", "k_proj"], "use_dora": True}]),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapters(case: str, tmp_path: Path) -> None:
    overrides, configs = ADAPTERS[case]
    folder = write_random_checkpoint(tmp_path / "base", **overrides)
    given = []
    for at, config in enumerate(configs):
        train(random_model(**overrides), tmp_path / f"a.{at}", seed=at, **config)
        given.append(f"{tmp_path / f'a.{at}'}={-0.5 if len(configs) > 1 else 1}")
    plain = Checkpoint.open(str(folder))
    found = compare(with_adapters(plain, given), IDS)
    assert found.agrees and found.cosine > 0.99999, found
    assert found.versions["peft"]
    others = replace(with_adapters(plain, given), tensors=plain.tensors, config=plain.config)
    assert not compare(others, IDS).agrees  # the adapters are in transformers' logits


def test_an_adapter_of_a_model_that_sees(tmp_path: Path) -> None:
    folder = write_vision_checkpoint(tmp_path / "base")
    train(random_vision_model(), tmp_path / "adapter", target_modules=["q_proj", "qkv"])
    adapted = with_adapters(Checkpoint.open(str(folder)), [str(tmp_path / "adapter")])
    assert compare(adapted, IDS).agrees


def test_an_adapter_that_transformers_has_no_modules_for(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "base", **EXPERTS)
    experts = {"model.layers.0.mlp.experts.1.up_proj.weight": torch.zeros(32, 64)}
    train(as_module(experts), tmp_path / "adapter", target_modules=["up_proj"])
    adapted = with_adapters(Checkpoint.open(str(folder)), [str(tmp_path / "adapter")])
    with pytest.raises(UserError, match="verify without --reference transformers") as refused:
        compare(adapted, IDS)
    assert "\n" not in str(refused.value)


def test_a_fault_that_reading_would_put_into_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The artifact equals the reference, both are wrong, and only transformers tells."""
    artifact = make_artifact(TINY, load_profile("cpu"), tmp_path / "artifact", all_logits=False)
    arguments = [
        "verify",
        str(artifact),
        "--against",
        str(TINY),
        "--tokens",
        "256",
        "--json",
        "--no-progress",
    ]
    runner = CliRunner()
    plain = json.loads(runner.invoke(main, arguments).stdout)
    assert plain["passed"] and plain["transformers"] is None
    good = runner.invoke(main, [*arguments, "--reference", "transformers"])
    assert good.exit_code == 0
    assert json.loads(good.stdout)["transformers"]["agrees"] is True
    assert "agrees with the reference" in (artifact / "REPORT.md").read_text()
    right = reference.layer

    def wrong(config, weights, index, hidden):
        return right(config, weights, index, hidden) * (1.2 if index == 3 else 1)

    monkeypatch.setattr(reference, "layer", wrong)
    bad = runner.invoke(main, [*arguments, "--reference", "transformers"])
    assert bad.exit_code == BELOW_THE_BAR
    report = json.loads(bad.stdout)
    assert report["transformers"]["agrees"] is False
    assert "computes other logits than the reference" in report["findings"][0]
    assert "DOES NOT AGREE" in (artifact / "REPORT.md").read_text()


def test_agreement_is_the_worst_positions() -> None:
    logits = np.random.default_rng(0).normal(size=(5, 100)).astype(np.float32)
    other = logits.copy()
    other[2] += np.linspace(0, 1, 100)
    found = agreement({}, logits, other)
    probabilities = np.exp(other[2]) / np.exp(other[2]).sum()
    expected = (probabilities * np.log(probabilities / (np.exp(logits[2]) / np.exp(logits[2]).sum()))).sum()
    assert found.kl_divergence == pytest.approx(expected, rel=1e-5)
    assert not found.agrees and agreement({}, logits, logits).agrees


def test_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(str(TINY))
    small = SimpleNamespace(available=10_000)
    monkeypatch.setattr(transformers_reference.psutil, "virtual_memory", lambda: small)
    with pytest.raises(UserError, match=r"the whole model in float32: that is 0\.0 GB, and 0\.0 are free"):
        compare(checkpoint, IDS)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="--reference transformers needs transformers: pip install torch"):
        compare(checkpoint, IDS)


def test_what_transformers_cannot_load(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    checkpoint = Checkpoint.open(str(folder))
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "nothing"}))
    with pytest.raises(UserError, match=r"transformers cannot run .*verify without --reference") as caught:
        compare(checkpoint, IDS)
    assert "\n" not in str(caught.value)


def test_a_text_only_artifact_of_a_model_that_sees(tmp_path: Path) -> None:
    arguments = [
        "--profile",
        "cpu",
        str(TINY_VL),
        "-o",
        str(tmp_path / "out"),
        "--text-only",
        "--no-progress",
    ]
    runner = CliRunner()
    assert runner.invoke(main, [*arguments, "--no-verify"]).exit_code == 0
    again = ["verify", str(tmp_path / "out"), "--against", str(TINY_VL), "--tokens", "256", "--no-progress"]
    assert runner.invoke(main, again).exit_code == 0
    wrong = runner.invoke(main, [*again[:3], str(TINY), *again[4:]])
    assert wrong.exit_code == USER_ERROR
